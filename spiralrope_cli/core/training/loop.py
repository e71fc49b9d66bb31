"""The training loop of both networks.

What differs between them is in a `Task`: `classification.py` and `diffusion.py` make one each.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp
from torch.nn.parallel import DistributedDataParallel

from spiralrope_cli.core.config.dit_runs import TrainingRun
from spiralrope_cli.core.config.option import to_nested
from spiralrope_cli.core.data.batches import TrainingData
from spiralrope_cli.core.data.loader import Batch
from spiralrope_cli.core.data.order import own_parts
from spiralrope_cli.core.errors import CheckpointError, TrainingError
from spiralrope_cli.core.models.deit import DeiT
from spiralrope_cli.core.models.factory import compile_blocks, model_of, pays_to_compile
from spiralrope_cli.core.runtime import distributed, run_folder
from spiralrope_cli.core.runtime.distributed import DistContext
from spiralrope_cli.core.runtime.progress import Reporter, forget_after
from spiralrope_cli.core.runtime.seeds import seed_everything
from spiralrope_cli.core.storage import CHECKPOINTS, CURVES_FILE
from spiralrope_cli.core.training import checkpoint
from spiralrope_cli.core.training.step import (
    Clock,
    LossMeter,
    TrainState,
    freeze_but,
    is_sharded,
    lr_at,
    set_learning_rate,
    total_norm,
    train_step,
)

MUCH_WAIT = 0.05
"""Fraction of the time from which on a log point says how long training waited for data."""
SMALLEST_BUCKET = 4
"""MiB; smaller messages are sent at less than the rate of the network."""
LOWER_LR = "try a lower --lr, --clip-grad 1 or --precision fp32"


@dataclass(frozen=True, kw_only=True)
class Task:
    """Data, loss and validation of a network, as the loop calls them."""

    data: TrainingData  # the loop clears its `waits`
    loss: Callable[[TrainState, nn.Module, Batch], Tensor]  # mean loss of one micro-batch
    black: Callable[[int], Batch]  # so many black images, as `loss` takes them, for a trial step
    extra: Callable[[], dict[str, float]] = dict  # further values of a log point
    inspect_at: Callable[[int], bool]  # whether to validate, or to sample, after this step
    # Before the checkpoint is saved, because the best one must be saved.
    validate: Callable[[TrainState, Reporter], None] | None = None
    # After the checkpoint is saved, on the first process, also after the last step; a sharded
    # network needs all processes.
    sample: Callable[[TrainState, Reporter], None] | None = None
    measure_at: Callable[[int], bool] = lambda step: False  # whether to measure after this step
    # After all that, in all processes, unless the log has it; returns the number of a signal that
    # stopped it, else 0. The resumed run then measures first.
    measure: Callable[[TrainState, Reporter], int] = lambda state, reporter: 0

    def split_as(self, config: TrainingRun, ctx: DistContext) -> Task:
        """The task with the micro-batches of a config."""
        parts = own_parts(ctx.rank, *config.split_batch(ctx.world_size))
        return replace(self, data=replace(self.data, parts=parts))


def training_loop(
    config: TrainingRun,
    ctx: DistContext,
    task: Task,
    state: TrainState,
    forward: nn.Module,
    reporter: Reporter,
) -> None:
    """Trains to the last step; after a signal it saves a checkpoint and exits."""
    total_steps, optim = config.total_steps, config.optim
    if task.measure_at(state.step) and (stop := task.measure(state, reporter)):
        leave(stop, state, reporter)
    meter, clock = LossMeter(ctx.device), Clock(state.step)
    with contextlib.closing(task.data.train_steps(state.step, total_steps)) as batches:
        while state.step < total_steps:
            lr = lr_at(state.step, total_steps, config.steps_per_epoch, optim)
            set_learning_rate(state.optimizer, lr)
            log_now = due(state.step + 1, config.checkpoint.log_every, total_steps)
            loss, grad_norm = train_step(
                state,
                forward,
                next(batches),
                partial(task.loss, state),
                clip_grad=optim.clip_grad,
                want_grad_norm=log_now,
            )
            meter.add(state.step, loss)
            reporter.advance(state.step)
            if log_now:  # only here the loop waits for the device, checkpoints apart
                mean = read_finite(meter, config, ctx, task.data.remake)
                values = {"loss": mean, "lr": lr, **task.extra()}
                if grad_norm is not None:
                    values["grad_norm"] = grad_norm.item()
                num_steps, seconds = clock.lap(state.step)
                values["images_per_s"] = optim.batch_size * num_steps / seconds
                reporter.log(state.step, values | data_wait(task.data, seconds, ctx, reporter))
            stop = ctx.stop.agreed(ctx.device, ask_all=log_now)
            if stop or anything_due(config, task, state.step):
                with clock.pause():
                    read_finite(meter, config, ctx, task.data.remake)
                    stop = after_step(config, ctx, task, state, reporter, stop)
            if stop and (state.step < total_steps or task.measure_at(state.step)):
                leave(stop, state, reporter)
    if task.sample and (ctx.is_first or is_sharded(state.model)):
        task.sample(state, reporter)


def anything_due(config: TrainingRun, task: Task, step: int) -> bool:
    """Whether there is more to do after this step than to log it."""
    save_now = due(step, config.save_steps, config.total_steps)
    return save_now or task.inspect_at(step) or task.measure_at(step)


def after_step(
    config: TrainingRun,
    ctx: DistContext,
    task: Task,
    state: TrainState,
    reporter: Reporter,
    stop: int,
) -> int:
    """Validates, saves, samples and measures, in this order; the signal to stop for, or 0."""
    inspect_now = task.inspect_at(state.step)
    save_now = stop or due(state.step, config.save_steps, config.total_steps)
    if inspect_now and task.validate:
        task.validate(state, reporter)
    if save_now or state.best.get("step") == state.step:
        save_checkpoint(config, ctx, state)
    if inspect_now and task.sample and (ctx.is_first or is_sharded(state.model)):
        task.sample(state, reporter)
    if task.measure_at(state.step) and not stop:
        stop = task.measure(state, reporter)
        if stop and not save_now:
            save_checkpoint(config, ctx, state)
    return stop


def leave(stop: int, state: TrainState, reporter: Reporter) -> NoReturn:
    """Exits after a signal, with its code."""
    reporter.say(f"stopped at step {state.step}; the same command resumes")
    sys.exit(128 + stop)


def data_wait(
    data: TrainingData, seconds: float, ctx: DistContext, reporter: Reporter
) -> dict[str, float]:
    """Fraction of the seconds in which the slowest process waited for data, if it is much."""
    own = torch.tensor(sum(data.waits) / seconds, device=ctx.device)
    data.waits.clear()
    wait = distributed.all_reduce(own, ReduceOp.MAX).item()
    if wait < MUCH_WAIT:
        return {}
    reporter.say_once(f"training waits for data; this helps: {data.helps}")
    return {"data_wait": wait}


def due(step: int, every: int, total_steps: int) -> bool:
    """Whether this step is a multiple of `every`, or the last."""
    return step % every == 0 or step == total_steps


def agreed_first_step(config: TrainingRun) -> int:
    """The step from which all processes resume; raises if the machines see different folders."""
    steps = set(distributed.all_gather_object(run_folder.first_step(config)))
    if len(steps) > 1:
        raise CheckpointError(
            f"the machines see different checkpoints in {config.out}: steps {sorted(steps)}",
            "--out must be a folder that all of them share",
        )
    return steps.pop()


def build_state(
    config: TrainingRun, ctx: DistContext, step: int, load_pretrained: Callable[[Any], None]
) -> tuple[TrainState, nn.Module]:
    """State at a step, and the model wrapped for compilation and several processes.

    At step 0 the weights are random, or those that `load_pretrained` loads; at any other step
    they are loaded from its checkpoint.
    """
    # The same initial weights in every process.
    seed_everything(config.seed, "init", device=ctx.device)
    model = model_of(config)
    if config.source and not step:
        load_pretrained(model)
    if config.optim.freeze != "none":
        freeze_but(model, config.optim.freeze)
    model.grad_checkpointing = config.machine.grad_checkpointing
    if config.machine.shard and ctx.world_size > 1:
        state = TrainState.create(model, config.optim, shard_on=ctx.device)
    else:
        state = TrainState.create(model.to(ctx.device), config.optim)
    if step:
        checkpoint.restore(Path(config.out), step, state)
    elif ctx.is_first:
        checkpoint.check_fits(Path(config.out), model)
    # By the whole run, so that a resumed one of the same length does the same.
    images = 3 * config.optim.batch_size * config.total_steps / ctx.world_size
    if pays_to_compile(config.machine.compile, model, ctx.device, images):
        compile_blocks(model, state.ema.module, say=ctx.say)
    if ctx.world_size == 1 or is_sharded(model):
        return state, model
    bucket = bucket_mib(model)
    return state, DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=bucket)


def bucket_mib(model: nn.Module) -> float:
    """MiB of the gradients that DDP reduces at once: those of a block.

    So the reduction of a block begins when its backward pass is done, also of a compiled one.
    """
    weights = sum(parameter.numel() for parameter in cast(DeiT, model).blocks[0].parameters())
    return max(SMALLEST_BUCKET, 4 * weights / 2**20)


def open_report(config: TrainingRun, ctx: DistContext, state: TrainState) -> Reporter:
    """Prepares the run folder, and starts progress and logs at the state's step."""
    out, step = Path(config.out), state.step
    if ctx.is_first:
        checkpoint.remove_unfinished(out)
        (out / CURVES_FILE).unlink(missing_ok=True)  # of a run that was shorter
        run_folder.write_config(config)
        distributed.write_environment(out, ctx)
        forget_after(out, step)
    best_acc1 = state.best.get("acc1")
    reporter = Reporter(config, step=step, best_acc1=best_acc1, first=ctx.is_first)
    if step:
        reporter.say(f"resumed at step {step} of {config.total_steps}")
    reporter.say(
        f"{ctx.device.type}, {ctx.precision} ({ctx.precision_reason}), "
        f"{ctx.world_size} process(es) with {torch.get_num_threads()} thread(s) each"
    )
    return reporter


def read_finite(
    meter: LossMeter,
    config: TrainingRun,
    ctx: DistContext,
    remake: Callable[[int], dict[str, Tensor]],
) -> float:
    """Mean loss since the last call; raises if a loss was not finite, and saves that batch."""
    mean, bad_step, mine = meter.read()
    if bad_step is None:
        return mean
    kept = Path(config.out) / CHECKPOINTS
    kept.mkdir(exist_ok=True)
    offending = kept / f"nonfinite-step-{bad_step:0{run_folder.STEP_DIGITS}d}-rank{ctx.rank}.pt"
    if mine:
        torch.save({"step": bad_step, **remake(bad_step - 1)}, offending)
    distributed.barrier()
    steps = run_folder.steps_on_disk(Path(config.out))
    last = f"step {steps[-1]} is the last good checkpoint" if steps else "no checkpoint was due yet"
    raise TrainingError(
        f"loss is not finite at step {bad_step}; {last}, the batch is in {kept}/nonfinite-*",
        LOWER_LR,
    )


def save_checkpoint(config: TrainingRun, ctx: DistContext, state: TrainState) -> None:
    """The first process writes a checkpoint, the others wait; raises if a weight is not finite."""
    norm = total_norm(state.model.parameters())
    if not torch.isfinite(norm):
        raise TrainingError(
            f"weights are not finite after step {state.step}; nothing was saved", LOWER_LR
        )
    files = checkpoint.contents(state)
    if ctx.is_first:
        plan = config.checkpoint
        metadata = {"config": json.dumps(to_nested(config)), "step": str(state.step)}
        checkpoint.save(Path(config.out), files, metadata, plan.keep_last, plan.keep_every)
    distributed.barrier()
