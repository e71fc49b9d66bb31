"""Progress counts whole ones, however finely it is told of them; sizes are told in words."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re

import pytest
from rich.progress import Progress

from spiralrope_cli.core.runtime import progress
from spiralrope_cli.core.runtime.progress import (
    METRICS_FILE,
    Reporter,
    forget_after,
    human_size,
    read_metrics,
)


@pytest.fixture
def counts(monkeypatch, capsys):
    """Counts what it is told; gives what is shown after each time, as in a log without waiting."""
    monkeypatch.setattr(progress, "SECONDS", 0.0)

    def shown(*told, **more):
        seen = []
        with progress.counted("images", shown=True, **more) as advance:
            for number in told:
                advance(number)
                [line] = capsys.readouterr().err.splitlines()
                seen.append(int(re.match(r"images  (\d+)/", line)[1]))
        return seen

    return shown


@pytest.mark.parametrize(("images", "parts"), [(7, 3), (3, 7), (64, 251), (1, 1)])
def test_parts_add_up_to_whole_images_and_all_of_them(counts, images, parts):
    total = 2 + images + 5
    seen = counts(*[images] * parts, *[5] * parts, total=total, done=2, parts=parts)
    steps = [after - before for before, after in itertools.pairwise([2, *seen[:parts]])]
    assert seen[parts - 1] == 2 + images
    assert max(steps) - min(steps) <= 1
    assert seen[-1] == total


def test_it_never_counts_beyond_the_total(counts):
    assert counts(4, 4, total=5) == [4, 5]


def test_the_time_left_waits_for_the_first_one(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    with progress.counted("images", 10**6, shown=True, parts=100) as advance:
        advance(1)
    assert "images  0/1000000  0 per second  left ?" in capsys.readouterr().err


def test_the_time_left_of_a_run_without_end_is_a_long_one():
    bar = Progress()
    bar.add_task("", total=10**30, completed=1)
    [task] = bar.tasks
    task.start_time = task.get_time() - 60
    assert "days" in progress.time_left(task, 0)


def test_others_than_the_first_process_say_nothing(capsys):
    with progress.counted("images", 2, shown=False) as advance:
        advance(2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1.5e6, "1.5 MB"), (2e12, "2.000 TB"), (1e18, "1,000,000 TB")],
)
def test_sizes_are_told_as_download_pages_do(size, text):
    assert human_size(size) == text


def test_a_log_point_leaves_out_what_is_not_finite(tiny, runs):
    (runs / "run").mkdir()
    with Reporter(tiny(), step=0, best_acc1=None, first=True) as reporter:
        reporter.log(2, {"loss": 0.5, "lr": 0.1, "grad_norm": math.inf, "images_per_s": 9.0})
    [line] = read_metrics(runs / "run")
    assert line["loss"] == 0.5
    assert "grad_norm" not in line


def test_a_bar_does_not_stay_below_the_line_that_says_why_it_stopped(tiny):
    ended, stopped = (Reporter(tiny(), step=0, best_acc1=None, first=False) for _ in range(2))
    with ended:
        pass
    with contextlib.suppress(SystemExit), stopped:
        raise SystemExit(130)
    assert (ended._live.transient, stopped._live.transient) == (False, True)


LINE = {"step": 2, "epoch": 0.5, "loss": 0.5, "lr": 0.1, "images_per_s": 9.0}


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"step": 4, "epo',
        b"\x00\x00\xff\xfe\x93NUMPY",
        b"[1, 2]",
        b"4",
        b"{}",
        b'{"step": 4, "time": 1.0}',
        json.dumps({**LINE, "loss": None}).encode(),
        json.dumps({**LINE, "loss": math.nan}).encode(),
        json.dumps({**LINE, "step": "two"}).encode(),
        b'{"a":' * 20_000,
    ],
)
def test_damaged_lines_are_passed_over_and_counted_once(damaged, runs, capsys):
    lines = [json.dumps(LINE).encode(), damaged, json.dumps({**LINE, "step": 6}).encode(), damaged]
    (runs / METRICS_FILE).write_bytes(b"\n".join(lines))
    progress._note_damaged.cache_clear()  # pytest may give the folder of an earlier test again
    for _ in range(2):
        assert read_metrics(runs) == [LINE, {**LINE, "step": 6}]
    assert capsys.readouterr().err.count("metrics.jsonl: 2 damaged line(s) are passed over") == 1
    forget_after(runs, 4)
    assert (runs / METRICS_FILE).read_text() == json.dumps(LINE) + "\n"
