"""benchmarks/does_it_help.py: to its page, also after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import does_it_help as script
import pytest

ROOT = Path(__file__).parents[1]

TINY = ["--out", "results", "--tiny", "--seeds", "0"]


def test_it_goes_on_after_a_kill_and_writes_its_page(runs, monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["does_it_help", *words])
        script.main()
        return capsys.readouterr().out.splitlines()

    monkeypatch.setattr(script.torch, "set_num_threads", lambda count: None)
    child = subprocess.Popen(
        [sys.executable, script.__file__, *TINY],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline().startswith("lines, none, seed 0")
    child.kill()
    child.communicate()
    first = {path: path.stat().st_mtime_ns for path in Path("results").glob("*-seed0.json")}
    assert 1 <= len(first) < 5
    assert len(call(*TINY)) == 5 - len(first)
    assert all(path.stat().st_mtime_ns == then for path, then in first.items())

    docs = Path("docs")
    (docs / "images").mkdir(parents=True)
    (docs / script.PAGE).write_text((ROOT / "docs" / script.PAGE).read_text())
    call(*TINY, "--page", "docs")
    page, results = ((docs / name).read_text() for name in (script.PAGE, script.RESULTS))
    rows = json.loads(results)["rows"]
    assert sorted(row["kind"] for row in rows) == sorted(script.KINDS)
    for row in rows:
        cells = [f"{row['acc1'][name]:.1f}" for name in sorted(row["acc1"], key=order)]
        assert f"| {row['kind']} | {' | '.join(cells)} |" in page
    assert "**Fashion-MNIST**: not measured." in page
    assert (docs / script.FIGURE).read_bytes().startswith(b"\x89PNG")

    with pytest.raises(SystemExit, match=r"^error: results/recipe.json is of another recipe"):
        call("--out", "results")


def order(name):
    return int(name.split()[0]), name != "28", name


def test_the_page_has_the_table_of_its_results():
    page = (ROOT / "docs" / script.PAGE).read_text()
    results = json.loads((ROOT / "docs" / script.RESULTS).read_text())
    assert results["recipe"] == json.loads(json.dumps(vars(script.Recipe())))
    assert script.tables(results) in page
