"""From the options of a sweep to its pipelines, all checked beforehand. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spiralrope_cli.core.config.pipelines import PRETRAIN, DeiTPipeline
from spiralrope_cli.core.config.resolve import RUNS_FOLDER, resolve
from spiralrope_cli.core.config.runs import ClassifierRun
from spiralrope_cli.core.config.sweeps import Member, Point, Sweep, acting
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.jobs.pipeline_plan import deit_pipeline


def deit_sweep(
    options: dict[str, Any],
    grid: Sequence[Point],
    seeds: Sequence[int],
    stages: tuple[str, ...],
    *,
    finetune: bool,
) -> Sweep:
    """One pipeline for every different point and seed.

    A seed decides data order and augmentation, which all points share, and initial weights, which
    those of one architecture share: RoPE has no parameters.

    Args:
        options: field name -> value, given options alone.
        grid: from `points`.
        seeds: of every point; empty for the one that a single pipeline would have.
        stages: from `deit_stages`.
        finetune: whether there is a second training, now or before.

    Raises:
        ConfigError: a point that cannot work, or an option that is swept and given.
    """
    given = dict(options)
    out, name = given.pop("out", None), given.pop("name", None)
    for name_swept, _ in grid[0].words:
        if {"rope": "enabled"}.get(name_swept, name_swept) in given:
            raise ConfigError(
                f"--{name_swept.replace('_', '-')} is given and swept", "leave one of them out"
            )
    if seeds and "seed" in given:
        raise ConfigError("--seed and --seeds exclude each other", "use --seeds alone")
    first = resolve(PRETRAIN, {**given, **dict(grid[0].options)}).run
    folder = Path(out) if out else Path(RUNS_FOLDER) / _name(first, name)
    members: list[Member] = []
    swept = {value for point in grid for field, value in point.options if field == "rotate"}
    notes = ["rotate=0 and rotate=1 are both plain axial RoPE"] if {0, 1} <= swept else []
    seen: dict[Any, Point] = {}
    for point in grid:
        for seed in seeds or [first.seed]:
            chosen = {**given, **dict(point.options), "seed": seed}
            place = folder / f"{point.slug}-seed{seed}"
            try:
                pipeline = deit_pipeline({**chosen, "out": str(place)}, stages, finetune=finetune)
            except ConfigError as error:
                raise ConfigError(f"{point.label}: {error.message}", error.hint) from error
            key = (seed, *_computed(pipeline))
            if (same := seen.setdefault(key, point)) is point:
                members.append(Member(point=point, seed=seed, pipeline=pipeline))
            else:
                notes.append(f"{point.label} is the same as {same.label}, and runs once")
    return Sweep(folder=str(folder), members=tuple(members), notes=tuple(dict.fromkeys(notes)))


def _name(run: ClassifierRun, name: str | None) -> str:
    parts = ["sweep-deit", run.arch, Path(run.data).name, *([name] if name else [])]
    return re.sub(r"[^\w.-]+", "-", "-".join(parts))


def _computed(pipeline: DeiTPipeline) -> list[Any]:
    """Equal for pipelines that compute the same, whatever their folders and idle options."""
    runs = [resolved.run for resolved in pipeline.trainings]
    return [replace(run, out="", source="", rope=acting(run.rope)) for run in runs] or [
        pipeline.evaluated
    ]
