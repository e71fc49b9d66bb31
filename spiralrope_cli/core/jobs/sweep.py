"""`run deit` and `run dit` with `--sweep`: pipelines one after the other, and one table.

All pipelines are checked before the first one starts. No torch at module level.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from spiralrope_cli.core.config.datasets import slug_of
from spiralrope_cli.core.config.fid import FID_METRICS
from spiralrope_cli.core.config.models import RopeConfig
from spiralrope_cli.core.config.option import build, leaves
from spiralrope_cli.core.config.pipelines import DeiTStages, DiTStages
from spiralrope_cli.core.config.recipes import with_micro_batch
from spiralrope_cli.core.config.sweeps import RENAMED, SWEPT, Point, points
from spiralrope_cli.core.config.training import TrainOptions
from spiralrope_cli.core.data.splits import find_val_set
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.jobs.pipeline import (
    Pipeline,
    Stage,
    run_stages,
    settle_deit,
    settle_dit,
    training_options,
)
from spiralrope_cli.core.report.results import (
    Record,
    Result,
    of_points,
    of_sweep,
    print_table,
)
from spiralrope_cli.core.resolve import Resolved, named_folder, resolve
from spiralrope_cli.core.runtime.launch import say_notes
from spiralrope_cli.core.runtime.progress import read_metrics, say, say_result
from spiralrope_cli.core.runtime.run_folder import (
    first_step,
    is_finished,
    read_json,
    read_rows,
    write_json,
)
from spiralrope_cli.core.runtime.slurm import Remaining
from spiralrope_cli.core.storage import EVAL_FILE, FID_FILE, NPZ_FILE, REPORT_FILE, SWEEP_FILE

METRICS = ("acc1", "acc5", "loss")
COLUMNS = (("acc@1 %", "acc1", 2), ("acc@1 % EMA", "ema_acc1", 2), ("loss EMA", "ema_loss", 4))
"""(heading, metric, decimals) of the columns. All are of the last checkpoint: the best one was
chosen on the same validation images, so its accuracy is biased."""

REPLACED = ("--sweep", "--seeds", "--name", "--out", "--rotate")
"""Options of a sweep that its points have in another way, or not at all."""


@dataclass(frozen=True)
class SweepRun:
    """One pipeline of a sweep."""

    point: Point
    seed: int
    pipeline: Pipeline
    words: tuple[str, ...]  # of its command line, in place of `REPLACED`


@dataclass(frozen=True)
class Sweep:
    """Runs in order (all seeds of a point together), and notes on equal points."""

    folder: str
    runs: tuple[SweepRun, ...]
    notes: tuple[str, ...]


# ---- settle
def settle_sweep(kind: str, given: dict[str, Any]) -> Sweep:
    """One pipeline of a kind, `deit` or `dit`, per distinct point and seed.

    With the same seed all points have the same data order, augmentation and noise. Points of one
    architecture also have the same initial weights, learned frequencies apart. Images are sampled
    from the same noise for all seeds.
    """
    stages, training = (DeiTStages, "pretrain") if kind == "deit" else (DiTStages, "dit-train")
    own: DeiTStages | DiTStages = build(stages, given)
    build(TrainOptions, given).check_folder(own.out, "the folder of a sweep")
    grid, swept = points(own.sweep, kind), SWEPT[kind]
    for typed, _ in grid[0].words:
        name = RENAMED.get(typed, typed)
        if {"rope": "enabled"}.get(name, name) in given:
            word = leaves(stages).get(name, swept[name]).called
            raise ConfigError(f"{word} is given twice, also in --sweep", "leave one of them out")
    if own.seeds and "seed" in given:
        raise ConfigError("--seed and --seeds exclude each other", "use only --seeds")
    common = {n: v for n, v in given.items() if n not in ("sweep", "seeds", "name", "out")}
    # For the name of the folder; what does not fit is said below, with its point.
    any_kind = {**grid[0].options, "rotate": 0}
    first = resolve(training, training_options(common, stages) | any_kind).run
    usual = named_folder(f"sweep-{kind}", first.arch, slug_of(first.data), given.get("name", ""))
    folder = Path(own.out or usual)
    runs: list[SweepRun] = []
    rotates = {point.options.get("rotate") for point in grid}
    notes = [
        f"--sweep {name} is now {RENAMED[name]}" for name, _ in grid[0].words if name in RENAMED
    ]
    notes += ["rotate=0 and rotate=1 are both plain axial RoPE"] if {0, 1} <= rotates else []
    seen: dict[Any, Point] = {}
    for point, seed in itertools.product(grid, own.seeds or (first.seed,)):
        out = str(folder / f"{point.slug}-seed{seed}")
        values = {**common, **point.options, "seed": seed, "out": out}
        if point.options.get("rope_kind", "spiral") != "spiral" and "rotate" not in point.options:
            values.pop("rotate", None)  # that of the points of kind spiral
        try:
            if kind == "deit":
                pipeline = settle_deit(values, show_measured=False)
            else:
                pipeline = settle_dit(values)
        except ConfigError as error:
            raise ConfigError(f"{point}: {error.message}", error.hint) from error
        known = {opt.name: opt for opt in swept.values()} | leaves(stages)
        own_values = {name: values[name] for name in (*point.options, "rotate") if name in values}
        words = [word for name, value in own_values.items() for word in known[name].typed(value)]
        same = seen.setdefault((seed, *computed(pipeline)), point)
        if same is point:
            where = ("--seed", str(seed), "--out", out)
            runs.append(SweepRun(point, seed, pipeline, (*words, *where)))
        else:
            notes.append(f"{point} is the same as {same}, and runs once")
    return Sweep(str(folder), tuple(runs), tuple(dict.fromkeys(notes)))


def computed(pipeline: Pipeline) -> list[Any]:
    """A key that is equal for pipelines with equal results: no folders, no inert options."""
    runs = [stage.config.run for stage in pipeline.stages if isinstance(stage.config, Resolved)]
    # A found micro-batch is known only where a folder has begun.
    runs = [with_micro_batch(run, None) for run in runs]
    return [replace(run, out="", source="", rope=acting(run.rope)) for run in runs] or [
        pipeline.stages[-1].folder
    ]


def acting(rope: RopeConfig) -> RopeConfig:
    """RoPE options with inert ones set to their defaults, so that equal networks compare equal."""
    if not rope.enabled:
        return RopeConfig(enabled=False)
    if rope.rope_kind == "axial":
        rope = replace(rope, rope_kind="spiral")
    plain, names = RopeConfig(), {field.name for field in fields(rope)}
    return replace(rope, **{name: getattr(plain, name) for name, _ in rope.inert_options(names)})


# ---- plan and work
def run_sweep(kind: str, given: dict[str, Any]) -> Remaining:
    """Runs the unfinished pipelines, then reports all; or only prints plans."""
    sweep, dry_run = settle_sweep(kind, given), given.get("dry_run", False)
    say_notes(sweep.notes)
    for number, run in enumerate(sweep.runs, 1):
        say(f"== {number}/{len(sweep.runs)}: {run.point}, seed {run.seed}")
        if dry_run and number > 1:
            say(f" same plan, in {run.pipeline.folder}")
        else:
            run_stages(run.pipeline, dry_run=dry_run)
    if not dry_run:
        report(sweep)
    waiting = [
        run.words for run in sweep.runs if dry_run and not all(map(is_done, run.pipeline.stages))
    ]
    return Remaining(sweep.folder, waiting, REPLACED)


def is_done(stage: Stage) -> bool:
    """Whether a stage is finished, if those before it are."""
    if isinstance(stage.config, Resolved):
        return is_finished(stage.config.run, first_step(stage.config.run))
    if stage.name == "dit-sample":
        return (Path(stage.folder) / NPZ_FILE).exists()
    return stage.job(stage.config, dry_run=True)


# ---- report
def report(sweep: Sweep) -> None:
    """Writes and prints the metrics of all runs."""
    from spiralrope_cli.core.report.page import leave_report

    folder, drawn = Path(sweep.folder), sweep.runs[0].point.kind == "dit"
    records = drawn_summary(sweep.runs) if drawn else summary(sweep.runs)
    write_json(folder / SWEEP_FILE, {"rows": records})
    last = of_sweep(records) if drawn else of_last(records)
    say_result(last.caption)
    print_table(last)
    say(f"metrics: {folder / SWEEP_FILE}")
    leave_report(folder)
    say(f"report: {folder / REPORT_FILE}")


def summary(runs: Sequence[SweepRun]) -> list[Record]:
    """One row per point, weights and crop ratio: mean and standard deviation over seeds."""
    records = []
    for point in dict.fromkeys(run.point for run in runs):
        of_point = [run for run in runs if run.point == point]
        by_seed = [measured(run) for run in of_point]
        for key in by_seed[0]:
            rows = [rows[key] for rows in by_seed]
            checkpoint, weights, crop_ratio = key
            usual = find_val_set(rows[0]["data"]).defaults["crop_ratio"]
            records.append(
                {
                    "point": dict(point.words),
                    "seeds": [run.seed for run in of_point],
                    "checkpoint": checkpoint,
                    "weights": weights,
                    "crop_ratio": crop_ratio,
                    "usual_crop": crop_ratio == usual,
                    **{name: spread([row[name] for row in rows]) for name in METRICS},
                    "images": rows[0]["count"],
                }
            )
    return records


def drawn_summary(runs: Sequence[SweepRun]) -> list[Record]:
    """One row per point of `run dit`: mean and standard deviation over seeds."""
    records = []
    for point in dict.fromkeys(run.point for run in runs):
        of_point = [run for run in runs if run.point == point]
        _, sampling, *scoring = of_point[0].pipeline.stages
        logs = [read_metrics(Path(run.pipeline.stages[0].folder)) for run in of_point]
        losses = [[line["loss"] for line in lines if "loss" in line][-1] for lines in logs]
        scores = [read_json(Path(run.pipeline.folder) / FID_FILE) for run in of_point if scoring]
        found: dict[str, list[Any]] = {
            name: [each.get(name) for each in scores] for name in FID_METRICS
        }
        records.append(
            {
                "point": dict(point.words),
                "seeds": [run.seed for run in of_point],
                "weights": "EMA",
                "images": sampling.config["num_samples"],
                "training_loss": spread(losses),
                **{n: spread(each) for n, each in found.items() if each and None not in each},
            }
        )
    return records


def measured(run: SweepRun) -> dict[tuple[str, str, float], Record]:
    """The rows of one pipeline, by (checkpoint, weights, crop ratio)."""
    rows = read_rows(Path(run.pipeline.stages[-1].folder) / EVAL_FILE)
    return {(row["checkpoint"], row["weights"], row["crop_ratio"]): row for row in rows}


def spread(values: Sequence[float]) -> Record:
    """Mean, sample standard deviation (None for a single value), and the values."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def of_last(records: Sequence[Record]) -> Result:
    """Table of the last checkpoints, at the default crop ratio."""
    last = [each for each in records if each["usual_crop"] and each["checkpoint"] == "last"]
    raw, ema = ([each for each in last if each["weights"] == kind] for kind in ("raw", "EMA"))
    both = [
        {**one, "ema_acc1": other["acc1"], "ema_loss": other["loss"]}
        for one, other in zip(raw, ema, strict=True)
    ]
    first = raw[0]
    caption = (
        f"last checkpoint, crop ratio {first['crop_ratio']:g}, {first['images']} validation images"
    )
    return of_points(both, COLUMNS, caption)
