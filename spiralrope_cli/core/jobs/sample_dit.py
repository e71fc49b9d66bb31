"""Draws images with a diffusion transformer; executed by every worker."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from spiralrope_cli.core.config.dit_runs import NO_VAE
from spiralrope_cli.core.config.samples import SampleRun
from spiralrope_cli.core.data.grid import to_levels
from spiralrope_cli.core.data.sample_files import SampleFiles
from spiralrope_cli.core.diffusion.guidance import guided
from spiralrope_cli.core.diffusion.process import GaussianDiffusion
from spiralrope_cli.core.diffusion.samplers import BY_NAME
from spiralrope_cli.core.diffusion.vae import Vae, load_vae
from spiralrope_cli.core.hub.source import find_source
from spiralrope_cli.core.hub.vae import find_vae
from spiralrope_cli.core.jobs.sample_plan import facts_of
from spiralrope_cli.core.jobs.start import at_size
from spiralrope_cli.core.load import build
from spiralrope_cli.core.models.dit import DiT
from spiralrope_cli.core.runtime import distributed
from spiralrope_cli.core.runtime.device import autocast
from spiralrope_cli.core.runtime.job import Job, open_job
from spiralrope_cli.core.runtime.progress import counted
from spiralrope_cli.core.runtime.seeds import NoisePerImage, generator_for
from spiralrope_cli.core.weights import Weights, here, read_weights


def run(config: SampleRun) -> None:
    """Draws what is missing, then writes the results; executed by every worker.

    Raises:
        CheckpointError: the weights or the VAE cannot be read, or the folder is in use.
    """
    out = Path(config.out)
    with open_job(config.machine, out) as job, torch.inference_mode():
        weights = read_weights(here(find_source(config.source)), ema=config.ema, rope=config.rope)
        files = SampleFiles(out, config.num, config.image_size)
        if job.is_first:
            files.begin(facts_of(config, weights))
        missing = distributed.gathered(files.missing() if job.is_first else [])[0]
        draw = Drawer(config, job, weights)
        shares = batches(missing, config.batch_size, job.world_size)
        already = config.num - len(missing)
        with counted(
            "images", config.num, shown=job.is_first, done=already, unit="images/s"
        ) as advance:
            for share in shares:
                mine = share[job.rank]
                if mine:
                    files.put(mine, draw(mine))
                stop = job.stop.agreed(job.device, ask_all=True)
                advance(sum(map(len, share)))
                if stop:
                    leave(files, job, stop)
        distributed.barrier()
        if job.is_first:
            finish(config, files, weights)
        distributed.barrier()


def batches(missing: Sequence[int], size: int, world_size: int) -> list[list[list[int]]]:
    """Rounds of work: in each, the images of every process; the last ones can be without."""
    cut = [list(missing[start : start + size]) for start in range(0, len(missing), size)]
    rounds = [cut[start : start + world_size] for start in range(0, len(cut), world_size)]
    return [[*each, *([[]] * (world_size - len(each)))] for each in rounds]


class Drawer:
    """Draws images by their numbers: (seed, number) decides noise, class and step noise.

    Args:
        config: the run.
        job: where it happens.
        weights: the network's.
    """

    def __init__(self, config: SampleRun, job: Job, weights: Weights) -> None:
        self.config, self.job = config, job
        model = build(weights, job.device, **at_size(weights, config.input_size, config.rope))
        if not isinstance(model, DiT):
            raise TypeError(f"{weights.arch} is no diffusion transformer")
        if job.dtype != torch.float32:
            model.cast_blocks(job.dtype)
        if config.machine.compile:
            model.compile()
        self.model, self.diffusion = model, GaussianDiffusion(config.steps)
        self.shape = (model.in_chans, *config.input_size)
        self.vae: Vae | None = None
        if config.vae != NO_VAE:
            self.vae = load_vae(find_vae(config.vae).folder, job.device)

    def __call__(self, indices: Sequence[int]) -> Tensor:
        """[B, 3, H, W] uint8 of the images with these numbers."""
        config, job = self.config, self.job
        noise = NoisePerImage(config.seed, indices, self.shape, job.device)
        labels = torch.tensor([label_of(config, index) for index in indices], device=job.device)
        with autocast(job.device, job.dtype):
            predict = guided(self.model, labels, config.guidance)
            sampler = BY_NAME[config.sampler]
            for x in sampler(self.diffusion, predict, noise.draw(), noise.draw):
                latents = x
            images = self.vae.decode(latents) if self.vae else latents
        return to_levels(images)


def label_of(config: SampleRun, index: int) -> int:
    """The class of an image: dealt out, or drawn by (seed, number)."""
    dealt = config.label(index)
    return drawn_class(config.seed, config.num_classes, index) if dealt is None else dealt


def drawn_class(seed: int, num_classes: int, index: int) -> int:
    """The class of an image where none was asked for."""
    drawn = generator_for(seed, "label", index)
    return int(torch.randint(num_classes, (), generator=drawn))


def leave(files: SampleFiles, job: Job, stop: int) -> None:
    """Ends after a signal; what is drawn stays."""
    distributed.barrier()
    if job.is_first:
        left = len(files.missing())
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"stopped with {files.num - left} of {files.num} images; the same command goes on"
        )
    sys.exit(128 + stop)


def finish(config: SampleRun, files: SampleFiles, weights: Weights) -> None:
    """Writes the results and says where they are."""
    facts = facts_of(config, weights)
    console = Console(highlight=False, soft_wrap=True)
    grid = files.write_grid(facts)
    folder = files.write_pngs(facts) if config.png else None
    npz = files.finish(facts)
    console.print(f"{config.num} images: {npz}", markup=False)
    console.print(f"grid: {grid}", markup=False)
    if folder:
        console.print(f"files: {folder}", markup=False)
