"""Trains a classifier: the story from an empty folder to curves and figures."""

from __future__ import annotations

import contextlib
import sys
from collections import ChainMap
from functools import partial
from pathlib import Path
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from spiralrope_cli.core.config.runs import ClassifierRun
from spiralrope_cli.core.data.loaders import Batch, ClassifierData
from spiralrope_cli.core.jobs.start import build
from spiralrope_cli.core.metrics.accuracy import evaluate
from spiralrope_cli.core.models.deit import DeiT
from spiralrope_cli.core.plots.curves import draw_curves
from spiralrope_cli.core.report.page import leave_report
from spiralrope_cli.core.runtime import distributed, report, run_folder
from spiralrope_cli.core.runtime.device import autocast
from spiralrope_cli.core.runtime.job import Job, open_job
from spiralrope_cli.core.runtime.seeds import generator_for
from spiralrope_cli.core.training import loop
from spiralrope_cli.core.training.lr import lr_at, set_learning_rate
from spiralrope_cli.core.training.state import TrainState
from spiralrope_cli.core.training.step import LossMeter, train_step


def run(config: ClassifierRun) -> None:
    """Trains until the last step, or until a signal; executed by every worker.

    Raises:
        TrainingError: a loss was not finite.
        CheckpointError: the folder holds another run, is in use, or cannot be written.
        DataError: the data set is missing or damaged.
    """
    out, total_steps, optim = Path(config.out), config.total_steps, config.optim
    with open_job(config.machine, out) as job:
        step = loop.agreed_first_step(config)
        data = ClassifierData(config, job.device, job.rank, job.world_size)
        state, forward = build(config, job, step)
        steps = contextlib.closing(data.train_steps(step, total_steps))
        with loop.open_report(config, job, state) as reporter, steps as batches:
            meter, clock = LossMeter(job.device), report.Clock(optim.batch_size, step)
            while state.step < total_steps:
                lr = lr_at(state.step, total_steps, config.steps_per_epoch, optim)
                set_learning_rate(state.optimizer, lr)
                log_now = loop.due(state.step + 1, config.checkpoint.log_every, total_steps)
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
                    values = {"loss": loop.read_finite(meter, config, job, data.remake), "lr": lr}
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
                        loop.read_finite(meter, config, job, data.remake)
                        if validate_now:
                            validate(config, job, state, data, reporter)
                        if save_now or state.best.get("step") == state.step:
                            loop.save(config, job, state)
                if stop and state.step < total_steps:
                    reporter.say(f"stopped at step {state.step}; the same command resumes")
                    sys.exit(128 + stop)
        unreadable = distributed.gathered(data.bad.reasons)
        if job.is_first:
            report.say_unreadable(dict(ChainMap(*unreadable)))
            draw_curves([out], out / run_folder.CURVES_FILE)
            leave_report(out)
            report.print_results(out)


def due_epochs(config: ClassifierRun, step: int, every: int) -> bool:
    """The same for every so many epochs."""
    return loop.due(step, every * config.steps_per_epoch, config.total_steps)


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
        data.validation.batches(),
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
