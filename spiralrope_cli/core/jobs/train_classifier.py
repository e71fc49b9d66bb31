"""Trains a classifier: the story from an empty folder to curves and figures."""

from __future__ import annotations

import contextlib
import json
import sys
from collections import ChainMap
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spiralrope_cli.core.config.resolve import to_nested
from spiralrope_cli.core.config.runs import ClassifierRun
from spiralrope_cli.core.data.loaders import Batch, ClassifierData
from spiralrope_cli.core.errors import CheckpointError, TrainingError
from spiralrope_cli.core.hub.source import find_source
from spiralrope_cli.core.jobs.plot import draw_curves
from spiralrope_cli.core.load import start_from
from spiralrope_cli.core.metrics.accuracy import evaluate
from spiralrope_cli.core.models.build import create_model
from spiralrope_cli.core.models.deit import DeiT
from spiralrope_cli.core.runtime import distributed, report, run_folder
from spiralrope_cli.core.runtime.device import autocast
from spiralrope_cli.core.runtime.job import Job, open_job
from spiralrope_cli.core.runtime.seeds import generator_for, seed_everything
from spiralrope_cli.core.training import checkpoint
from spiralrope_cli.core.training.lr import lr_at, set_learning_rate
from spiralrope_cli.core.training.optim import freeze_but
from spiralrope_cli.core.training.state import TrainState
from spiralrope_cli.core.training.step import LossMeter, train_step
from spiralrope_cli.core.weights import Weights, here, read_weights


def run(config: ClassifierRun) -> None:
    """Trains until the last step, or until a signal; executed by every worker.

    Raises:
        TrainingError: a loss was not finite.
        CheckpointError: the folder holds another run, is in use, or cannot be written.
        DataError: the data set is missing or damaged.
    """
    out, total_steps, optim = Path(config.out), config.total_steps, config.optim
    with open_job(config.machine, out) as job:
        step = agreed_first_step(config)
        data = ClassifierData(config, job.device, job.rank, job.world_size)
        state, forward = build(config, job, step)
        steps = contextlib.closing(data.train_steps(step, total_steps))
        with open_report(config, job, state) as reporter, steps as batches:
            meter, clock = LossMeter(job.device), report.Clock(optim.batch_size, step)
            while state.step < total_steps:
                lr = lr_at(state.step, total_steps, config.steps_per_epoch, optim)
                set_learning_rate(state.optimizer, lr)
                log_now = due(state.step + 1, config.checkpoint.log_every, total_steps)
                loss, grad_norm = train_step(
                    state,
                    forward,
                    next(batches),
                    partial(classifier_loss, config, job, state),
                    clip_grad=optim.clip_grad,
                    want_grad_norm=log_now,
                )
                meter.add(state.step, loss)
                reporter.moved(state.step)
                if log_now:
                    values = {"loss": read_finite(meter, config, job, data), "lr": lr}
                    if grad_norm is not None:
                        values["grad_norm"] = grad_norm.item()
                    values["images_per_s"] = clock.rate(state.step)
                    reporter.log(state.step, values)
                stop = job.stop.agreed(job.device, ask_all=log_now)
                validate_now = due_epochs(config, state.step, config.checkpoint.validate_every)
                save_now = stop or due_epochs(config, state.step, config.checkpoint.save_every)
                if validate_now or save_now:
                    # Finite before measured, measured before saved: the best must be on disk.
                    with clock.pause():
                        read_finite(meter, config, job, data)
                        if validate_now:
                            validate(config, job, state, data, reporter)
                        if save_now or state.best.get("step") == state.step:
                            save(config, job, state)
                if stop and state.step < total_steps:
                    reporter.say(f"stopped at step {state.step}; the same command resumes")
                    sys.exit(128 + stop)
        unreadable = distributed.gathered(data.bad.reasons)
        if job.is_first:
            report.say_unreadable(dict(ChainMap(*unreadable)))
            draw_curves([out], out / run_folder.CURVES_FILE)
            report.print_results(out)


def agreed_first_step(config: ClassifierRun) -> int:
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


def due(step: int, every: int, total_steps: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after this."""
    return step % every == 0 or step == total_steps


def due_epochs(config: ClassifierRun, step: int, every: int) -> bool:
    """The same for every so many epochs."""
    return due(step, every * config.steps_per_epoch, config.total_steps)


def open_report(config: ClassifierRun, job: Job, state: TrainState) -> report.Reporter:
    """Puts the folder in order for a run from the state's step, and opens its reporter."""
    out, step = Path(config.out), state.step
    if job.is_first:
        checkpoint.remove_unfinished(out)
        run_folder.write_config(config)
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


def build(config: ClassifierRun, job: Job, step: int) -> tuple[TrainState, nn.Module]:
    """Model, averages and optimizer at a step, and the model as it is called."""
    seed_everything(config.seed, "init")
    model = create_model(
        config.arch,
        rope=config.rope,
        num_classes=config.model.num_classes,
        image_size=config.model.image_size,
        patch_size=config.model.patch_size,
        in_chans=config.model.in_chans,
        drop_path=config.model.drop_path,
        pretrain_grid=config.model.pretrain_grid,
    )
    if config.source and not step:
        start_from(starting_weights(config), model)
    model = model.to(job.device)
    freeze_but(model, config.optim.freeze)
    model.grad_checkpointing = config.machine.grad_checkpointing
    state = TrainState.create(model, config.optim)
    if step:
        checkpoint.restore(Path(config.out), step, state)
    elif job.is_first:
        checkpoint.check_space(Path(config.out), model)
    if config.machine.compile:
        model.compile()
    if job.world_size == 1:
        return state, model
    return state, DistributedDataParallel(model, gradient_as_bucket_view=True)


def starting_weights(config: ClassifierRun) -> Weights:
    """The averaged weights of the run's source."""
    return read_weights(here(find_source(config.source)), ema=True, rope=asdict(config.rope))


def classifier_loss(
    config: ClassifierRun, job: Job, state: TrainState, forward: nn.Module, batch: Batch
) -> Tensor:
    """Mean cross entropy of one micro batch, with this step's stochastic depth."""
    model = cast(DeiT, state.model)
    randomness = generator_for(config.seed, "depth", state.step)
    keep = model.draw_keep(config.optim.batch_size, randomness)
    if keep is not None:
        keep = keep[..., batch.part].to(job.device, non_blocking=True)
    with autocast(job.device, job.dtype):
        logits = forward(batch.images, keep)
    smoothing = 0.0 if config.augment.mixes else config.augment.smoothing
    return F.cross_entropy(logits.float(), batch.targets, label_smoothing=smoothing)


def validate(
    config: ClassifierRun,
    job: Job,
    state: TrainState,
    data: ClassifierData,
    reporter: report.Reporter,
) -> None:
    """Measures raw and averaged weights, and remembers the best raw ones."""
    figures = evaluate(
        {"raw": state.model, "ema": state.ema.module},
        data.val_batches(),
        job.device,
        partial(autocast, job.device, job.dtype),
    )
    raw, ema = figures["raw"], figures["ema"]
    values = {
        "epoch": state.step / config.steps_per_epoch,
        "acc1": raw.acc1,
        "acc5": raw.acc5,
        "val_loss": raw.loss,
        "ema_acc1": ema.acc1,
        "ema_acc5": ema.acc5,
        "ema_val_loss": ema.loss,
        "count": raw.count,
    }
    if not state.best or raw.acc1 > state.best["acc1"]:
        state.best = {"step": state.step, **values}
    reporter.validated(state.step, values, state.best["acc1"])


def save(config: ClassifierRun, job: Job, state: TrainState) -> None:
    """Writes a checkpoint from the first process; the others wait.

    Raises:
        TrainingError: a weight is not finite although the loss still was.
    """
    norm = nn.utils.get_total_norm(state.model.parameters())
    if not torch.isfinite(norm):
        raise TrainingError(
            f"weights are not finite after step {state.step}; nothing was saved",
            "try a lower --lr, --clip-grad 1 or --precision fp32",
        )
    if job.is_first:
        plan = config.checkpoint
        metadata = {"config": json.dumps(to_nested(config)), "step": str(state.step)}
        checkpoint.save(Path(config.out), state, metadata, plan.keep_last, plan.keep_every)
    distributed.barrier()


def read_finite(meter: LossMeter, config: ClassifierRun, job: Job, data: ClassifierData) -> float:
    """Mean loss since the last look, or the end of the run where one was not finite."""
    mean, bad_step, mine = meter.read()
    if bad_step is None:
        return mean
    kept = Path(config.out) / run_folder.CHECKPOINTS
    kept.mkdir(exist_ok=True)
    offending = kept / f"nonfinite-step-{bad_step:0{run_folder.STEP_DIGITS}d}-rank{job.rank}.pt"
    if mine:
        # Data order and augmentation follow from the step, so the batch can be made again.
        batches = next(iter(data.train_steps(bad_step - 1, bad_step)))
        torch.save(
            {
                "step": bad_step,
                "images": torch.cat([batch.images.cpu() for batch in batches]),
                "targets": torch.cat([batch.targets.cpu() for batch in batches]),
                "numbers": torch.cat([batch.numbers for batch in batches]),
            },
            offending,
        )
    distributed.barrier()
    steps = run_folder.steps_on_disk(Path(config.out))
    last = f"step {steps[-1]} is the last good checkpoint" if steps else "no checkpoint was due yet"
    raise TrainingError(
        f"loss is not finite at step {bad_step}; {last}, the batch is in {kept}/nonfinite-*",
        "try a lower --lr, --clip-grad 1 or --precision fp32",
    )
