"""What a run is going to do, before it does it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from spiralrope_cli.core.config.dit_runs import DiTRun, TrainingRun
from spiralrope_cli.core.config.models import deit_size, dit_size
from spiralrope_cli.core.config.nested import flatten, to_nested
from spiralrope_cli.core.config.optim import LINEAR_RULE_BATCH
from spiralrope_cli.core.config.resolve import Resolved
from spiralrope_cli.core.jobs.start import starting_weights
from spiralrope_cli.core.models.factory import create_model
from spiralrope_cli.core.rope import clamped_share
from spiralrope_cli.core.runtime.console import console, say
from spiralrope_cli.core.runtime.launch import joined_world_size, world_size

CLAMP_HINT_SHARE = 0.15
SOURCES = (
    *("option", "config file", "environment", "latents", "source", "data set"),
    *("recipe", "default"),
)


def print_plan(
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
    for source in SOURCES if every_value else SOURCES[:-1]:
        if values := values_from(resolved, source):
            table.add_row(f"by {source}", values, style="dim")
    console(stderr=True).print(table)
    for warning in [*notes, *resolved.warnings, *hints(resolved.run)]:
        say(f"note: {warning}")


def plan_lines(run: TrainingRun, first_step: int) -> list[tuple[str, str]]:
    """(subject, sentence) for each thing that a run settles."""
    optim, rope = run.optim, run.rope
    world = world_size(run.machine)
    micro, accumulation = run.split_batch(world)
    rule = (
        f"{optim.lr:g} x {optim.batch_size}/{LINEAR_RULE_BATCH} = {optim.peak_lr:g}"
        if optim.lr_rule == "linear"
        else f"{optim.lr:g}, as given"
    )
    absolute = "fixed sin-cos" if isinstance(run, DiTRun) else "learned absolute"
    return [
        ("run", f"{run.out}" + (f", goes on at step {first_step}" if first_step else "")),
        *start_lines(run),
        ("data", data_line(run)),
        ("model", model_line(run)),
        ("RoPE", rope_line(run) if rope.enabled else f"none: {absolute} positions alone"),
        (
            "batch",
            f"{optim.batch_size} = {world} process(es) x {micro} images x {accumulation} "
            "accumulation step(s)",
        ),
        (
            "lr",
            f"{rule}; {optim.schedule}"
            + (
                ""
                if optim.schedule == "constant"
                else f" to {optim.min_lr:g}, warm-up {optim.warmup_epochs} epochs "
                f"from {optim.warmup_lr:g}"
            ),
        ),
        (
            "length",
            f"{run.total_steps} steps, {run.steps_per_epoch} per epoch: "
            f"{run.total_steps / run.steps_per_epoch:.3g} epochs",
        ),
    ]


def data_line(run: TrainingRun) -> str:
    """What it learns from."""
    if not isinstance(run, DiTRun):
        return (
            f"{run.data}: {run.num_train} training and {run.num_val} held-out images, "
            f"{run.model.num_classes} classes"
        )
    pictures = run.pictures
    seen = "as pixels, in [-1, 1]"
    if pictures.in_latents:
        seen = f"through the VAE {pictures.vae}"
    if pictures.latents:
        seen = f"as latents of the VAE {pictures.vae}, cached in {pictures.latents}"
    mirrored = f"mirrored with p = {pictures.hflip:g}" if pictures.hflip else "never mirrored"
    return (
        f"{run.data}: {run.num_train} training images, {run.model.num_classes} classes; "
        f"{_short(list(pictures.image_size))} px, {mirrored}, {seen}"
    )


def model_line(run: TrainingRun) -> str:
    """What learns."""
    parameters, flops = model_cost(run)
    rows, columns = run.grid
    size = _size(run)
    unit = "latents" if isinstance(run, DiTRun) and run.pictures.in_latents else "px"
    return (
        f"{run.arch}, {size[0]}x{size[1]} {unit}, {rows}x{columns} patches of "
        f"{size[0] // rows} {unit}; "
        f"{parameters / 1e6:.2f} M parameters, {flops / 1e9:.3g} GFLOPs per image"
    )


def _size(run: TrainingRun) -> tuple[int, int]:
    return run.model.input_size if isinstance(run, DiTRun) else run.model.image_size


def start_lines(run: TrainingRun) -> list[tuple[str, str]]:
    """Where the weights come from, and what of them does not fit this run."""
    if not run.source:
        return []
    weights = starting_weights(run)
    told = [weights.summary()]
    before = weights.options
    if before["num_classes"] != run.model.num_classes:
        what = "label table" if isinstance(run, DiTRun) else "head"
        told.append(
            f"{what} re-initialised: {before['num_classes']} -> {run.model.num_classes} classes"
        )
    if isinstance(run, DiTRun):
        if not run.rope.enabled and before["input_size"] != run.model.input_size:
            told.append("fixed positions made anew for this size")
    elif before["image_size"] != run.model.image_size:
        was, now = (
            "x".join(map(str, size)) for size in (before["image_size"], run.model.image_size)
        )
        told.append(f"position embedding resampled: {was} -> {now} px")
    if run.optim.freeze != "none":
        told.append(f"trained: {run.optim.freeze}")
    return [("start", "; ".join(told))]


def rope_line(run: TrainingRun) -> str:
    """Directions and how they are fed."""
    rope = run.rope
    between = f"every {180 / rope.num_directions:g} degrees"
    return (
        f"rotate {rope.rotate}: K = {rope.num_directions} directions, {between}; "
        f"{rope.freqs_for}, {rope.projection}, {rope.scaling}"
    )


def model_cost(run: TrainingRun) -> tuple[int, int]:
    """Parameters, and floating point operations of one forward pass on one image."""
    model = run.model
    with torch.device("meta"):
        network = create_model(run.arch, rope=run.rope, **asdict(model))
        given = [torch.empty(1, model.in_chans, *_size(run))]
        if isinstance(run, DiTRun):
            given += [torch.zeros(1), torch.zeros(1, dtype=torch.int64)]  # timestep and label
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            network(*given)
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops()


def values_from(resolved: Resolved[Any], source: str) -> str:
    """All values that came from one place."""
    values = flatten(to_nested(resolved.run), type(resolved.run))
    shown = {"out", "num_train", "num_val", "command", "source", "input_size"}
    defaults = values.keys() - resolved.sources.keys() - shown
    names = (
        [name for name in values if name in defaults or resolved.sources.get(name) == source]
        if source == "default"
        else [name for name in values if resolved.sources.get(name) == source]
    )
    names = [name for name in names if name not in shown]
    words = {"enabled": "rope"}  # the one field that is not named as its option
    return ", ".join(
        f"{words.get(name, name)} {_short(values[name])}" for name in names if values[name] != ""
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
    size = dit_size(run.arch) if isinstance(run, DiTRun) else deit_size(run.arch)
    head_dim = size.head_dim
    if rope.enabled and rope.rotate > (most := max(head_dim // 8, 1)):
        told.append(
            f"--rotate {rope.rotate}: heads of {head_dim} channels have room for {most} at most; "
            "of more, each direction turns with one of its axes or with none"
        )
    if not rope.enabled or rope.rotate <= 1 or rope.projection == "exact":
        return told
    share = clamped_share(run.grid, rope, head_dim)
    if share < CLAMP_HINT_SHARE:
        return told
    return [
        *told,
        f"the grid's border flattens {share:.0%} of the positions; try --projection exact",
    ]
