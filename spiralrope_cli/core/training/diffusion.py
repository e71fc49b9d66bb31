"""The DiT's task: images or latents, diffusion loss, sample grids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from spiralrope_cli.core.config.dit_runs import GRID_ROWS, DiTRun
from spiralrope_cli.core.data.batches import dit_data
from spiralrope_cli.core.data.images import image_grid, to_uint8
from spiralrope_cli.core.data.loader import Batch, BatchIndices
from spiralrope_cli.core.diffusion.gaussian import GaussianDiffusion
from spiralrope_cli.core.diffusion.vae import Vae, load_vae, sample_posterior
from spiralrope_cli.core.errors import DataError, SpiralRopeError
from spiralrope_cli.core.models.dit import DiT
from spiralrope_cli.core.runtime import distributed
from spiralrope_cli.core.runtime.device import autocast
from spiralrope_cli.core.runtime.distributed import DistContext
from spiralrope_cli.core.runtime.progress import Reporter
from spiralrope_cli.core.runtime.run_folder import sample_file
from spiralrope_cli.core.runtime.seeds import NoisePerImage, generator_for
from spiralrope_cli.core.storage import SAMPLES_FILE, atomic_write
from spiralrope_cli.core.training.loop import Task
from spiralrope_cli.core.training.step import LossMeter, TrainState, is_sharded

STEPS = 50
DECODED_AT_ONCE = 4


def diffusion(
    config: DiTRun,
    ctx: DistContext,
    find_vae: Callable[[str], Any],
    local_vae: Callable[[str], Any],
) -> Task:
    """Data, loss and sample grids of a DiT.

    `find_vae` returns the files of a VAE by name, and may download it; `local_vae` does not
    download, and returns None if it is missing.
    """
    data = dit_data(config, ctx.device, ctx.rank, ctx.world_size)
    vae = None
    if config.images.in_latents and not config.images.latents:
        with distributed.main_process_first():  # it may have to be fetched
            files = find_vae(config.images.vae)
        vae = load_vae(files.folder, ctx.device)  # in fp32, as in the cache and the published code
    bound = LossMeter(ctx.device)
    scale = vae.scale if vae else data.scale
    return Task(
        data=data,
        loss=DiffusionLoss(config, ctx.device, ctx.dtype, vae, scale, GaussianDiffusion(), bound),
        black=partial(black_inputs, config, ctx.device),
        extra=lambda: {"vb": bound.read()[0]},
        inspect_at=config.samples_at,
        sample=partial(save_grid, config, ctx, vae, local_vae),
    )


def black_inputs(config: DiTRun, device: torch.device, number: int) -> Batch:
    """A batch of black images of class 0, or of their latents."""
    at = BatchIndices([], [], part=slice(0, number))
    shape = (3, *config.image_size) if config.vae_in_loop else config.input_shape
    images = torch.zeros(number, *shape, device=device)
    std = torch.zeros_like(images) if config.images.latents else None
    return Batch(at, images, torch.zeros(number, dtype=torch.int64, device=device), std)


@dataclass(frozen=True)
class DiffusionLoss:
    """Mean loss of a micro-batch; the variational bound is added to `bound`.

    All random numbers of a sample are a function of seed, step and its place in the batch of the
    step. So they are the same for any number of processes and micro-batches.
    """

    config: DiTRun
    device: torch.device
    dtype: torch.dtype
    vae: Vae | None
    scale: float
    diffusion: GaussianDiffusion
    bound: LossMeter

    def __call__(self, state: TrainState, forward: nn.Module, batch: Batch) -> Tensor:
        """Timesteps, dropped labels and noise have a generator each."""
        seed, step, size = self.config.seed, state.step, self.config.optim.batch_size
        x0 = self.clean(step, batch)
        # For the whole batch of the step; this micro-batch takes its part.
        generator = generator_for(seed, "timestep", step)
        t = torch.randint(self.diffusion.num_steps, (size,), generator=generator)
        t = t[batch.at.part].to(self.device, non_blocking=True)
        drop_mask = cast(DiT, state.model).label_drop_mask(size, generator_for(seed, "label", step))
        if drop_mask is not None:
            drop_mask = drop_mask[batch.at.part].to(self.device, non_blocking=True)
        noise = self.noise("noise", step, batch, x0)
        with autocast(self.device, self.dtype):
            losses = self.diffusion.training_losses(
                forward, x0, t, noise, y=batch.labels, label_drop_mask=drop_mask
            )
        self.bound.add(step, losses["vb"].detach().mean())
        return losses["loss"].mean()

    def clean(self, step: int, batch: Batch) -> Tensor:
        """x_0: pixels, or latents sampled from the posterior, anew in each step."""
        mean, std = batch.images, batch.std
        if self.vae is not None:
            mean, std = self.vae.encode(batch.images)
        if std is None:
            return mean
        return sample_posterior(mean, std, self.noise("posterior", step, batch, mean), self.scale)

    def noise(self, purpose: str, step: int, batch: Batch, like: Tensor) -> Tensor:
        """Standard normal like `like`, from one generator per sample; one of `NOISES`."""
        if purpose in batch.noise:
            return batch.noise[purpose]
        first = step * self.config.optim.batch_size
        samples = range(first + batch.at.part.start, first + batch.at.part.stop)
        return NoisePerImage(self.config.seed, samples, like.shape[1:], self.device, purpose).draw()


def save_grid(
    config: DiTRun,
    ctx: DistContext,
    vae: Vae | None,
    local_vae: Callable[[str], Any],
    state: TrainState,
    reporter: Reporter,
) -> None:
    """Saves a grid of samples: EMA weights, the same noise in each step, one column per class.

    All processes sample from a sharded network, and the first one saves. Each step has a file;
    `samples.png` in the run folder is the newest.
    """
    model, missing = cast(DiT, state.ema.module), ""
    if config.images.latents and vae is None and ctx.is_first:
        # Training on cached latents needs no VAE. It is loaded for the grid only, if it is here.
        name = config.images.vae
        try:
            if files := local_vae(name):
                vae = load_vae(files.folder, ctx.device)
            else:
                missing = f"the VAE {name} is not downloaded, so they cannot be decoded"
        except SpiralRopeError as error:
            missing = error.message
    if is_sharded(model):
        missing = distributed.all_gather_object(missing)[0]
    if missing:
        reporter.say(f"no samples: {missing}")
        return
    images = grid_samples(config, ctx, model)
    if not ctx.is_first:
        return
    folder = Path(config.out)
    target = sample_file(folder, state.step)
    target.parent.mkdir(exist_ok=True)
    if vae is not None:
        images = torch.cat([vae.decode(part) for part in images.split(DECODED_AT_ONCE)])
    try:
        grid = image_grid(to_uint8(images), columns=len(images) // GRID_ROWS)
    except DataError as error:
        reporter.say(f"no samples at step {state.step}: {error.message}")
        return
    for path in (target, folder / SAMPLES_FILE):
        with atomic_write(path, sole=True) as beside:
            grid.save(beside, "png")
    reporter.sampled(state.step, target)


@torch.no_grad()
def grid_samples(config: DiTRun, ctx: DistContext, model: DiT) -> Tensor:
    """[N, L, H, W] float32 on the device: DDIM without guidance."""
    sizes = config.model
    labels = torch.tensor(config.grid_classes, device=ctx.device).repeat(GRID_ROWS)
    shape = (sizes.in_chans, *sizes.input_size)
    noise = NoisePerImage(config.seed, range(len(labels)), shape, ctx.device).draw()
    with autocast(ctx.device, ctx.dtype):
        return GaussianDiffusion(STEPS).sample(model, noise.shape, "ddim", noise=noise, y=labels)
