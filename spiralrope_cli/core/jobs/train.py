"""`pretrain`, `finetune` and `dit-train`: resolve the run, print the plan, train, report.

Modules that load torch are imported inside functions, so that usage errors are fast.
"""

from __future__ import annotations

import gc
import math
from collections import ChainMap
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.table import Table

from spiralrope_cli.core.config.datasets import nameless_note
from spiralrope_cli.core.config.dit_runs import DiTRun, TrainingRun
from spiralrope_cli.core.config.models import format_size, given_rope, is_dit
from spiralrope_cli.core.config.option import build, flat_values, leaves
from spiralrope_cli.core.config.recipes import with_usual_micro_batch
from spiralrope_cli.core.config.runs import ClassifierRun
from spiralrope_cli.core.config.samples import decoder_of
from spiralrope_cli.core.config.training import LINEAR_RULE_BATCH, TrainOptions
from spiralrope_cli.core.errors import CheckpointError, ConfigError, NoRouteError
from spiralrope_cli.core.hub.source import find_inception, find_source, find_vae, local_vae
from spiralrope_cli.core.report.results import print_results
from spiralrope_cli.core.resolve import Resolved, StartingPoint, as_begun, resolve
from spiralrope_cli.core.runtime.launch import (
    check_memory,
    is_first_process,
    launch,
    on_gpu,
    say_notes,
    world_size,
)
from spiralrope_cli.core.runtime.progress import console, say, say_unreadable
from spiralrope_cli.core.runtime.run_folder import first_step, is_finished, write_sources
from spiralrope_cli.core.runtime.slurm import WHOLE, Remaining
from spiralrope_cli.core.runtime.trackers import check_tracker, log_in
from spiralrope_cli.core.storage import CURVES_FILE

if TYPE_CHECKING:
    from spiralrope_cli.core.runtime.distributed import DistContext
    from spiralrope_cli.core.training import loop
    from spiralrope_cli.core.weights import Weights

ORIGINS = (
    *("option", "config file", "environment", "latents", "source", "data set"),
    *("recipe", "fit", "default"),
)
IN_THE_ROWS = {"out", "num_train", "num_val", "command", "source", "input_size", "class_names"}
"""Fields that other rows of the plan show, or that are too long for it."""


def train(command: str, given: dict[str, Any]) -> Remaining:
    """Runs a training command; `given` is field name -> value of the given options."""
    own: TrainOptions = build(TrainOptions, given)
    own.check_folder(given.get("out", ""), "a training run")
    resolved, notes = settle(command, given, own)
    finished = carry_out(resolved, notes, dry_run=own.dry_run)
    if finished and not own.dry_run and is_first_process():
        print_results(Path(resolved.run.out))
    return Remaining(resolved.run.out, () if finished else WHOLE)


def settle(
    command: str, given: dict[str, Any], own: TrainOptions
) -> tuple[Resolved, tuple[str, ...]]:
    """The resolved run, and notes for the user."""
    not_of_run = leaves(TrainOptions).keys() | {"source"}
    options = {name: value for name, value in given.items() if name not in not_of_run}
    start: StartingPoint | None = None
    notes: tuple[str, ...] = ()
    if (source := given.get("source")) is not None:
        rope, found = given_rope(options), find_source(source)
        from spiralrope_cli.core.load import starting_point

        dit = command == "dit-train"
        arch = options.get("arch", "")
        ema, download = given.get("ema", True), not own.dry_run
        start, notes = starting_point(found, rope, ema=ema, arch=arch, dit=dit, download=download)
    resolved = resolve(command, options, config_file=own.config, name=own.name, start=start)
    resolved = as_begun(resolved)
    run = resolved.run
    if start and start.model.num_classes == run.model.num_classes:
        notes = (*notes, *nameless_note(start.source, start.class_names, run.class_names))
    return resolved, notes


def carry_out(resolved: Resolved, notes: Iterable[str] = (), *, dry_run: bool) -> bool:
    """Trains; a dry run only prints the plan. Returns whether the run was already finished."""
    run: Any = resolved.run
    check_tracker(run.machine.tracker)
    step = first_step(run)
    finished = is_finished(run, step)
    if finished and not dry_run:
        if is_first_process():
            say(f"{run.out} is finished: {step} steps")
        return True
    run = with_checked_batch(run)
    # Before anything is built: four float64 numbers per channel pair of each patch for the angles.
    patches = math.prod(run.grid)
    check_memory(16 * patches * run.head_dim, f"{patches:,} patches per image")

    from spiralrope_cli.core.runtime.device import check_shard, settle_precision

    try:
        precision, more = settle_precision(run, step)
        more += check_shard(run.machine, world_size(run.machine))
    except ConfigError as error:  # a dry run may plan for another machine
        if not dry_run:
            raise
        precision, more = run.machine.precision, [f"{error.message} here"]
    run = replace(run, machine=replace(run.machine, precision=precision))
    resolved, notes = replace(resolved, run=run), [*notes, *batch_notes(resolved), *more]
    if is_first_process():
        plan(resolved, first_step=step, every_value=dry_run, notes=notes)
        find_fixed_weights(run, find=local_vae if dry_run else find_vae)
    if not dry_run:
        if is_first_process():
            log_in(run.machine.tracker)
            write_sources(run, resolved.sources)
        launch(work, run)
    return finished


def find_fixed_weights(run: TrainingRun, find: Callable[[str], object]) -> None:
    """Finds VAEs by `find`, and what the FID needs; raises before any worker starts."""
    if not isinstance(run, DiTRun):
        return
    if run.fid.fid_every:
        from spiralrope_cli.core.training.fid import settle_fid

        settle_fid(run, find_inception)
    decoder = decoder_of(run.images.vae) if run.fid.fid_every and run.images.in_latents else ""
    try:
        for vae in filter(None, (run.vae_in_loop, decoder)):
            find(vae)
    except NoRouteError as error:
        hint = f"{error.hint}; --vae none trains on pixels, without a VAE"
        raise NoRouteError(error.message, hint) from error


def with_checked_batch(run: TrainingRun) -> TrainingRun:
    """The run with a micro-batch size; on GPUs `auto` stays, and the workers find what fits."""
    world = world_size(run.machine)
    run = run if on_gpu(run.machine) else with_usual_micro_batch(run, world)
    run.split_batch(world)  # raises if the batch does not split
    return run


def batch_notes(resolved: Resolved) -> list[str]:
    """A note if a process has fewer images than the given micro-batch."""
    given = resolved.run.optim.micro_batch_size
    if given is None or resolved.sources.get("micro_batch_size") != "option":
        return []
    micro, _ = resolved.run.split_batch(world_size(resolved.run.machine))
    if given == micro:
        return []
    return [f"--micro-batch-size {given} has the effect of {micro}: a process has no more images"]


def plan(resolved: Resolved, first_step: int, *, every_value: bool, notes: Iterable[str]) -> None:
    """Prints the plan of a run; with `every_value` also values that are defaults."""
    from spiralrope_cli.core.training.advice import hints

    table = Table(show_header=False, box=None, padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in plan_rows(resolved.run, first_step).items():
        table.add_row(name, text)
    values = flat_values(resolved.run)
    for origin in ORIGINS if every_value else ORIGINS[:-1]:
        shown = [
            f"{'rope' if name == 'enabled' else name} {_short(value)}"
            for name, value in values.items()
            if name not in IN_THE_ROWS and value not in ("", None)
            if resolved.sources.get(name, "default") == origin
        ]
        if shown:
            table.add_row(f"by {origin}", ", ".join(shown), style="dim")
    console(stderr=True).print(table)
    say_notes([*notes, *resolved.warnings, *hints(resolved.run)])


def plan_rows(run: TrainingRun, first_step: int) -> dict[str, str]:
    """Rows of the plan: weights, data, model, batch, learning rate and length."""
    from spiralrope_cli.core.models.factory import model_cost

    resumes = f", resumes at step {first_step} and goes on to {run.total_steps}"
    rows = {"run": run.out + (resumes if first_step else "")}
    if run.source:
        rows["start"] = start_line(run)
    parameters, flops = model_cost(run)
    grid, size = run.grid, run.input_shape[1:]
    rows["data"] = run.data_line
    rows["model"] = (
        f"{run.arch}, {format_size(size)} {run.unit}, {grid[0]}x{grid[1]} patches of "
        f"{size[0] // grid[0]} {run.unit}; "
        f"{parameters / 1e6:.2f} M parameters, {flops / 1e9:.3g} GFLOPs per image"
    )
    rows["RoPE"] = run.rope.summary if run.rope.enabled else f"none, only {run.positions} positions"
    optim, world = run.optim, world_size(run.machine)
    micro, grad_accum_steps = run.split_batch(world)
    split = f"{micro} images x {grad_accum_steps} gradient accumulation step(s)"
    if optim.micro_batch_size is None:
        split = f"{micro} images, accumulated in parts if not all fit (--micro-batch-size auto)"
    rows["batch"] = f"{optim.batch_size} = {world} process(es) x {split}"
    lr = f"{optim.lr:g}, as given"
    if optim.lr_rule == "linear":
        lr = f"{optim.lr:g} x {optim.batch_size}/{LINEAR_RULE_BATCH} = {optim.peak_lr:g}"
    lr += f"; {optim.schedule}"
    if optim.schedule != "constant":
        lr += f" to {optim.min_lr:g}, warm-up {optim.warmup_epochs} epochs from {optim.warmup_lr:g}"
    rows["lr"] = lr
    epochs = run.total_steps / run.steps_per_epoch
    rows["length"] = (
        f"{run.total_steps} steps, {run.steps_per_epoch} per epoch: {epochs:.3g} epochs"
    )
    if isinstance(run, DiTRun) and run.fid.fid_every:
        rows["FID"] = run.fid.summary
    return rows


def start_line(run: TrainingRun) -> str:
    """Initial weights, and what of them does not fit this run."""
    try:
        find_source(run.source)
    except CheckpointError:  # a pipeline prints this plan before its first training
        return f"{'EMA' if run.ema else 'raw'} weights of {run.source}, after its training"
    weights = starting_weights(run)
    before = {**weights.options, "class_names": weights.class_names}
    parts = [weights.summary(), *run.misfits(before)]
    if run.optim.freeze != "none":
        parts.append(f"freeze: {run.optim.freeze}")
    return "; ".join(parts)


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return ("x" if isinstance(value[0], int) else "/").join(_short(item) for item in value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def work(config: TrainingRun) -> None:
    """Trains; every worker runs this."""
    from spiralrope_cli.core.load import load_pretrained
    from spiralrope_cli.core.runtime import distributed
    from spiralrope_cli.core.runtime.distributed import open_context
    from spiralrope_cli.core.training import loop
    from spiralrope_cli.core.training.advice import with_fitting_micro_batch

    with open_context(config.machine, Path(config.out)) as ctx:
        step = loop.agreed_first_step(config)
        # Once, because it verifies cached latents and loads the VAE.
        task = open_task(config, ctx)
        config = with_fitting_micro_batch(config, ctx, task)
        task = task.split_as(config, ctx)
        if isinstance(config, DiTRun) and config.fid.fid_every:
            from spiralrope_cli.core.hub.published import load_safely
            from spiralrope_cli.core.training.fid import FidOfTraining

            measure = FidOfTraining(config, ctx, find_inception, load_safely, find_vae)
            task = replace(task, measure_at=config.fid_at, measure=measure)
        state, forward = loop.build_state(
            config,
            ctx,
            step,
            lambda model: load_pretrained(
                starting_weights(config, verify=False), model, config.class_names
            ),
        )
        with loop.open_report(config, ctx, state) as reporter:
            loop.training_loop(config, ctx, task, state, forward, reporter)
        # Frees DDP before its process group: torch 2.6 may hang if DDP is the last to hold it.
        del forward
        gc.collect()
        unreadable = distributed.all_gather_object(task.data.unreadable)
        if ctx.is_first:
            say_unreadable(dict(ChainMap(*unreadable)))
            report(Path(config.out))


def open_task(config: TrainingRun, ctx: DistContext) -> loop.Task:
    """The task of the network: classification or diffusion."""
    from spiralrope_cli.core.training.classification import classification
    from spiralrope_cli.core.training.diffusion import diffusion

    if not is_dit(config.arch):
        return classification(cast(ClassifierRun, config), ctx)
    return diffusion(cast(DiTRun, config), ctx, find_vae, local_vae)


def starting_weights(run: TrainingRun, *, verify: bool = True) -> Weights:
    """The initial weights of a run: by default the EMA weights of its source."""
    from spiralrope_cli.core.weights import read_weights

    source, rope = find_source(run.source), asdict(run.rope)
    return read_weights(source, ema=run.ema, rope=rope, arch=run.arch, verify=verify)


def report(out: Path) -> None:
    """Writes curves and report page of a finished run, and prints its metrics."""
    from spiralrope_cli.core.plots.curves import curves_figure, save_figure
    from spiralrope_cli.core.report.page import leave_report

    save_figure(curves_figure([out]), out / CURVES_FILE)
    leave_report(out)
    print_results(out)
