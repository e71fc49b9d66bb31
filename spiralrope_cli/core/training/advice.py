"""Advice before a training run: on its settings, and on what fits into memory.

That is `--micro-batch-size auto`, and for `doctor` what a run needs.
"""

from __future__ import annotations

import bisect
import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spiralrope_cli.core.config.datasets import numbering_note
from spiralrope_cli.core.config.dit_runs import DiTRun, TrainingRun
from spiralrope_cli.core.config.recipes import (
    micro_batch_sizes,
    usual_micro_batch,
    with_micro_batch,
    with_usual_micro_batch,
)
from spiralrope_cli.core.config.training import MOST_OF_FIRST, MachineConfig
from spiralrope_cli.core.data.loader import Batch
from spiralrope_cli.core.errors import ConfigError, TrainingError
from spiralrope_cli.core.models.factory import meta_inputs, model_cost, model_of
from spiralrope_cli.core.rope import change_from_axial, clamped_fraction
from spiralrope_cli.core.runtime import distributed
from spiralrope_cli.core.runtime.device import DTYPES, pick_device, pick_precision
from spiralrope_cli.core.runtime.distributed import DistContext
from spiralrope_cli.core.runtime.launch import num_local_workers, usable_cores
from spiralrope_cli.core.runtime.progress import human_size
from spiralrope_cli.core.training.checkpoint import needed_bytes
from spiralrope_cli.core.training.loop import Task
from spiralrope_cli.core.training.step import TrainState, freeze_but, train_step

FILL = 0.9
"""Fraction of a GPU's memory for a step; the rest is for validation, samples and fragments."""
BYTES_PER_PARAMETER = 20
"""float32 weights, gradients, two moments of AdamW and the average."""
WHOLE_BYTES = 6
"""Of these, and more, with --shard: gradients between micro-batches, weights in bf16."""
CLAMP_HINT_FRACTION = 0.15
LITTLE_OF_FIRST = 0.01
SMALL_CHANGE = 0.1
"""Change of a query against axial RoPE below which results can hardly differ."""
MOST_PATCHES = 1 << 18
"""Patches up to which the notes of a plan look at the position of each."""


# --- Settings


def hints(run: TrainingRun) -> list[str]:
    """Notes on settings that work but are probably not intended."""
    rope, optim = run.rope, run.optim
    messages = numbering_note(run.class_names)
    if optim.schedule == "cosine" and optim.peak_lr < optim.min_lr:
        messages.append(
            f"the learning rate rises to the end: its peak of {optim.peak_lr:g} is below --min-lr "
            f"{optim.min_lr:g}; try a higher --lr, or --lr-rule none"
        )
    fraction = 0.0 if optim.ema_warmup else optim.ema_decay**run.total_steps
    if fraction > MOST_OF_FIRST:
        messages.append(
            f"{fraction:.0%} of the EMA weights will still be the first ones: {run.total_steps} "
            f"steps are few for --ema-decay {optim.ema_decay:g}; at "
            f"{LITTLE_OF_FIRST ** (1 / run.total_steps):.4g} it would be {LITTLE_OF_FIRST:.0%}, "
            "and with --ema-warmup 0%"
        )
    if isinstance(run, DiTRun) and run.model.class_dropout_prob == 0:
        messages.append(
            "--class-dropout-prob 0 trains no null label: dit-sample then refuses --cfg-scale"
        )
    if rope.enabled and rope.rotate > (most := max(run.head_dim // 8, 1)):
        messages.append(
            f"--rotate {rope.rotate}: heads of {run.head_dim} channels support at most {most}; "
            "with more, some directions have too few channels, or none"
        )
    if rope.enabled and rope.rotate > 1 and math.prod(run.grid) <= MOST_PATCHES:
        fraction = clamped_fraction(run.grid, rope, run.head_dim)
        if rope.projection != "exact" and fraction >= CLAMP_HINT_FRACTION:
            messages.append(
                f"{fraction:.0%} of the positions are clamped; --projection exact clamps none"
            )
        change = change_from_axial(run.grid, run.head_dim, rope, run.model.pretrain_grid)
        if change < SMALL_CHANGE:
            rows, columns = run.grid
            messages.append(
                f"on {rows}x{columns} patches and heads of {run.head_dim} channels, rotate "
                f"{rope.rotate} changes queries by {change:.1%} against axial RoPE: such runs "
                "hardly differ"
            )
    return messages


# --- The largest micro-batch


def with_fitting_micro_batch(config: TrainingRun, ctx: DistContext, task: Task) -> TrainingRun:
    """The run with a number in place of `auto`: on a GPU the most that fit, found by trial steps.

    Every process must call it, and gets the same.

    Raises:
        TrainingError: not even the smallest micro-batch fits.
    """
    if config.optim.micro_batch_size is not None or ctx.device.type != "cuda":
        return with_usual_micro_batch(config, ctx.world_size)
    sizes = micro_batch_sizes(config, ctx.world_size)
    with limited_memory(ctx.device) as free:
        fixed, per_image = memory_needs(config, ctx.dtype)
        sharded = config.machine.shard and ctx.world_size > 1
        if sharded:
            fixed = fixed // ctx.world_size + fixed * WHOLE_BYTES // BYTES_PER_PARAMETER
        guess = min(distributed.all_gather_object((free - fixed) / per_image))
        if sharded:  # no trial: one that ran out of memory would leave the others in a collective
            size: int | None = max((size for size in sizes if size <= guess), default=sizes[0])
        else:
            size = largest_that_fits(sizes, guess, trial_steps(config, ctx, task))
            task.extra()  # empties what the trial steps have added
    if size is None:
        raise TrainingError(
            f"a step of {sizes[0]} image(s) does not fit into {human_size(free)} of GPU memory",
            "try --grad-checkpointing, a smaller --arch or a smaller --image-size",
        )
    ctx.say(f"micro-batch: {size} of the {sizes[-1]} images of a process fit at once")
    return with_micro_batch(config, size)


def largest_that_fits(
    sizes: Sequence[int], guess: float, fits: Callable[[int], bool]
) -> int | None:
    """The largest of the ascending sizes that fits, tried up or down from a guess; None if none."""
    at = max(bisect.bisect_right(sizes, guess) - 1, 0)
    if fits(sizes[at]):
        while at + 1 < len(sizes) and fits(sizes[at + 1]):
            at += 1
        return sizes[at]
    return next((size for size in reversed(sizes[:at]) if fits(size)), None)


def trial_steps(config: TrainingRun, ctx: DistContext, task: Task) -> Callable[[int], bool]:
    """Size -> whether a step of such micro-batches fits in all processes.

    The steps are those of a network of its own, so that the run is not changed.
    """
    with torch.device("meta"):
        model = model_of(config)
    model = model.to_empty(device=ctx.device)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().zero_()
    freeze_but(model, config.optim.freeze)
    model.grad_checkpointing = config.machine.grad_checkpointing
    state = TrainState.create(model, config.optim)
    most, _ = config.split_batch(ctx.world_size)
    everything = task.black(most)  # a step has all its images on the device

    def fits(size: int) -> bool:
        micro, fit = first_of(everything, size), True
        try:
            train_step(
                state,
                state.model,
                [micro] * min(2, most // size),
                partial(task.loss, state),
                clip_grad=config.optim.clip_grad,
                want_grad_norm=True,
            )
        except torch.OutOfMemoryError:
            fit = False
        state.optimizer.zero_grad(set_to_none=True)
        if ctx.device.type == "cuda":
            torch.cuda.empty_cache()
        return all(distributed.all_gather_object(fit))

    return fits


def first_of(batch: Batch, size: int) -> Batch:
    """The first images of a batch."""
    at = batch.at._replace(part=slice(0, size))
    std = None if batch.std is None else batch.std[:size]
    return Batch(at, batch.images[:size], batch.labels[:size], std)


@contextlib.contextmanager
def limited_memory(device: torch.device) -> Iterator[float]:
    """Allows this process a part of the memory that is free; yields it in bytes."""
    free, total = torch.cuda.mem_get_info(device)
    allowed = FILL * free + torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction(allowed / total, device)
    try:
        yield allowed
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        gc.collect()
        torch.cuda.empty_cache()


# --- For `doctor`


def advice(run: TrainingRun, machine: MachineConfig) -> dict[str, Any]:
    """Sizes, valid values and memory of a run on this machine."""
    nproc, device = num_local_workers(machine), pick_device(machine)
    precision, _ = pick_precision(machine.precision, device)
    parameters, flops = model_cost(run)
    fixed, per_image = memory_needs(run, DTYPES[precision])
    size = run.optim.micro_batch_size or usual_micro_batch(run, nproc)
    if run.optim.micro_batch_size is None and device.type == "cuda":
        room = FILL * torch.cuda.get_device_properties(device).total_memory - fixed
        sizes = micro_batch_sizes(run, nproc)
        size = max((n for n in sizes if n * per_image <= room), default=sizes[0])
    micro, grad_accum_steps = with_micro_batch(run, size).split_batch(nproc)
    with torch.device("meta"):
        checkpoint_bytes = needed_bytes(model_of(run))
    batch_sizes = sorted({run.optim.batch_size, *(2**power for power in range(3, 14))})
    most_rotate = run.head_dim // 8
    return {
        "arch": run.arch,
        "parameters": parameters,
        "flops_per_image": flops,
        "batch_size": run.optim.batch_size,
        "nproc": nproc,
        "micro_batch_size": micro,
        "accumulation": grad_accum_steps,
        "image_size": list(run.image_size),
        "valid_nproc": [
            n for n in range(1, max(8, nproc, usable_cores()) + 1) if _accepts(run.split_batch, n)
        ],
        "valid_batch_sizes": [n for n in batch_sizes if _accepts(_split, run, n, nproc)],
        "valid_rotate": [
            n for n in range(most_rotate + 1) if _accepts(_check_rotate, run, n, False)
        ],
        "valid_rotate_same_theta": [
            n for n in range(2, most_rotate + 1) if _accepts(_check_rotate, run, n, True)
        ],
        "checkpoint_bytes": checkpoint_bytes,
        # The newest ones, the best, and one more: a new one is written before an old one goes.
        "checkpoints": run.checkpoint.keep_last + run.keeps_best + 1,
        "memory": {"fixed": fixed, "per_image": per_image, "total": fixed + micro * per_image},
    }


def _accepts(check: Callable[..., object], *arguments: object) -> bool:
    try:
        check(*arguments)
    except ConfigError:
        return False
    return True


def _split(run: TrainingRun, batch_size: int, nproc: int) -> None:
    optim: Any = replace(run.optim, batch_size=batch_size)
    replace(run, optim=optim).split_batch(nproc)


def _check_rotate(run: TrainingRun, rotate: int, same_theta: bool) -> None:
    replace(run.rope, rotate=rotate, same_theta=same_theta).check_head_dim(run.head_dim)


def memory_needs(run: TrainingRun, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of weights, gradients, optimizer and average, and bytes for each image, about."""
    with torch.device("meta"):
        network = model_of(run)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return BYTES_PER_PARAMETER * parameters, activation_bytes(run, network.to(dtype))


def activation_bytes(run: TrainingRun, network: nn.Module) -> int:
    """Bytes that autograd stores for one image, about."""
    dtype = next(network.parameters()).dtype
    own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept: dict[int, int] = {}
    held = []  # keeps storages alive, so that no address is used twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            held.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        network(*meta_inputs(run, 2, dtype))
    return sum(kept.values()) // 2


def memory_notes(machine: dict[str, Any] | None, planned: dict[str, Any] | None) -> list[str]:
    """A note if the run may need more memory than there is; an estimate."""
    if not machine or not planned:
        return []
    needs, available = planned["memory"], machine["memory"] / planned["nproc"]
    if machine["device"] == "cuda":
        available = min(gpu["memory"] for gpu in machine["gpus"])
    if needs["total"] <= available:
        return []
    most = int((available - needs["fixed"]) // needs["per_image"])
    advised = (
        f"--micro-batch-size {most} or less, or --grad-checkpointing"
        if most > 0
        else "a smaller --arch"
    )
    return [
        f"a process may need about {human_size(needs['total'])}, "
        f"{human_size(available)} are available: {advised}"
    ]
