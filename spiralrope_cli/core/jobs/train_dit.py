"""Trains a diffusion transformer: the story from an empty folder to curves and samples."""

from __future__ import annotations

import contextlib
import sys
from collections import ChainMap
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from spiralrope_cli.core.config.dit_runs import DiTRun
from spiralrope_cli.core.data.dit_loader import DiTBatch, DiTData
from spiralrope_cli.core.diffusion.process import GaussianDiffusion
from spiralrope_cli.core.diffusion.vae import Vae, draw, load_vae
from spiralrope_cli.core.hub.vae import find_vae
from spiralrope_cli.core.jobs import sample_grid
from spiralrope_cli.core.jobs.start import build
from spiralrope_cli.core.models.dit import DiT
from spiralrope_cli.core.plots.curves import draw_curves
from spiralrope_cli.core.report.page import leave_report
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
        bound, vae = LossMeter(job.device), open_vae(config, job)
        scale = vae.scale if vae else data.scale
        loss_fn = DiffusionLoss(
            config, job.device, job.dtype, vae, scale, GaussianDiffusion(), bound
        )
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
                    partial(loss_fn, state),
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
                            reporter.say(sample_grid.draw_grid(config, job, state, vae))
                if stop and state.step < total_steps:
                    reporter.say(f"stopped at step {state.step}; the same command resumes")
                    sys.exit(128 + stop)
            if job.is_first:
                reporter.say(sample_grid.draw_grid(config, job, state, vae))
        unreadable = distributed.gathered(data.bad.reasons)
        if job.is_first:
            report.say_unreadable(dict(ChainMap(*unreadable)))
            draw_curves([out], out / run_folder.CURVES_FILE)
            leave_report(out)
            report.print_results(out)


def open_vae(config: DiTRun, job: Job) -> Vae | None:
    """The VAE that pictures go through in every step, if any.

    Raises:
        CheckpointError: damaged, or of another kind.
        FetchError: it is not here and cannot be had.
    """
    if not config.pictures.in_latents or config.pictures.latents:
        return None
    with distributed.first_alone():  # it may have to be fetched
        folder = find_vae(config.pictures.vae).folder
    # In fp32, as the cache and the published code have it.
    return load_vae(folder, job.device)


@dataclass(frozen=True)
class DiffusionLoss:
    """Mean loss of a micro batch.

    All that is random about a sample follows from seed, step and its place in the step, so that
    it is the same for any number of processes and any accumulation.

    Attributes:
        config: the run.
        device: where it computes.
        dtype: of autocast.
        vae: of pictures that go through one.
        scale: of the latents.
        diffusion: the process.
        bound: takes the variational bound of each micro batch.
    """

    config: DiTRun
    device: torch.device
    dtype: torch.dtype
    vae: Vae | None
    scale: float
    diffusion: GaussianDiffusion
    bound: LossMeter

    def __call__(self, state: TrainState, forward: nn.Module, batch: DiTBatch) -> Tensor:
        """Draws timesteps, noise and dropped labels, and compares the predicted noise."""
        seed, step, size = self.config.seed, state.step, self.config.optim.batch_size
        x0 = self.clean(step, batch)
        t = torch.randint(
            self.diffusion.num_steps, (size,), generator=generator_for(seed, "timestep", step)
        )
        t = t[batch.part].to(self.device, non_blocking=True)
        drop = cast(DiT, state.model).draw_drop(size, generator_for(seed, "label", step))
        if drop is not None:
            drop = drop[batch.part].to(self.device, non_blocking=True)
        noise = self.noise("noise", step, batch, x0)
        with autocast(self.device, self.dtype):
            losses = self.diffusion.training_losses(
                forward, x0, t, noise, y=batch.labels, drop=drop
            )
        self.bound.add(step, losses["vb"].detach().mean())
        return losses["loss"].mean()

    def clean(self, step: int, batch: DiTBatch) -> Tensor:
        """What is noised: pixels, or a fresh draw from the posterior of the latents."""
        mean, std = batch.images, batch.std
        if self.vae is not None:
            mean, std = self.vae.encode(batch.images)
        if std is None:
            return mean
        return draw(mean, std, self.noise("posterior", step, batch, mean), self.scale)

    def noise(self, purpose: str, step: int, batch: DiTBatch, like: Tensor) -> Tensor:
        """Standard normal, as `like`, from a generator of each sample's own."""
        first = step * self.config.optim.batch_size
        samples = range(first + batch.part.start, first + batch.part.stop)
        return NoisePerImage(self.config.seed, samples, like.shape[1:], self.device, purpose).draw()
