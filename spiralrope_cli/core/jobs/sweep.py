"""A grid of classifier pipelines, one after the other, and one table of all."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from spiralrope_cli.core.config.datasets import find_held_out
from spiralrope_cli.core.config.sweeps import Member, Sweep
from spiralrope_cli.core.jobs.pipeline import run_deit, say
from spiralrope_cli.core.metrics.records import read_rows
from spiralrope_cli.core.report.page import leave_report
from spiralrope_cli.core.report.results import with_spread
from spiralrope_cli.core.runtime.console import console, say_result
from spiralrope_cli.core.runtime.launch import is_first_process
from spiralrope_cli.core.runtime.run_folder import (
    EVAL_FILE,
    REPORT_FILE,
    SWEEP_FILE,
    write_json,
)

FIGURES = ("acc1", "acc5", "loss")
SHOWN = (("raw", "acc1", "acc@1 %"), ("EMA", "acc1", "acc@1 % EMA"), ("EMA", "loss", "loss EMA"))
"""Weights, figure and heading of the table's columns; all of the last checkpoint: the best one was
chosen by the very images that it is measured on."""

Record = dict[str, Any]


def run_sweep(sweep: Sweep, *, dry_run: bool) -> None:
    """Runs what is missing of the grid, then shows all of it.

    Raises:
        SpiralRopeError: a member failed; the same command goes on with it.
    """
    for note in sweep.notes:
        say(f"note: {note}")
    for number, member in enumerate(sweep.members, 1):
        say(f"== {number}/{len(sweep.members)}: {member.point.label}, seed {member.seed}")
        if dry_run and number > 1:
            say(f" as the first one, into {member.pipeline.folder}")
        else:
            run_deit(member.pipeline, dry_run=dry_run, show_again=False)
    if dry_run or not is_first_process():
        return
    records = summary(sweep.members)
    write_json(Path(sweep.folder) / SWEEP_FILE, {"rows": records})
    print_table(records)
    say(f"figures: {Path(sweep.folder) / SWEEP_FILE}")
    leave_report(Path(sweep.folder))
    say(f"report: {Path(sweep.folder) / REPORT_FILE}")


def summary(members: Sequence[Member]) -> list[Record]:
    """One row for each point, set of weights and crop ratio, with mean and spread over seeds."""
    records = []
    for point in dict.fromkeys(member.point for member in members):
        mine = [member for member in members if member.point == point]
        by_seed = [measured(member) for member in mine]
        for key in by_seed[0]:
            rows = [rows[key] for rows in by_seed]
            checkpoint, weights, crop_ratio = key
            records.append(
                {
                    **{"point": dict(point.words), "seeds": [member.seed for member in mine]},
                    **{"checkpoint": checkpoint, "weights": weights, "crop_ratio": crop_ratio},
                    "usual_crop": crop_ratio == usual_crop(rows[0]["data"]),
                    **{name: spread([row[name] for row in rows]) for name in FIGURES},
                    "images": rows[0]["count"],
                }
            )
    return records


def measured(member: Member) -> dict[tuple[str, str, float], Record]:
    """The rows of one pipeline by checkpoint, weights and crop ratio; the newest ones."""
    rows = read_rows(Path(member.pipeline.evaluated) / EVAL_FILE)
    return {(row["checkpoint"], row["weights"], row["crop_ratio"]): row for row in rows}


def usual_crop(data: str) -> float:
    """The crop ratio that a data set is measured at by default."""
    return float(find_held_out(data).defaults["crop_ratio"])


def spread(values: Sequence[float]) -> Record:
    """Mean and sample standard deviation (none of a single value), with the values."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def print_table(records: Sequence[Record]) -> None:
    """Mean ± spread of the last checkpoints at the data set's own crop ratio."""
    rows = [each for each in records if each["usual_crop"] and each["checkpoint"] == "last"]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in rows[0]["point"] or {"options": ""}:
        table.add_column(name, justify="right", overflow="fold")
    for heading in ("seeds", *(heading for _, _, heading in SHOWN)):
        table.add_column(heading, justify="right", no_wrap=True)
    points: dict[tuple[str, ...], dict[str, Record]] = {}
    for each in rows:
        words = tuple(each["point"].values()) or ("as given",)
        points.setdefault(words, {})[each["weights"]] = each
    for words, by_weights in points.items():
        figures = [
            with_spread(by_weights[weights][figure], 4 if figure == "loss" else 2)
            for weights, figure, _ in SHOWN
        ]
        table.add_row(*words, str(len(by_weights["raw"]["seeds"])), *figures)
    images = rows[0]["images"]
    say_result(
        f"last checkpoint, crop ratio {rows[0]['crop_ratio']:g}, {images} held-out images; "
        "mean ± standard deviation over seeds"
    )
    console().print(table)
