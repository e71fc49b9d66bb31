"""Trains a network: the story of `pretrain`, `finetune` and `dit-train`.

The command settles what the run is. Here it is told (`plan`), every worker trains (`work`), and the
first one leaves curves, a page and figures (`report`).
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from rich.table import Table

from spiralrope_cli.core.config.dit_runs import DiTRun, TrainingRun
from spiralrope_cli.core.config.latents import VAE_NAMES
from spiralrope_cli.core.config.models import is_dit
from spiralrope_cli.core.config.nested import flatten, to_nested
from spiralrope_cli.core.config.optim import LINEAR_RULE_BATCH
from spiralrope_cli.core.config.resolve import Resolved
from spiralrope_cli.core.config.runs import ClassifierRun
from spiralrope_cli.core.errors import CheckpointError
from spiralrope_cli.core.plots.curves import curves
from spiralrope_cli.core.plots.style import save
from spiralrope_cli.core.hub.catalog import find
from spiralrope_cli.core.hub.download import local_path
from spiralrope_cli.core.hub.vae import find_vae
from spiralrope_cli.core.report.page import leave_report
from spiralrope_cli.core.jobs.start import starting_weights
from spiralrope_cli.core.load import start_from
from spiralrope_cli.core.models.factory import model_cost
from spiralrope_cli.core.rope import clamped_share
from spiralrope_cli.core.runtime import distributed
from spiralrope_cli.core.runtime.console import console, say
from spiralrope_cli.core.runtime.job import Job, open_job
from spiralrope_cli.core.runtime.launch import joined_world_size, world_size
from spiralrope_cli.core.runtime.report import print_results, say_unreadable
from spiralrope_cli.core.runtime.run_folder import CURVES_FILE
from spiralrope_cli.core.training import loop
from spiralrope_cli.core.training.classification import classification
from spiralrope_cli.core.training.diffusion import diffusion

CLAMP_HINT_SHARE = 0.15
ORIGINS = (
    *("option", "config file", "environment", "latents", "source", "data set"),
    *("recipe", "default"),
)


def plan(
    resolved: Resolved[Any], first_step: int, *, every_value: bool, notes: Iterable[str] = ()
) -> None:
    """Prints what was settled on, how it was derived, and where the values came from.

    Args:
        resolved: the run and its sources.
        first_step: where it goes on, 0 at the start.
        every_value: also those that are nobody's choice.
        notes: further lines for the user.
    """
    table = Table(show_header=False, box=None, padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in plan_lines(resolved.run, first_step):
        table.add_row(name, text)
    for origin in ORIGINS if every_value else ORIGINS[:-1]:
        if values := values_from(resolved, origin):
            table.add_row(f"by {origin}", values, style="dim")
    console(stderr=True).print(table)
    for warning in [*notes, *resolved.warnings, *hints(resolved.run)]:
        say(f"note: {warning}")


def plan_lines(run: TrainingRun, first_step: int) -> list[tuple[str, str]]:
    """(subject, sentence) for each thing that a run settles."""
    optim = run.optim
    world = world_size(run.machine)
    micro, accumulation = run.split_batch(world)
    rule = (
        f"{optim.lr:g} x {optim.batch_size}/{LINEAR_RULE_BATCH} = {optim.peak_lr:g}"
        if optim.lr_rule == "linear"
        else f"{optim.lr:g}, as given"
    )
    fall = (
        ""
        if optim.schedule == "constant"
        else f" to {optim.min_lr:g}, warm-up {optim.warmup_epochs} epochs from {optim.warmup_lr:g}"
    )
    epochs = run.total_steps / run.steps_per_epoch
    return [
        ("run", f"{run.out}" + (f", goes on at step {first_step}" if first_step else "")),
        *([("start", start_line(run))] if run.source else []),
        ("data", run.data_line),
        ("model", model_line(run)),
        (
            "RoPE",
            run.rope.summary if run.rope.enabled else f"none: {run.positions} positions alone",
        ),
        (
            "batch",
            f"{optim.batch_size} = {world} process(es) x {micro} images x {accumulation} "
            "accumulation step(s)",
        ),
        ("lr", f"{rule}; {optim.schedule}{fall}"),
        (
            "length",
            f"{run.total_steps} steps, {run.steps_per_epoch} per epoch: {epochs:.3g} epochs",
        ),
    ]


def start_line(run: TrainingRun) -> str:
    """Where the weights come from, and what of them does not fit this run."""
    weights = starting_weights(run)
    told = [weights.summary(), *run.misfits(weights.options)]
    if run.optim.freeze != "none":
        told.append(f"trained: {run.optim.freeze}")
    return "; ".join(told)


def model_line(run: TrainingRun) -> str:
    """What learns."""
    parameters, flops = model_cost(run)
    rows, columns = run.grid
    _, height, width = run.input_shape
    return (
        f"{run.arch}, {height}x{width} {run.unit}, {rows}x{columns} patches of "
        f"{height // rows} {run.unit}; "
        f"{parameters / 1e6:.2f} M parameters, {flops / 1e9:.3g} GFLOPs per image"
    )


def values_from(resolved: Resolved[Any], origin: str) -> str:
    """All values that came from one place."""
    values = flatten(to_nested(resolved.run), type(resolved.run))
    shown = {"out", "num_train", "num_val", "command", "source", "input_size"}
    words = {"enabled": "rope"}  # the one field that is not named as its option
    return ", ".join(
        f"{words.get(name, name)} {_short(value)}"
        for name, value in values.items()
        if name not in shown and value != "" and resolved.sources.get(name, "default") == origin
    )


def _short(value: object) -> str:
    if isinstance(value, list):
        return ("x" if isinstance(value[0], int) else "/").join(_short(item) for item in value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def hints(run: TrainingRun) -> list[str]:
    """Advice on settings that work but may not be what is wanted."""
    rope, machine = run.rope, run.machine
    told = []
    if joined_world_size() is not None and (machine.nproc or machine.nnodes > 1):
        told.append("--nproc and --nnodes have no effect: another launcher started the processes")
    optim = run.optim
    if optim.schedule == "cosine" and optim.peak_lr < optim.min_lr:
        told.append(
            f"the learning rate rises to the end: its peak of {optim.peak_lr:g} is below --min-lr "
            f"{optim.min_lr:g}"
        )
    if rope.enabled and rope.rotate > (most := max(run.head_dim // 8, 1)):
        told.append(
            f"--rotate {rope.rotate}: heads of {run.head_dim} channels have room for {most} at "
            "most; of more, each direction turns with one of its axes or with none"
        )
    if rope.enabled and rope.rotate > 1 and rope.projection != "exact":
        share = clamped_share(run.grid, rope, run.head_dim)
        if share >= CLAMP_HINT_SHARE:
            told.append(
                f"the grid's border flattens {share:.0%} of the positions; try --projection exact"
            )
    return told


def work(config: TrainingRun) -> None:
    """Trains until the last step, or until a signal; executed by every worker.

    Raises:
        TrainingError: a loss was not finite.
        CheckpointError: the folder holds another run, is in use, or cannot be written.
        DataError: the data set is missing or damaged.
        FetchError: the VAE is not here and cannot be had.
    """
    with open_job(config.machine, Path(config.out)) as job:
        step = loop.agreed_first_step(config)
        task = open_task(config, job)
        state, forward = loop.build_state(
            config, job, step, lambda model: start_from(starting_weights(config), model)
        )
        with loop.open_report(config, job, state) as reporter:
            loop.training_loop(config, job, task, state, forward, reporter)
        unreadable = distributed.gathered(task.unreadable)
        if job.is_first:
            say_unreadable(dict(ChainMap(*unreadable)))
            report(Path(config.out))


def open_task(config: TrainingRun, job: Job) -> loop.Task[Any]:
    """Data and loss of the run's kind of network."""
    if not is_dit(config.arch):
        return classification(cast(ClassifierRun, config), job)
    return diffusion(cast(DiTRun, config), job, lambda given: find_vae(given).folder, local_vae)


def local_vae(given: str) -> Path:
    """Folder of a VAE that can be had without a network.

    Raises:
        CheckpointError, ConfigError: it is not here, or it cannot be read.
    """
    if given in VAE_NAMES and local_path(find(f"vae-{given}")) is None:
        raise CheckpointError(f"the VAE {given} is not here to decode them")
    return find_vae(given).folder


def report(out: Path) -> None:
    """Leaves curves and the page of a finished run, and prints its figures."""
    save(curves([out], "step"), out / CURVES_FILE)
    leave_report(out)
    print_results(out)
