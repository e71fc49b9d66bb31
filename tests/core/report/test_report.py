"""The page of a run: complete, self-contained, and readable in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from spiralrope_cli import main as cli
from spiralrope_cli.core.errors import SpiralRopeError
from spiralrope_cli.core.report.page import leave_report, repeat_command, stages, write_report
from spiralrope_cli.core.report.results import print_evaluation
from spiralrope_cli.core.runtime.run_folder import read_config, write_json
from spiralrope_cli.core.storage import SOURCES_FILE

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), ""
)
LOADS = {"src", "srcset", "data", "poster", "background", "action", "xlink:href"}
EMPTY = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Elements of a page, and whether they are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def run_folder(trained_once, runs):
    """A finished run with the metrics of two image sizes, and a nasty name."""
    folder = Path(shutil.copytree(trained_once, runs / "runs" / "a <b> & c"))
    row = {
        **{"source": "x", "checkpoint": "last", "step": 8, "data": "/data/digits", "acc5": 90.0},
        **{"crop_ratio": 1.0, "precision": "fp32", "loss": 1.0, "count": 360},
        **{"arch": "deit-64x2x2", "rope": {"enabled": True, "scaling": "interpolate"}},
    }
    rows = [
        {**row, "weights": kind, "image_size": [side, side], "acc1": side + len(kind)}
        for kind in ("raw", "EMA")
        for side in (8, 12)
    ]
    (folder / "eval.json").write_text(json.dumps({"decoded": 1, "rows": rows}))
    write_json(folder / SOURCES_FILE, {"lr": "option", "batch_size": "data set"})
    return folder


@pytest.fixture
def sample_folder(runs):
    folder = runs / "runs" / "drawn"
    folder.mkdir(parents=True)
    facts = {
        **{"made_by": "spiralrope 0 dit-sample", "source": "dit-s2", "weights": "raw"},
        **{"arch": "dit-s2", "rope": {"rotate": 2, "same_theta": False}, "num": 4, "steps": "250"},
        **{"sampler": "ddpm", "cfg_scale": 4.0, "cfg_channels": "3", "cfg_interval": [0, 1000]},
        **{"classes": [1, 2], "seed": 7, "vae": "mse", "image_size": [256, 256]},
        **{"precision": "float32", "versions": {"torch": "2"}},
    }
    (folder / "samples.json").write_text(json.dumps(facts))
    noise = np.random.default_rng(0).integers(0, 256, (900, 1800, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "samples.png")
    return folder


def loaded(page):
    """Addresses that a browser would fetch to show a page."""
    found = [value for _, each in page.elements for name, value in each.items() if name in LOADS]
    return found + [each["href"] for each in page.all("link") + page.all("use") + page.all("image")]


def test_a_run_has_its_page(trained_once):
    page = Page((trained_once / "report.html").read_text())
    text = " ".join(page.words)
    assert [tag for tag, _ in page.elements].count("h1") == 1
    for title in ("Accuracy", "Curves", "Configuration", "Environment", "Repeat this run"):
        assert title in page.words
    assert "deit-64x2x2" in text
    assert len(page.all("svg")) == 4
    assert all(each["aria-label"] and each["role"] == "img" for each in page.all("svg"))
    sizes = [list(map(float, each["viewbox"].split()[2:])) for each in page.all("svg")]
    assert all(250 < width < 400 and 150 < height < 300 for width, height in sizes)
    values = {str(value) for value in read_config(trained_once / "config.yaml")}
    assert values <= set(page.words)
    assert json.loads((trained_once / "environment.json").read_text())["device_name"] in text
    assert f"spiralrope pretrain \\\n  --config {trained_once}/config.yaml" in text


def test_nothing_is_loaded_from_elsewhere(run_folder, sample_folder):
    for folder in (run_folder, sample_folder):
        text = write_report(folder).read_text()
        page = Page(text)
        assert page.all("script") == []
        assert all(address.startswith(("data:", "#")) for address in loaded(page))
        assert not re.search(r"@import|url\((?!#)|https?:", text)
        files = [each["href"] for each in page.all("a")]
        assert files
        assert all((folder / name).is_file() for name in files)


@pytest.mark.draws
def test_names_are_unique_and_references_meet_them(run_folder):
    page = Page(write_report(run_folder).read_text())
    names = [each["id"] for _, each in page.elements if "id" in each]
    assert len(names) == len(set(names))
    used = {each["href"].removeprefix("#") for each in page.all("use")}
    assert used
    assert used <= set(names)


def test_text_is_escaped(run_folder):
    text = write_report(run_folder).read_text()
    assert "a <b>" not in text
    assert "<h1>a &lt;b&gt; &amp; c</h1>" in text


def test_evaluation_shows_what_differs_and_the_best(run_folder):
    page = Page(write_report(run_folder).read_text())
    for word in ("last, raw", "last, EMA", "8", "12", "15.00 (highest)"):
        assert word in page.words
    assert any("crop ratio 1" in word for word in page.words)
    rows = json.loads((run_folder / "eval.json").read_text())["rows"]
    (run_folder / "eval.json").write_text(json.dumps({"rows": rows[:1]}))
    assert "(highest)" not in write_report(run_folder).read_text()


def test_values_say_where_they_came_from(run_folder):
    words = Page(write_report(run_folder).read_text()).words
    at = words.index("lr")
    assert "option" in words[at : at + 5]


def test_samples_are_embedded_and_large_grids_made_smaller(sample_folder):
    page = Page(write_report(sample_folder).read_text())
    [image] = page.all("img")
    assert image["alt"]
    assert image["src"].startswith("data:image/jpeg;base64,")
    assert len(image["src"]) < 0.6 * (sample_folder / "samples.png").stat().st_size


def test_the_command_of_samples_is_one_that_dit_sample_takes(sample_folder):
    line = repeat_command(sample_folder)
    assert "--cfg-scale 4 " in line
    assert "--no-ema" in line
    assert "--classes 1,2" in line
    words = [*line.split()[1:], "--dry-run", "--rotate", "-1"]
    result = CliRunner().invoke(cli.app, words)
    assert "--rotate is -1" in str(result.exception)  # everything before it was understood


def test_the_command_of_a_run_repeats_it(trained_once, runs):
    words = repeat_command(trained_once).split()[1:]
    result = CliRunner().invoke(cli.app, [*words, "--dry-run"], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    assert "deit-64x2x2" in result.output
    assert "tiny-again" in result.output


def test_stages_make_one_page(run_folder, sample_folder, runs):
    whole = runs / "runs" / "pipe"
    for name in ("finetune", "pretrain"):
        shutil.copytree(run_folder, whole / name)
    shutil.copytree(sample_folder, whole / "dit-sample")
    fid = {"fid": 12.34567, "samples": {"path": "s.npz", "count": 4}, "warnings": ["too few"]}
    (whole / "fid.json").write_text(json.dumps(fid))
    (whole / "finetune" / "report.html").unlink()
    page = Page(write_report(whole).read_text())
    assert [stage.name for stage in stages(whole)] == ["pretrain", "finetune", "dit-sample"]
    hrefs = [each["href"] for each in page.all("a")]
    assert hrefs[:3] == ["#pretrain", "#finetune", "#dit-sample"]
    assert "pretrain/report.html" in hrefs
    assert "finetune/report.html" not in hrefs  # there is none
    assert "12.3457" in page.words
    assert "Warning: too few" in page.words
    names = [each["id"] for _, each in page.elements if "id" in each]
    assert len(names) == len(set(names))


@pytest.mark.draws
def test_a_sweep_shows_its_table_and_leads_to_its_runs(run_folder, runs):
    whole = runs / "runs" / "sweep"
    member = whole / "rotate2-seed0"
    shutil.copytree(run_folder, member / "pretrain")
    stage = {"finished": "2026-01-02T03:04:05+00:00", "seconds": 1234.5}
    write_json(member / "pipeline.json", {"stages": {"pretrain": stage}})
    assert "1,234" in Page(write_report(member).read_text()).words
    figure = {"mean": 97.216, "std": 0.304, "values": [97.0, 97.4]}
    row = {
        **{"point": {"rotate": "2"}, "seeds": [0, 1], "checkpoint": "last", "weights": "EMA"},
        **{"crop_ratio": 1.0, "acc1": figure, "acc5": {**figure, "std": None}, "loss": figure},
    }
    write_json(whole / "sweep.json", {"rows": [row]})
    page = Page(write_report(whole).read_text())
    for word in ("rotate", "97.22 ± 0.30", "97.22", "last EMA", "Curves"):
        assert word in page.words
    assert "1 runs: pretrain of deit" in " ".join(page.words)
    assert "Mean ± standard deviation" in " ".join(page.words)
    alone = {"mean": 97.216, "std": None, "values": [97.216]}
    write_json(
        whole / "sweep.json", {"rows": [{**row, "seeds": [0], "acc1": alone, "loss": alone}]}
    )
    assert "±" not in " ".join(Page(write_report(whole).read_text()).words)
    assert [each["href"] for each in page.all("a")] == ["rotate2-seed0/report.html"]


def test_a_folder_without_a_run_is_refused(runs):
    with pytest.raises(SpiralRopeError, match="holds no run"):
        write_report(runs)


def test_a_page_that_fails_is_a_line(run_folder, capsys):
    (run_folder / "eval.json").write_text('{"rows": [{"acc1": 1}]}')
    leave_report(run_folder)
    assert "report.html was not written" in capsys.readouterr().err


# --- in a browser

LOOK = """<!DOCTYPE html><meta charset="utf-8"><body>
<iframe id="f" width="{width}" height="900" srcdoc="{page}"></iframe>
<pre id="told"></pre>
<script>
document.getElementById("f").onload = event => {{
  const inside = event.target.contentWindow, root = inside.document.documentElement;
  const fetched = inside.performance.getEntriesByType("resource").map(each => each.name);
  const wide = [...inside.document.querySelectorAll("body *")].filter(
    each => each.getBoundingClientRect().right > root.clientWidth + 1 && !each.closest(".scroll")
  );
  document.getElementById("told").textContent = JSON.stringify({{
    width: root.clientWidth, scroll: root.scrollWidth, wide: wide.map(each => each.tagName),
    fetched: fetched.filter(name => !name.startsWith("data:")),
    svgs: [...inside.document.querySelectorAll("svg")].map(
      each => [each.clientWidth, each.clientHeight]
    ),
    pictures: [...inside.document.images].map(each => [each.naturalWidth, each.clientWidth]),
    ink: inside.getComputedStyle(inside.document.querySelector("h1")).color,
    ground: inside.getComputedStyle(inside.document.body).backgroundColor,
    axis: inside.getComputedStyle(inside.document.querySelector("svg text")).fill,
  }});
}};
</script>"""


def seen(folder, page, width, *flags):
    """What a browser that reaches no network makes of a page in a window of that width."""
    wrapper = folder / "look.html"
    wrapper.write_text(LOOK.format(width=width, page=html.escape(page)))
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *(f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"),
            *("--virtual-time-budget=3000", *flags, "--dump-dom", wrapper.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    told = re.search(r'<pre id="told">(.+?)</pre>', done.stdout, re.DOTALL)
    assert told, done.stderr[-2000:]
    return json.loads(html.unescape(told[1]))


@pytest.mark.skipif(not BROWSER, reason="no Chromium is installed")
@pytest.mark.parametrize(("width", "dark"), [(390, False), (1200, True)])
def test_a_browser_shows_it_without_network_or_overflow(run_folder, sample_folder, width, dark):
    whole = run_folder.parent / "pipe"
    shutil.copytree(run_folder, whole / "pretrain")
    shutil.copytree(sample_folder, whole / "dit-sample")
    page = write_report(whole).read_text()
    found = seen(
        run_folder.parent, page, width, f"--blink-settings=preferredColorScheme={1 - dark}"
    )
    assert found["fetched"] == []
    assert found["scroll"] <= found["width"] <= width
    assert found["wide"] == []
    assert len(found["svgs"]) == 4
    assert all(width > 300 and 0.4 < height / width < 0.9 for width, height in found["svgs"])
    [(natural, shown)] = found["pictures"]
    assert 0 < shown <= min(natural, width)
    ink, ground = (sum(map(int, re.findall(r"\d+", found[n])[:3])) for n in ("ink", "ground"))
    assert (ground < 100 < 600 < ink) if dark else (ink < 100 < 600 < ground)
    assert found["axis"] == found["ink"]


@pytest.mark.parametrize("columns", [30, 40, 50, 80])
def test_the_table_of_eval_breaks_no_word_on_a_narrow_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    same = {"source": "run", "arch": "deit-32x2x2", "data": "digits", "image_size": [8, 8]}
    same |= {
        "rope": {"enabled": False},
        "step": 90,
        "precision": "fp32",
        "count": 360,
        "acc1": 16.5,
        "acc5": 59.5,
        "loss": 2.29,
    }
    rows = [
        {**same, "checkpoint": checkpoint, "weights": weights, "crop_ratio": ratio}
        for checkpoint in ("best", "last")
        for weights in ("raw", "EMA")
        for ratio in (0.875, 1.0)
    ]
    print_evaluation(rows)
    words = capsys.readouterr().out.partition("\n")[2].split()  # below what all rows share
    words = [word.rstrip(",") for word in words]
    assert words.count("0.875") == words.count("raw") == words.count("2.2900") / 2 == 4
    assert words.count("last") == 4
    assert words.count("360") == 8
