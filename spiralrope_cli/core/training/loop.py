"""What every training loop does around its steps: build up, report, look at the loss, save."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spiralrope_cli.core.config.dit_runs import TrainingRun
from spiralrope_cli.core.config.nested import to_nested
from spiralrope_cli.core.errors import CheckpointError, TrainingError
from spiralrope_cli.core.runtime import distributed, environment, report, run_folder
from spiralrope_cli.core.runtime.job import Job
from spiralrope_cli.core.training import checkpoint
from spiralrope_cli.core.training.state import TrainState
from spiralrope_cli.core.training.step import LossMeter

LOWER_LR = "try a lower --lr, --clip-grad 1 or --precision fp32"


def agreed_first_step(config: TrainingRun) -> int:
    """The step at which all processes go on.

    Raises:
        CheckpointError: the machines of the run see different folders.
    """
    steps = set(distributed.gathered(run_folder.first_step(config)))
    if len(steps) > 1:
        raise CheckpointError(
            f"the machines see different checkpoints in {config.out}: steps {sorted(steps)}",
            "--out must be a folder that all of them share",
        )
    return steps.pop()


def prepare(
    config: TrainingRun, job: Job, model: nn.Module, step: int
) -> tuple[TrainState, nn.Module]:
    """Averages and optimizer of a model at a step, and the model as it is called.

    Args:
        config: the run.
        job: this worker.
        model: with the weights that it starts from, on the CPU.
        step: 0 to start, else that of the checkpoint which replaces its weights.
    """
    state = TrainState.create(model.to(job.device), config.optim)
    if step:
        checkpoint.restore(Path(config.out), step, state)
    elif job.is_first:
        checkpoint.check_space(Path(config.out), model)
    if config.machine.compile:
        model.compile()
    if job.world_size == 1:
        return state, model
    return state, DistributedDataParallel(model, gradient_as_bucket_view=True)


def open_report(config: TrainingRun, job: Job, state: TrainState) -> report.Reporter:
    """Puts the folder in order for a run from the state's step, and opens its reporter."""
    out, step = Path(config.out), state.step
    if job.is_first:
        checkpoint.remove_unfinished(out)
        run_folder.write_config(config)
        environment.write(out, job)
        report.forget_after(out, step)
    reporter = report.Reporter(
        out,
        total_steps=config.total_steps,
        steps_per_epoch=config.steps_per_epoch,
        tracker=config.machine.tracker,
        config=to_nested(config),
        first=job.is_first,
    )
    if step:
        reporter.say(f"resumed at step {step} of {config.total_steps}")
    reporter.say(
        f"{job.device.type}, {str(job.dtype).removeprefix('torch.')} ({job.precision_reason}), "
        f"{job.world_size} process(es) with {torch.get_num_threads()} thread(s) each"
    )
    reporter.start(step, state.best.get("acc1"))
    return reporter


def due(step: int, every: int, total_steps: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after this."""
    return step % every == 0 or step == total_steps


def read_finite(
    meter: LossMeter, config: TrainingRun, job: Job, remake: Callable[[int], dict[str, Tensor]]
) -> float:
    """Mean loss since the last look, or the end of the run where one was not finite.

    Args:
        meter: what was seen since.
        config: the run.
        job: this worker.
        remake: this process's batch of a step (counted from 0) again, to be kept; data order
            and augmentation follow from the step.

    Raises:
        TrainingError: names the step and the checkpoint that is good.
    """
    mean, bad_step, mine = meter.read()
    if bad_step is None:
        return mean
    kept = Path(config.out) / run_folder.CHECKPOINTS
    kept.mkdir(exist_ok=True)
    offending = kept / f"nonfinite-step-{bad_step:0{run_folder.STEP_DIGITS}d}-rank{job.rank}.pt"
    if mine:
        torch.save({"step": bad_step, **remake(bad_step - 1)}, offending)
    distributed.barrier()
    steps = run_folder.steps_on_disk(Path(config.out))
    last = f"step {steps[-1]} is the last good checkpoint" if steps else "no checkpoint was due yet"
    raise TrainingError(
        f"loss is not finite at step {bad_step}; {last}, the batch is in {kept}/nonfinite-*",
        LOWER_LR,
    )


def save(config: TrainingRun, job: Job, state: TrainState) -> None:
    """Writes a checkpoint from the first process; the others wait.

    Raises:
        TrainingError: a weight is not finite although the loss still was.
    """
    norm = nn.utils.get_total_norm(state.model.parameters())
    if not torch.isfinite(norm):
        raise TrainingError(
            f"weights are not finite after step {state.step}; nothing was saved", LOWER_LR
        )
    if job.is_first:
        plan = config.checkpoint
        metadata = {"config": json.dumps(to_nested(config)), "step": str(state.step)}
        checkpoint.save(Path(config.out), state, metadata, plan.keep_last, plan.keep_every)
    distributed.barrier()
