"""`eval`: accuracy on the validation images, with one pass over the images per protocol.

Torch is imported late, so that usage errors are fast.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import ChainMap
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spiralrope_cli.core.config.datasets import BUILT_IN, DataSet, EvalProtocol, slug_of
from spiralrope_cli.core.config.evals import BOTH_CROP_RATIOS, EvalOptions, EvalRow, EvalRun
from spiralrope_cli.core.config.models import RopeConfig, format_size, given_rope
from spiralrope_cli.core.config.option import build, idle_lines
from spiralrope_cli.core.config.runs import ModelConfig
from spiralrope_cli.core.config.training import RUNS_FOLDER, MachineConfig
from spiralrope_cli.core.data.classes import classes_of, real_images
from spiralrope_cli.core.data.splits import find_val_set
from spiralrope_cli.core.errors import CheckpointError
from spiralrope_cli.core.hub.source import Source, find_source, newest_run
from spiralrope_cli.core.plots.curves import save_figure, sizes_figure
from spiralrope_cli.core.report.results import Record, print_evaluation
from spiralrope_cli.core.resolve import DATA_VARIABLE
from spiralrope_cli.core.runtime.launch import is_first_process, launch, say_notes
from spiralrope_cli.core.runtime.progress import counted, say, say_unreadable
from spiralrope_cli.core.runtime.run_folder import add_rows, is_same, read_rows
from spiralrope_cli.core.runtime.slurm import Remaining
from spiralrope_cli.core.storage import EVAL_FILE, SIZES_FILE, sha256_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spiralrope_cli.core.data.batches import ValidationImages
    from spiralrope_cli.core.runtime.distributed import DistContext
    from spiralrope_cli.core.training.classification import Accuracy
    from spiralrope_cli.core.weights import Weights


digest_of_file = cache(sha256_of)  # a large file has several rows


def evaluate(given: dict[str, Any]) -> Remaining:
    """Evaluates the given sources, or the newest run; `given` is field name -> value."""
    machine: MachineConfig = build(MachineConfig, given)
    options: EvalOptions = build(EvalOptions, {**given, "rope": given_rope(given)})
    if not options.sources:
        options = replace(options, sources=(str(newest_run()),))
        if is_first_process():
            say(f"newest run: {options.sources[0]}")
    run, notes = settle(options, machine, set(given))
    say_notes(notes)
    for row in run.rows if options.dry_run else ():
        plan(row)
    if not options.dry_run:
        launch(work, run)
    return Remaining(run.out, (() if given.get("sources") else options.sources,))


# ---- settle
def settle(
    options: EvalOptions, machine: MachineConfig, given: set[str]
) -> tuple[EvalRun, list[str]]:
    """All rows of an evaluation, and notes for the user; `given` are the names of given options."""
    sources = [find_source(each, best=options.best) for each in options.sources]
    chosen = None if options.data is None else find_val_set(options.data)
    find = cache(find_val_set)  # it counts the files of a folder
    notes: list[str] = []
    idle = {"ema": "--ema", "best": "--best", "crop_ratios": "--crop-ratio"}
    if options.every and (names := [word for name, word in idle.items() if name in given]):
        notes.append(f"{', '.join(names)} without effect: --all includes all of these rows")
    ratios = BOTH_CROP_RATIOS if options.every else dict.fromkeys(options.crop_ratios) or (None,)
    rows: list[EvalRow] = []
    for each in sources:
        for checkpoint, source in checkpoints(each, options, notes):
            sets = weight_sets(source, options, notes)
            data = sets[0].config.get("data") or os.environ.get(DATA_VARIABLE)
            if not (chosen or data):
                notes.append(f"no --data and no ${DATA_VARIABLE}: using digits")
            data_set = chosen or find(data or "digits")
            known = sets[0].options["num_classes"], sets[0].class_names
            classes, said = classes_of(data_set, each.given, *known, options.ignore_class_names)
            notes += [*said, *data_set.notes]
            if real := options.real_labels:
                data_set = replace(data_set, num_val=len(real_images(real, data_set.data)))
            rows += [
                settle_row(weights, checkpoint, data_set, size, ratio, options, classes)
                for size in dict.fromkeys(options.image_sizes) or (None,)
                for ratio in ratios
                for weights in sets
            ]
    if all(row.protocol.data in BUILT_IN for row in rows):
        inert = BUILT_IN[rows[0].protocol.data].inert_options()
        notes += idle_lines(MachineConfig, inert, given)
    output = "json" if options.json else "csv" if options.csv else "table"
    run = EvalRun(rows=tuple(rows), output=output, out=rows[0].folder, machine=machine)
    return run, list(dict.fromkeys(notes))


def checkpoints(
    source: Source, options: EvalOptions, notes: list[str]
) -> Iterator[tuple[str, Source]]:
    """(`best`, `last` or empty, source) of the wanted checkpoints of a source."""
    given = source.given
    if source.run is None or source.place == Path(os.path.expanduser(given)).resolve():
        if options.every:
            notes.append(f"{given} is a single checkpoint: --all gives no best and last rows")
        elif options.best:
            notes.append(f"--best without effect: {given} is a single checkpoint")
        yield "", source
    elif options.every:
        try:
            yield "best", find_source(given, best=True)
        except CheckpointError as error:
            notes.append(f"{error.message}: only rows of the last checkpoint")
        yield "last", find_source(given)
    else:
        yield "best" if options.best else "last", source


def weight_sets(source: Source, options: EvalOptions, notes: list[str]) -> list[Weights]:
    """The wanted sets of weights of a checkpoint: raw, EMA, or both."""
    from spiralrope_cli.core.weights import fetch_source, read_weights

    source, wanted = fetch_source(source), (False, True) if options.every else (options.ema,)
    given: Any = {"rope": options.rope, "arch": options.arch, "dit": False}
    sets = [read_weights(source, ema=ema, **given) for ema in wanted]
    if len(sets) == 2 and (sets[0].file, sets[0].ema) == (sets[1].file, sets[1].ema):
        del sets[1]
        notes.append(f"{source.given} holds one set of weights: no separate EMA rows")
    else:
        notes += [note for each in sets for note in each.notes]
    chosen = set(options.rope)
    notes += idle_lines(RopeConfig, sets[0].rope.inert_options(chosen), chosen)
    return sets


def settle_row(
    weights: Weights,
    checkpoint: str,
    data_set: DataSet,
    size: tuple[int, int] | None,
    ratio: float | None,
    options: EvalOptions,
    classes: tuple[int, ...],
) -> EvalRow:
    """One row, checked; default size is that of the weights, default ratio that of the data set."""
    from spiralrope_cli.core.load import at_size
    from spiralrope_cli.core.weights import mean_std

    source, row = weights.source, weights.source.published
    trained = ModelConfig(drop_path=0.0, **weights.options)
    size = size or trained.image_size
    placed = at_size(weights, size, options.rope)
    # Next to the weights, but not in the cache of published weights.
    beside = Path(RUNS_FOLDER) / f"eval-{row.folder_name}" if row else source.run
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
        protocol=EvalProtocol(
            data=data_set.data,
            num_val=data_set.num_val,
            image_size=size,
            in_chans=trained.in_chans,
            crop_ratio=ratio or data_set.defaults["crop_ratio"],
            real_labels=options.real_labels,
            **mean_std(weights, data_set.defaults, trained.in_chans),
        ),
        classes=classes,
        folder=str(folder.resolve()),
    )


# ---- plan
def plan(row: EvalRow) -> None:
    """Prints a row on stderr."""
    on, real = row.protocol, ", labels of ReaL" if row.protocol.real_labels else ""
    how = f"{on.data}{real} at {format_size(on.image_size)} px, crop ratio {on.crop_ratio:g}"
    say(f"{row.source}: {row.checkpoint} {row.weights} weights, {on.num_val} images of {how}")


# ---- work
def work(config: EvalRun) -> None:
    """Computes all rows; every worker runs this, and the first one reports."""
    from spiralrope_cli.core.data.batches import ValidationImages
    from spiralrope_cli.core.runtime.distributed import all_gather_object, open_context

    machine = config.machine
    with open_context(machine, None) as ctx:
        if len(set(all_gather_object(config.rows))) > 1:
            raise CheckpointError(
                "the machines see different weights or data sets",
                "sources and --data must be in folders that all machines share",
            )
        metrics: dict[EvalRow, Accuracy] = {}
        decoded, unreadable = 0, dict[str, str]()
        for protocol in dict.fromkeys(row.protocol for row in config.rows):
            rows = [row for row in config.rows if row.protocol == protocol]
            images = ValidationImages(protocol, machine, ctx.device, ctx.rank, ctx.world_size)
            metrics |= measure_rows(rows, images, ctx)
            decoded += images.decoded
            unreadable |= images.unreadable
        decoded = sum(all_gather_object(decoded))
        unreadable = dict(ChainMap(*all_gather_object(unreadable)))
        if ctx.is_first:
            say_unreadable(unreadable)
            report(config, metrics, decoded, ctx)


def measure_rows(
    rows: list[EvalRow], images: ValidationImages, ctx: DistContext
) -> dict[EvalRow, Accuracy]:
    """Metrics of the rows of one protocol, in one pass over the images."""
    from spiralrope_cli.core import load
    from spiralrope_cli.core.models.factory import cast_matmuls, compile_blocks, pays_to_compile
    from spiralrope_cli.core.training.classification import measure_accuracy
    from spiralrope_cli.core.weights import read_weights

    models: dict[Any, nn.Module] = {}
    for row in rows:
        if row.network_key not in models:
            source, rope = Source(row.source, Path(row.file)), asdict(row.rope)
            weights = read_weights(source, ema=row.ema, rope=rope, arch=row.arch, verify=False)
            sizes = {n: getattr(row.model, n) for n in ("image_size", "pretrain_grid")}
            network = load.build_network(weights, ctx.device, **sizes)
            cast_matmuls(network, ctx.dtype)
            models[row.network_key] = network
    protocol = images.protocol
    passes = len(models) * protocol.num_val / ctx.world_size
    if pays_to_compile(images.machine.compile, network, ctx.device, passes):
        compile_blocks(*models.values(), say=ctx.say)
    what = f"{slug_of(protocol.data)} at {format_size(protocol.image_size)} px"
    what += f", crop ratio {protocol.crop_ratio:g}, {len(models)} network(s), images"
    with counted(what, protocol.num_val, shown=ctx.is_first) as advance:

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for pixels, labels in images.batches():
                yield pixels, labels
                advance(len(labels) * ctx.world_size)  # the other processes are about as far

        classes = {row.network_key: row.classes for row in rows}
        found = measure_accuracy(models, batches(), ctx.device, contextlib.nullcontext, classes)
    for row in rows:
        if not math.isfinite(found[row.network_key].loss):
            raise CheckpointError(
                f"the loss of the {row.weights} weights of {row.source} is not finite",
                "try --precision fp32, or other weights",
            )
    return {row: found[row.network_key] for row in rows}


# ---- report
def report(
    config: EvalRun, metrics: dict[EvalRow, Accuracy], decoded: int, ctx: DistContext
) -> None:
    """Writes and prints all results, on the first process."""
    from spiralrope_cli.core.report.page import is_stage, leave_report
    from spiralrope_cli.core.runtime.device import versions

    circumstances = {
        "precision": ctx.precision,
        "device": ctx.device.type,
        "processes": ctx.world_size,
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    rows = [describe_row(row) | asdict(metrics[row]) | circumstances for row in config.rows]
    folders: dict[Path, list[Record]] = {}
    for row, record in zip(config.rows, rows, strict=True):
        folders.setdefault(Path(row.folder), []).append(record)
    for folder, records in folders.items():
        path = folder / EVAL_FILE
        try:
            add_rows(path, records, decoded)
            say(f"metrics: {path}")
            if len({tuple(record["image_size"]) for record in records}) > 1:
                save_figure(sizes_figure(records), folder / SIZES_FILE)
                say(f"plot: {folder / SIZES_FILE}")
        except OSError as error:
            say(f"note: {path} was not written: {error.strerror or error}; use another --out")
    say(f"decoded {decoded} images for {len(rows)} row(s)")
    print_evaluation(rows, config.output, decoded)
    for folder in filter(is_stage, folders):
        leave_report(folder)


def measured_rows(config: EvalRun) -> list[Record]:
    """The rows in `eval.json`, if all are there for the same weights; else none."""
    from spiralrope_cli.core.runtime.device import planned_precision

    precision = planned_precision(config.machine, dry_run=True)
    # auto is that of the rows: another machine may have computed them.
    known = {} if config.machine.precision == "auto" or not precision else {"precision": precision}
    found = []
    for row in config.rows:
        now, rows = describe_row(row) | known, read_rows(Path(row.folder) / EVAL_FILE)
        same = [old for old in rows if is_same(old, {**old, **now})]
        if not same:
            return []
        found.append({**same[0], **now})
    return found


def describe_row(row: EvalRow) -> Record:
    """The part of a row of `eval.json` without metrics, as plain values."""
    protocol, model = row.protocol, row.model
    return {
        "source": row.source,
        "checkpoint": row.checkpoint,
        "step": row.step,
        "weights": row.weights,
        "file": row.file,
        "sha256": digest_of_file(Path(row.file)),
        "arch": row.arch,
        "rope": asdict(row.rope),
        # Height and width in pixels that the positions refer to.
        "trained_size": [n * model.patch_size for n in model.pretrain_grid or model.grid],
        "data": protocol.data,
        "labels": "ReaL" if protocol.real_labels else None,
        "classes": len(row.classes) or model.num_classes,  # that were predicted among
        "num_classes": model.num_classes,
        "image_size": list(protocol.image_size),
        "crop_ratio": protocol.crop_ratio,
        "interpolation": "bicubic",
        "mean": list(protocol.mean),
        "std": list(protocol.std),
    }
