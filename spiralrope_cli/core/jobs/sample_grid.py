"""A picture of what a diffusion transformer draws, to look at while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from spiralrope_cli.core.atomic import atomic_write
from spiralrope_cli.core.config.dit_runs import DiTRun
from spiralrope_cli.core.config.latents import VAE_NAMES
from spiralrope_cli.core.data.grid import picture_grid, to_levels
from spiralrope_cli.core.diffusion.process import GaussianDiffusion
from spiralrope_cli.core.diffusion.vae import Vae, load_vae
from spiralrope_cli.core.errors import CheckpointError, SpiralRopeError
from spiralrope_cli.core.hub.catalog import find
from spiralrope_cli.core.hub.download import local_path
from spiralrope_cli.core.hub.vae import find_vae
from spiralrope_cli.core.models.dit import DiT
from spiralrope_cli.core.runtime import run_folder
from spiralrope_cli.core.runtime.device import autocast
from spiralrope_cli.core.runtime.job import Job
from spiralrope_cli.core.runtime.seeds import NoisePerImage
from spiralrope_cli.core.training.state import TrainState

COLUMNS, ROWS = 10, 4
STEPS = 50
DECODED_AT_ONCE = 4


def draw_grid(config: DiTRun, job: Job, state: TrainState, vae: Vae | None) -> str:
    """Draws the averaged weights' samples, always from the same noise: one column per class.

    Returns:
        where the picture of this step is (`samples.png` in the run folder is the newest one), or
        why there is none, in words.
    """
    if config.pictures.latents and vae is None:
        # Training needs none: it is loaded for the picture alone, if it is here.
        try:
            vae = local_vae(config.pictures.vae, job.device)
        except SpiralRopeError as error:
            return f"no samples: {error.message}"
    folder = Path(config.out)
    target = run_folder.sample_file(folder, state.step)
    target.parent.mkdir(exist_ok=True)
    images = samples(config, job, cast(DiT, state.ema.module))
    if vae is not None:
        images = torch.cat([vae.decode(part) for part in images.split(DECODED_AT_ONCE)])
    grid = picture_grid(to_levels(images), columns=len(images) // ROWS)
    for path in (target, folder / run_folder.SAMPLES_FILE):
        with atomic_write(path, sole=True) as beside:
            grid.save(beside, "png")
    return f"samples: {target}"


def local_vae(given: str, device: torch.device) -> Vae:
    """A VAE that can be had without a network.

    Raises:
        CheckpointError, ConfigError: it is not here, or it cannot be read.
    """
    if given in VAE_NAMES and local_path(find(f"vae-{given}")) is None:
        raise CheckpointError(f"the VAE {given} is not here to decode them")
    return load_vae(find_vae(given).folder, device)


@torch.no_grad()
def samples(config: DiTRun, job: Job, model: DiT) -> Tensor:
    """[N, L, H, W] float32 on the device: DDIM without guidance."""
    sizes = config.model
    columns = min(COLUMNS, sizes.num_classes)
    classes = torch.arange(columns, device=job.device) * sizes.num_classes // columns
    labels = classes.repeat(ROWS)
    shape = (sizes.in_chans, *sizes.input_size)
    noise = NoisePerImage(config.seed, range(len(labels)), shape, job.device).draw()
    with autocast(job.device, job.dtype):
        return GaussianDiffusion(STEPS).sample(model, noise.shape, "ddim", noise=noise, y=labels)
