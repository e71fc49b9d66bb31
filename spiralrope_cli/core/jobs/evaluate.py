"""`eval`: accuracy of weights on held-out images, one pass over the images for each protocol.

From the options to explicit rows, all checked (`settle`); what the user should know of them
(`plan`); every worker's part (`work`); a table, JSON or CSV, `eval.json` and a plot (`report`).
What loads torch is imported where it is needed: a refusal comes without it.
"""

from __future__ import annotations

import json
import os
import sys
from collections import ChainMap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spiralrope_cli.core.config.datasets import BUILT_IN, DataSet, find_held_out
from spiralrope_cli.core.config.evals import BOTH_CROP_RATIOS, EvalOptions, EvalRow, EvalRun
from spiralrope_cli.core.config.models import is_dit
from spiralrope_cli.core.config.nested import build
from spiralrope_cli.core.config.option import idle_lines
from spiralrope_cli.core.config.resolve import DATA_VARIABLE, RUNS_FOLDER
from spiralrope_cli.core.config.rope import RopeConfig, given_rope
from spiralrope_cli.core.config.runs import EvalProtocol, ModelConfig
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.errors import CheckpointError, ConfigError
from spiralrope_cli.core.hub.files import sha256_of
from spiralrope_cli.core.hub.source import Source, find_source, newest_run
from spiralrope_cli.core.plots.curves import sizes
from spiralrope_cli.core.plots.style import save
from spiralrope_cli.core.runtime.launch import is_first_process, launch
from spiralrope_cli.core.runtime.progress import counted, say, say_unreadable
from spiralrope_cli.core.runtime.run_folder import EVAL_FILE, SIZES_FILE, read_rows

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spiralrope_cli.core.data.batches import ValidationImages
    from spiralrope_cli.core.metrics.accuracy import Accuracy, Record
    from spiralrope_cli.core.runtime.distributed import DistContext
    from spiralrope_cli.core.weights import Weights

JOB = "spiralrope_cli.core.jobs.evaluate:work"


def evaluate(given: dict[str, Any]) -> None:
    """Measures what the user named, or else the newest run.

    Args:
        given: field name -> value of the options that the user gave.
    """
    machine: MachineConfig = build(MachineConfig, given)
    options: EvalOptions = build(EvalOptions, {**given, "rope": given_rope(given)})
    if not options.sources:
        options = replace(options, sources=(str(newest_run()),))
        if is_first_process():
            say(f"newest run: {options.sources[0]}")
    run, notes = settle(options, machine, set(given))
    plan(notes)
    launch(JOB, run)


# ---- settle
def settle(
    options: EvalOptions, machine: MachineConfig, given: set[str]
) -> tuple[EvalRun, list[str]]:
    """All rows of an evaluation, and notes for the user.

    Args:
        options: what was asked for, with sources.
        machine: where it will run.
        given: names of the options that the user gave.

    Raises:
        CheckpointError: no weights there, or not a classifier's.
        ConfigError: an image size or data set that does not fit the weights.
        DataError: no such data set.
        FetchError: published weights that cannot be had.
    """
    sources = [find_source(each, best=options.best) for each in options.sources]
    data_set = None if options.data is None else find_held_out(options.data)
    notes: list[str] = []
    idle = {"ema": "--ema", "best": "--best", "crop_ratios": "--crop-ratio"}
    if options.every and (names := [word for name, word in idle.items() if name in given]):
        notes.append(f"{', '.join(names)} without effect: --all has all of those rows")
    rows: list[EvalRow] = []
    held_out = cache(find_held_out)
    ratios = BOTH_CROP_RATIOS if options.every else dict.fromkeys(options.crop_ratios) or (None,)
    for each in sources:
        for checkpoint, source in checkpoints(each, options, notes):
            sets = [
                (weights, data_set or held_out(data_of(weights, notes)))
                for weights in weight_sets(source, options, notes)
            ]
            rows += [
                settled_row(weights, checkpoint, data, size, ratio, options)
                for size in dict.fromkeys(options.image_sizes) or (None,)
                for ratio in ratios
                for weights, data in sets
            ]
    if all(each.protocol.data in BUILT_IN for each in rows):
        inert = BUILT_IN[rows[0].protocol.data].inert_options()
        notes += idle_lines(MachineConfig, inert, given)
    run = EvalRun(rows=tuple(rows), output=options.output, out=rows[0].folder, machine=machine)
    return run, list(dict.fromkeys(notes))


def checkpoints(
    source: Source, options: EvalOptions, notes: list[str]
) -> Iterator[tuple[str, Source]]:
    """The checkpoints of one source that are asked for: word and place."""
    from spiralrope_cli.core.weights import here

    given = source.given
    if source.run is None or source.place == Path(given).expanduser().resolve():
        if options.every:
            notes.append(f"{given} has no best and last checkpoint: its own rows alone")
        elif options.best:
            notes.append(f"--best without effect: {given} has no best and last checkpoint")
        yield "", here(source)
    elif options.every:
        try:
            yield "best", find_source(given, best=True)
        except CheckpointError as error:
            notes.append(f"{error.message}: the rows of the last checkpoint alone")
        yield "last", find_source(given)
    else:
        yield "best" if options.best else "last", source


def weight_sets(source: Source, options: EvalOptions, notes: list[str]) -> list[Weights]:
    """The sets of weights of one checkpoint that are asked for: raw, averaged, or both."""
    from spiralrope_cli.core.weights import read_weights

    wanted = (False, True) if options.every else (options.ema,)
    sets = [read_weights(source, ema=ema, rope=options.rope) for ema in wanted]
    if len(sets) == 2 and (sets[0].file, sets[0].ema) == (sets[1].file, sets[1].ema):
        sets = sets[:1]
        notes.append(f"{source.given} holds one set of weights: no separate EMA rows")
    else:
        notes += [note for each in sets for note in each.notes]
    chosen = set(options.rope)
    notes += idle_lines(RopeConfig, sets[0].rope.inert_options(chosen), chosen)
    return sets


def data_of(weights: Weights, notes: list[str]) -> str:
    """Without `--data`: the run's own, then the environment, then the bundled digits."""
    if named := weights.config.get("data") or os.environ.get(DATA_VARIABLE):
        return str(named)
    notes.append(f"no --data and no {DATA_VARIABLE}: digits")
    return "digits"


def settled_row(
    weights: Weights,
    checkpoint: str,
    data_set: DataSet,
    size: tuple[int, int] | None,
    ratio: float | None,
    options: EvalOptions,
) -> EvalRow:
    """One row, checked; without size and ratio, those of the weights and of the data set."""
    from spiralrope_cli.core.load import at_size
    from spiralrope_cli.core.weights import mean_std

    source = weights.source
    if is_dit(weights.arch):
        raise CheckpointError(
            f"{source.given} holds {weights.arch}, a diffusion transformer, and no classifier",
            "dit-sample draws images from it, and fid measures those",
        )
    trained = ModelConfig(drop_path=0.0, **weights.options)
    if trained.num_classes != data_set.num_classes:
        raise ConfigError(
            f"{source.given} has {trained.num_classes} classes, {data_set.data} has "
            f"{data_set.num_classes}",
            "name the data set that it was trained on by --data",
        )
    size = size or trained.image_size
    placed = at_size(weights, size, options.rope)
    rows, columns = placed["pretrain_grid"] or trained.grid
    # Beside the weights, but not into the cache of published ones.
    beside = Path(RUNS_FOLDER) / f"eval-{source.row.name}" if source.row else source.run
    folder = Path(options.out or beside or weights.file.parent)
    return EvalRow(
        source=source.given,
        file=str(weights.file.resolve()),
        checkpoint=checkpoint,
        step=int(source.place.name) if source.run and source.place else None,
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
            **mean_std(weights, data_set.defaults, trained.in_chans),
        ),
        folder=str(folder.resolve()),
    )


# ---- plan
def plan(notes: Sequence[str]) -> None:
    """What the user should know before it starts, from the process that speaks for all."""
    if is_first_process():
        for note in notes:
            say(f"note: {note}")


# ---- work
def work(config: EvalRun) -> None:
    """Measures all rows and reports them from the first process; executed by every worker.

    Raises:
        CheckpointError: weights that do not fit, or that are gone since they were looked at.
        DataError: the data set is missing or damaged.
    """
    import torch

    from spiralrope_cli.core.data.batches import ValidationImages
    from spiralrope_cli.core.runtime import distributed
    from spiralrope_cli.core.runtime.distributed import open_context

    machine = config.machine
    with open_context(machine, None) as ctx:
        if len(set(distributed.all_gather_object(config.rows))) > 1:
            raise CheckpointError(
                "the machines see different weights or data sets",
                "sources and --data must lie in folders that all of them share",
            )
        figures: dict[EvalRow, Accuracy] = {}
        bad: dict[str, str] = {}
        decoded = 0
        for protocol in dict.fromkeys(row.protocol for row in config.rows):
            rows = [row for row in config.rows if row.protocol == protocol]
            images = ValidationImages(protocol, machine, ctx.device, ctx.rank, ctx.world_size)
            figures.update(measure(rows, images, ctx))
            decoded += images.decoded
            bad.update(images.bad.reasons)
        decoded = int(distributed.all_reduce_sum(torch.tensor(decoded, device=ctx.device)).item())
        unreadable = distributed.all_gather_object(bad)
        if ctx.is_first:
            say_unreadable(dict(ChainMap(*unreadable)))
            report(config, [figures[row] for row in config.rows], decoded, ctx)


def measure(
    rows: list[EvalRow], images: ValidationImages, ctx: DistContext
) -> dict[EvalRow, Accuracy]:
    """Figures of rows of one protocol, in one pass; equal networks are asked once."""
    from spiralrope_cli.core import load
    from spiralrope_cli.core.metrics import accuracy
    from spiralrope_cli.core.runtime.device import autocast
    from spiralrope_cli.core.weights import read_weights

    by_network = {row.network: row for row in rows}
    models: dict[str, nn.Module] = {}
    for number, row in enumerate(by_network.values()):
        source, size = Source(row.source, Path(row.file)), row.model.image_size
        weights = read_weights(source, ema=row.ema, rope=asdict(row.rope))
        grid = row.model.pretrain_grid
        models[str(number)] = load.build(weights, ctx.device, image_size=size, pretrain_grid=grid)
        if images.machine.compile:
            models[str(number)].compile()
    protocol, in_precision = images.protocol, partial(autocast, ctx.device, ctx.dtype)
    what = f"{Path(protocol.data).name} at {accuracy.size_words(protocol.image_size)} px"
    what += f", crop ratio {protocol.crop_ratio:g}, {len(models)} network(s), images"
    with counted(what, protocol.num_val, shown=ctx.is_first) as advance:

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for pixels, labels in images.batches():
                yield pixels, labels
                advance(len(labels) * ctx.world_size)  # the others are as far

        found = accuracy.evaluate(models, batches(), ctx.device, in_precision)
    of_network = dict(zip(by_network, found.values(), strict=True))
    return {row: of_network[row.network] for row in rows}


# ---- report
def report(config: EvalRun, figures: list[Accuracy], decoded: int, ctx: DistContext) -> None:
    """Writes and prints everything, from the first process alone."""
    from spiralrope_cli.core.metrics import accuracy
    from spiralrope_cli.core.report.page import is_stage, leave_report
    from spiralrope_cli.core.runtime.device import PRECISIONS, versions

    rows: list[Record] = [
        {
            **described_row(row),
            **asdict(found),
            "precision": PRECISIONS[ctx.dtype],
            "device": ctx.device.type,
            "processes": ctx.world_size,
            "versions": versions(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        for row, found in zip(config.rows, figures, strict=True)
    ]
    folders: dict[Path, list[Record]] = {}
    for row, each in zip(config.rows, rows, strict=True):
        folders.setdefault(Path(row.folder), []).append(each)
    for folder, mine in folders.items():
        write(folder, mine, decoded)
    say(f"decoded {decoded} images for {len(rows)} row(s)")
    if config.output == "json":
        sys.stdout.write(json.dumps({"decoded": decoded, "rows": rows}, indent=2) + "\n")
    elif config.output == "csv":
        accuracy.print_csv(rows)
    else:
        accuracy.print_table(rows)
    for folder in filter(is_stage, folders):
        leave_report(folder)


def write(folder: Path, rows: list[Record], decoded: int) -> None:
    """Merges rows into a folder's `eval.json`, and draws accuracy over image sizes."""
    from spiralrope_cli.core.metrics import accuracy

    path = folder / EVAL_FILE
    try:
        accuracy.add_rows(path, rows, decoded)
        say(f"figures: {path}")
        if len({tuple(row["image_size"]) for row in rows}) > 1:
            save(sizes(rows), folder / SIZES_FILE)
            say(f"plot: {folder / SIZES_FILE}")
    except OSError as error:
        say(f"note: {path} was not written: {error.strerror or error}; --out names a folder")


def is_measured(config: EvalRun, *, show: bool = False) -> bool:
    """Whether `eval.json` has figures of all rows, of these very weights; shows them if asked."""
    from spiralrope_cli.core.metrics import accuracy
    from spiralrope_cli.core.runtime.device import PRECISIONS, pick_device, pick_precision

    device = pick_device(config.machine)
    precision = PRECISIONS[pick_precision(config.machine.precision, device)[0]]
    rows = []
    for row in config.rows:
        now = {**described_row(row), "precision": precision}
        there = read_rows(Path(row.folder) / EVAL_FILE)
        if not (same := [old for old in there if accuracy.is_same(old, now)]):
            return False
        rows.append({**same[0], **now})
    if show and is_first_process():
        accuracy.print_table(rows)
    return True


def described_row(row: EvalRow) -> Record:
    """What a row of `eval.json` says before its figures, as plain values."""
    return {
        "source": row.source,
        "checkpoint": row.checkpoint,
        "step": row.step,
        "weights": row.weights,
        "file": row.file,
        "sha256": sha256(row.file),
        "arch": row.arch,
        "rope": asdict(row.rope),
        "trained_size": list(row.trained_size),
        "data": row.protocol.data,
        "image_size": list(row.protocol.image_size),
        "crop_ratio": row.protocol.crop_ratio,
        "interpolation": "bicubic",
        "mean": list(row.protocol.mean),
        "std": list(row.protocol.std),
    }


@cache
def sha256(file: str) -> str:
    """Digest of a whole file, read piece by piece, once for all rows."""
    return sha256_of(Path(file))
