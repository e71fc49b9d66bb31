"""Trains a diffusion transformer: the story from an empty folder to curves and samples."""

from __future__ import annotations

import contextlib
import sys
from collections import ChainMap
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from spiralrope_cli.core.config.dit_runs import DiTRun
from spiralrope_cli.core.data.dit_loader import DiTBatch, DiTData
from spiralrope_cli.core.diffusion.process import GaussianDiffusion
from spiralrope_cli.core.jobs import sample_grid
from spiralrope_cli.core.jobs.plot import draw_curves
from spiralrope_cli.core.jobs.start import build
from spiralrope_cli.core.models.dit import DiT
from spiralrope_cli.core.runtime import distributed, report, run_folder
from spiralrope_cli.core.runtime.device import autocast
from spiralrope_cli.core.runtime.job import Job, open_job
from spiralrope_cli.core.runtime.seeds import NoisePerImage, generator_for
from spiralrope_cli.core.training import loop
from spiralrope_cli.core.training.lr import lr_at, set_learning_rate
from spiralrope_cli.core.training.state import TrainState
from spiralrope_cli.core.training.step import LossMeter, train_step


def run(config: DiTRun) -> None:
    """Trains until the last step, or until a signal; executed by every worker.

    Raises:
        TrainingError: a loss was not finite.
        CheckpointError: the folder holds another run, is in use, or cannot be written.
        DataError: the data set is missing or damaged.
    """
    out, total_steps, optim = Path(config.out), config.total_steps, config.optim
    with open_job(config.machine, out) as job:
        step = loop.agreed_first_step(config)
        data = DiTData(config, job.device, job.rank, job.world_size)
        state, forward = build(config, job, step)
        diffusion, bound = GaussianDiffusion(), LossMeter(job.device)
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
                    partial(diffusion_loss, config, job, state, diffusion, bound),
                    clip_grad=optim.clip_grad,
                    want_grad_norm=log_now,
                )
                meter.add(state.step, loss)
                reporter.moved(state.step)
                if log_now:
                    values = {"loss": loop.read_finite(meter, config, job, data.remake), "lr": lr}
                    values["vb"], *_ = bound.read()
                    if grad_norm is not None:
                        values["grad_norm"] = grad_norm.item()
                    values["images_per_s"] = clock.rate(state.step)
                    reporter.log(state.step, values)
                stop = job.stop.agreed(job.device, ask_all=log_now)
                sample_now = config.samples_at(state.step)
                save_now = stop or loop.due(state.step, config.checkpoint.save_every, total_steps)
                if sample_now or save_now:
                    with clock.pause():
                        loop.read_finite(meter, config, job, data.remake)
                        if save_now:
                            loop.save(config, job, state)
                        if sample_now and job.is_first:
                            reporter.say(f"samples: {sample_grid.draw_grid(config, job, state)}")
                if stop and state.step < total_steps:
                    reporter.say(f"stopped at step {state.step}; the same command resumes")
                    sys.exit(128 + stop)
        unreadable = distributed.gathered(data.bad.reasons)
        if job.is_first:
            report.say_unreadable(dict(ChainMap(*unreadable)))
            sample_grid.draw_grid(config, job, state)
            draw_curves([out], out / run_folder.CURVES_FILE)
            report.print_results(out)


def diffusion_loss(
    config: DiTRun,
    job: Job,
    state: TrainState,
    diffusion: GaussianDiffusion,
    bound: LossMeter,
    forward: nn.Module,
    batch: DiTBatch,
) -> Tensor:
    """Mean loss of one micro batch.

    Timestep, noise and dropped label of a sample follow from seed, step and its place in the
    step, so that they are the same for any number of processes and any accumulation.
    """
    seed, step, batch_size, part = config.seed, state.step, config.optim.batch_size, batch.part
    timesteps = torch.randint(
        diffusion.num_steps, (batch_size,), generator=generator_for(seed, "timestep", step)
    )
    t = timesteps[part].to(job.device, non_blocking=True)
    drop = cast(DiT, state.model).draw_drop(batch_size, generator_for(seed, "label", step))
    if drop is not None:
        drop = drop[part].to(job.device, non_blocking=True)
    x0 = batch.images
    samples = range(step * batch_size + part.start, step * batch_size + part.stop)
    noise = NoisePerImage(seed, samples, x0.shape[1:], job.device, purpose="noise").draw()
    with autocast(job.device, job.dtype):
        losses = diffusion.training_losses(forward, x0, t, noise, y=batch.labels, drop=drop)
    bound.add(step, losses["vb"].detach().mean())
    return losses["loss"].mean()
