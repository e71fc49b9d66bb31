"""`--micro-batch-size auto`: on a GPU the largest micro-batch that fits, found by trial steps."""

from __future__ import annotations

import bisect
import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from spiralrope_cli.core.config.dit_runs import TrainingRun
from spiralrope_cli.core.config.recipes import (
    micro_batch_sizes,
    with_micro_batch,
    with_usual_micro_batch,
)
from spiralrope_cli.core.data.loader import Batch
from spiralrope_cli.core.errors import TrainingError
from spiralrope_cli.core.models.factory import model_of
from spiralrope_cli.core.runtime import distributed
from spiralrope_cli.core.runtime.distributed import DistContext
from spiralrope_cli.core.runtime.progress import human_size
from spiralrope_cli.core.training.loop import Task
from spiralrope_cli.core.training.needs import FILL, memory_needs
from spiralrope_cli.core.training.step import TrainState, freeze_but, train_step


def with_fitting_micro_batch(
    config: TrainingRun, ctx: DistContext, open_task: Callable[[TrainingRun, DistContext], Task]
) -> TrainingRun:
    """The run with a number in place of `auto`; every process must call it, and gets the same.

    Raises:
        TrainingError: not even the smallest micro-batch fits.
    """
    if config.optim.micro_batch_size is not None or ctx.device.type != "cuda":
        return with_usual_micro_batch(config, ctx.world_size)
    sizes = micro_batch_sizes(config, ctx.world_size)
    with limited_memory(ctx.device) as free:
        fixed, per_image = memory_needs(config, ctx.dtype)
        guess = min(distributed.all_gather_object((free - fixed) / per_image))
        size = largest_that_fits(sizes, guess, trial_steps(config, ctx, open_task))
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


def trial_steps(
    config: TrainingRun, ctx: DistContext, open_task: Callable[[TrainingRun, DistContext], Task]
) -> Callable[[int], bool]:
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
    state, task = TrainState.create(model, config.optim), open_task(config, ctx)
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
