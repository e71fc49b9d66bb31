"""A grid of classifier pipelines, one after the other, and one table of all.

No torch at module level: all pipelines are settled, and checked, before the first one starts.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from spiralrope_cli.core.config.datasets import find_held_out
from spiralrope_cli.core.config.nested import build
from spiralrope_cli.core.config.option import leaves
from spiralrope_cli.core.config.pipelines import (
    KINDS,
    PRETRAIN,
    DeiTStages,
    Member,
    Pipeline,
    Point,
    Sweep,
    acting,
    of_training,
    points,
)
from spiralrope_cli.core.config.resolve import RUNS_FOLDER, resolve
from spiralrope_cli.core.config.training import TrainOptions
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.jobs.pipeline import carry_out, settle_deit
from spiralrope_cli.core.report.results import with_spread
from spiralrope_cli.core.runtime.progress import console, say, say_result
from spiralrope_cli.core.runtime.run_folder import (
    EVAL_FILE,
    REPORT_FILE,
    SWEEP_FILE,
    read_rows,
    write_json,
)

FIGURES = ("acc1", "acc5", "loss")
SHOWN = (("raw", "acc1", "acc@1 %"), ("EMA", "acc1", "acc@1 % EMA"), ("EMA", "loss", "loss EMA"))
"""Weights, figure and heading of the table's columns; all of the last checkpoint: the best one was
chosen by the very images that it is measured on."""

Record = dict[str, Any]


# ---- settle
def settle_sweep(given: dict[str, Any]) -> Sweep:
    """One pipeline for every different point and seed.

    A seed decides data order and augmentation, which all points share, and initial weights, which
    those of one architecture share: RoPE has no parameters.

    Args:
        given: field name -> value of the options that the user gave.

    Raises:
        ConfigError: a point that cannot work, or an option that is swept and given.
    """
    own: DeiTStages = build(DeiTStages, given)
    build(TrainOptions, given).check_folder(own.out)
    grid = points(own.sweep)
    for name, _ in grid[0].words:
        if {"rope": "enabled"}.get(name, name) in given:
            word = leaves(DeiTStages).get(name, KINDS[name]).called
            raise ConfigError(f"{word} is given and swept", "leave one of them out")
    if own.seeds and "seed" in given:
        raise ConfigError("--seed and --seeds exclude each other", "use --seeds alone")
    common = {n: v for n, v in given.items() if n not in ("sweep", "seeds", "name", "out")}
    first = resolve(PRETRAIN, {**of_training(common, DeiTStages), **dict(grid[0].options)}).run
    words = ["sweep-deit", first.arch, Path(first.data).name, *filter(None, [given.get("name")])]
    folder = (
        Path(own.out) if own.out else Path(RUNS_FOLDER) / re.sub(r"[^\w.-]+", "-", "-".join(words))
    )
    members: list[Member] = []
    swept = {value for point in grid for field, value in point.options if field == "rotate"}
    notes = ["rotate=0 and rotate=1 are both plain axial RoPE"] if {0, 1} <= swept else []
    seen: dict[Any, Point] = {}
    for point in grid:
        for seed in own.seeds or (first.seed,):
            place = str(folder / f"{point.slug}-seed{seed}")
            try:
                pipeline = settle_deit(
                    {**common, **dict(point.options), "seed": seed, "out": place}
                )
            except ConfigError as error:
                raise ConfigError(f"{point.label}: {error.message}", error.hint) from error
            key = (seed, *computed(pipeline))
            if (same := seen.setdefault(key, point)) is point:
                members.append(Member(point, seed, pipeline))
            else:
                notes.append(f"{point.label} is the same as {same.label}, and runs once")
    return Sweep(str(folder), tuple(members), tuple(dict.fromkeys(notes)))


def computed(pipeline: Pipeline) -> list[Any]:
    """Equal for pipelines that compute the same, whatever their folders and idle options."""
    *trainings, evaluation = pipeline.stages
    runs = [stage.config.run for stage in trainings]
    return [replace(run, out="", source="", rope=acting(run.rope)) for run in runs] or [
        evaluation.folder
    ]


# ---- plan and work
def run_sweep(given: dict[str, Any]) -> None:
    """Runs what is missing of the grid, then shows all of it; or prints plans alone.

    Raises:
        SpiralRopeError: a member failed; the same command goes on with it.
    """
    sweep, dry_run = settle_sweep(given), given.get("dry_run", False)
    for note in sweep.notes:
        say(f"note: {note}")
    for number, member in enumerate(sweep.members, 1):
        say(f"== {number}/{len(sweep.members)}: {member.point.label}, seed {member.seed}")
        if dry_run and number > 1:
            say(f" as the first one, into {member.pipeline.folder}")
        else:
            carry_out(member.pipeline, dry_run=dry_run, show=False)
    if not dry_run:
        report(sweep)


# ---- report
def report(sweep: Sweep) -> None:
    """Figures of all members as a file, a table and a page."""
    from spiralrope_cli.core.report.page import leave_report

    folder, records = Path(sweep.folder), summary(sweep.members)
    write_json(folder / SWEEP_FILE, {"rows": records})
    print_table(records)
    say(f"figures: {folder / SWEEP_FILE}")
    leave_report(folder)
    say(f"report: {folder / REPORT_FILE}")


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
                    "usual_crop": crop_ratio
                    == find_held_out(rows[0]["data"]).defaults["crop_ratio"],
                    **{name: spread([row[name] for row in rows]) for name in FIGURES},
                    "images": rows[0]["count"],
                }
            )
    return records


def measured(member: Member) -> dict[tuple[str, str, float], Record]:
    """The rows of one pipeline by checkpoint, weights and crop ratio; the newest ones."""
    rows = read_rows(Path(member.pipeline.stages[-1].folder) / EVAL_FILE)
    return {(row["checkpoint"], row["weights"], row["crop_ratio"]): row for row in rows}


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
