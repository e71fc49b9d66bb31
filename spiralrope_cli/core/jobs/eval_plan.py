"""From what the user asks of `eval` to explicit rows, all checked before any worker starts."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from spiralrope_cli.core.config.datasets import DataSet, find_held_out
from spiralrope_cli.core.config.evals import (
    BOTH_CROP_RATIOS,
    EvalOptions,
    EvalProtocol,
    EvalRow,
    EvalRun,
)
from spiralrope_cli.core.config.models import is_dit
from spiralrope_cli.core.config.resolve import DATA_VARIABLE, RUNS_FOLDER, fit_channels
from spiralrope_cli.core.config.runs import MachineConfig, ModelConfig
from spiralrope_cli.core.errors import CheckpointError, ConfigError
from spiralrope_cli.core.hub.source import Source, find_source
from spiralrope_cli.core.jobs.start import at_size, described
from spiralrope_cli.core.weights import Weights, here, read_weights


def plan(
    options: EvalOptions, machine: MachineConfig, given: set[str]
) -> tuple[EvalRun, list[str]]:
    """All rows of an evaluation, and notes for the user.

    Args:
        options: what was asked for.
        machine: where it will run.
        given: names of the options that the user gave.

    Raises:
        CheckpointError: no weights there, or not a classifier's.
        ConfigError: an image size or data set that does not fit the weights.
        DataError: no such data set.
        FetchError: published weights that cannot be had.
    """
    notes: list[str] = []
    rows: list[EvalRow] = []
    found = functools.cache(find_held_out)
    for given_source in options.sources:
        for checkpoint, source in checkpoints(given_source, options, notes):
            sets = weight_sets(source, options, notes)
            for size, ratio in protocols(options):
                for weights in sets:
                    data_set = found(data_of(weights, options, notes))
                    rows.append(row(weights, checkpoint, data_set, size, ratio, options))
    if all(found(each.protocol.data).kind == "memory" for each in rows):
        notes += [
            f"--{name.replace('_', '-')} has no effect: {rows[0].protocol.data} lives in memory"
            for name in ("workers", "skip_bad")
            if name in given
        ]
    run = EvalRun(rows=tuple(rows), output=options.output, out=rows[0].folder, machine=machine)
    return run, list(dict.fromkeys(notes))


def checkpoints(given: str, options: EvalOptions, notes: list[str]) -> Iterator[tuple[str, Source]]:
    """The checkpoints of one source that are asked for: word and place."""
    last = find_source(given)
    is_run = last.run is not None and last.place != Path(given).expanduser().resolve()
    if not is_run:
        if options.every:
            notes.append(f"{given} has no best and last checkpoint: its own rows alone")
        elif options.best:
            notes.append(f"--best without effect: {given} has no best and last checkpoint")
        yield "", here(last)
    elif options.every:
        try:
            yield "best", find_source(given, best=True)
        except CheckpointError as error:
            notes.append(f"{error.message}: the rows of the last checkpoint alone")
        yield "last", last
    else:
        yield ("best", find_source(given, best=True)) if options.best else ("last", last)


def weight_sets(source: Source, options: EvalOptions, notes: list[str]) -> list[Weights]:
    """The sets of weights of one checkpoint that are asked for: raw, averaged, or both."""
    wanted = (False, True) if options.every else (options.ema,)
    sets = [read_weights(source, ema=ema, rope=options.rope) for ema in wanted]
    if len(sets) == 2 and (sets[0].file, sets[0].ema) == (sets[1].file, sets[1].ema):
        sets = sets[:1]
        notes.append(f"{source.given} holds one set of weights: no separate EMA rows")
    else:
        notes += [note for each in sets for note in each.notes]
    notes += [
        f"--{'rope' if name == 'enabled' else name.replace('_', '-')} has no effect: {why}"
        for name, why in sets[0].rope.inert_options(set(options.rope))
    ]
    return sets


def protocols(
    options: EvalOptions,
) -> list[tuple[tuple[int, int] | None, float | None]]:
    """Every pair of image size and crop ratio; None is the weights' or the data set's own."""
    ratios = BOTH_CROP_RATIOS if options.every else options.crop_ratios
    return [(size, ratio) for size in options.image_sizes or (None,) for ratio in ratios or (None,)]


def data_of(weights: Weights, options: EvalOptions, notes: list[str]) -> str:
    """Option, then the run's own, then the environment, then the bundled digits."""
    if options.data is not None:
        return options.data
    if own := weights.config.get("data"):
        return str(own)
    if variable := os.environ.get(DATA_VARIABLE):
        return variable
    notes.append(f"no --data and no {DATA_VARIABLE}: digits")
    return "digits"


def row(
    weights: Weights,
    checkpoint: str,
    data_set: DataSet,
    size: tuple[int, int] | None,
    ratio: float | None,
    options: EvalOptions,
) -> EvalRow:
    """One row, checked.

    Raises:
        CheckpointError: no classifier.
        ConfigError: other classes than the data set's, or a size that does not divide.
    """
    source, step = weights.source, None
    if is_dit(weights.arch):
        raise CheckpointError(
            f"{source.given} holds {weights.arch}, a diffusion transformer, and no classifier",
            "dit-sample draws images from it, and fid measures those",
        )
    trained = cast(ModelConfig, described(weights).model)
    if trained.num_classes != data_set.num_classes:
        raise ConfigError(
            f"{source.given} has {trained.num_classes} classes, {data_set.data} has "
            f"{data_set.num_classes}",
            "name the data set that it was trained on by --data",
        )
    size = size or trained.image_size
    placed = at_size(weights, size, options.rope)
    rows, columns = placed["pretrain_grid"] or trained.grid
    if source.run is not None and source.place is not None:
        step = int(source.place.name)
    return EvalRow(
        source=source.given,
        file=str(weights.file.resolve()),
        checkpoint=checkpoint,
        step=step,
        ema=weights.ema,
        arch=weights.arch,
        rope=placed["rope"],
        model=replace(trained, image_size=size, pretrain_grid=placed["pretrain_grid"]),
        trained_size=(rows * trained.patch_size, columns * trained.patch_size),
        protocol=EvalProtocol(
            data=data_set.data,
            num_val=data_set.num_val,
            image_size=size,
            in_chans=trained.in_chans,
            crop_ratio=ratio or data_set.defaults["crop_ratio"],
            **colours(weights, data_set.defaults, trained.in_chans),
        ),
        folder=str(folder_of(weights, options).resolve()),
    )


def colours(weights: Weights, defaults: dict[str, Any], in_chans: int) -> dict[str, Any]:
    """Mean and std that the weights were trained with, else the data set's."""
    known = {**defaults, **weights.config.get("augment", {})}
    values = {"mean": tuple(known["mean"]), "std": tuple(known["std"]), "in_chans": in_chans}
    fit_channels(values)
    return {name: values[name] for name in ("mean", "std")}


def folder_of(weights: Weights, options: EvalOptions) -> Path:
    """Where `eval.json` goes: beside the weights, but not into the cache of published ones."""
    source = weights.source
    if options.out is not None:
        return Path(options.out)
    if source.row is not None:
        return Path(RUNS_FOLDER) / f"eval-{source.row.name}"
    return source.run or weights.file.parent
