"""Draws images with a diffusion transformer; executed by every worker."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spiralrope_cli.core.config.dit_runs import NO_VAE
from spiralrope_cli.core.config.samples import SampleRun
from spiralrope_cli.core.data.grid import to_levels
from spiralrope_cli.core.data.sample_files import SampleFiles
from spiralrope_cli.core.diffusion.guidance import guided
from spiralrope_cli.core.diffusion.process import GaussianDiffusion
from spiralrope_cli.core.diffusion.samplers import BY_NAME
from spiralrope_cli.core.diffusion.vae import Vae, load_vae
from spiralrope_cli.core.hub.vae import find_vae
from spiralrope_cli.core.jobs.sample_plan import facts_of, weights_of
from spiralrope_cli.core.jobs.start import at_size
from spiralrope_cli.core.kernels import cast_blocks
from spiralrope_cli.core.load import build
from spiralrope_cli.core.models.dit import DiT
from spiralrope_cli.core.report.page import leave_report
from spiralrope_cli.core.runtime import distributed, environment
from spiralrope_cli.core.runtime.console import say, say_result
from spiralrope_cli.core.runtime.device import autocast
from spiralrope_cli.core.runtime.job import Job, open_job
from spiralrope_cli.core.runtime.progress import counted
from spiralrope_cli.core.runtime.run_folder import REPORT_FILE, SOURCES_FILE, write_json
from spiralrope_cli.core.runtime.seeds import NoisePerImage, generator_for
from spiralrope_cli.core.weights import Weights

SAY_ABOVE = 1 << 30
"""Bytes of images whose checksum takes long enough to be told of."""


def run(config: SampleRun) -> None:
    """Draws what is missing, then writes the results; executed by every worker.

    Raises:
        CheckpointError: the weights or the VAE cannot be read, or the folder is in use.
    """
    out = Path(config.out)
    with open_job(config.machine, out) as job, torch.inference_mode():
        weights = weights_of(config)
        files = SampleFiles(out, config.num, config.image_size)
        facts = facts_of(config, weights)
        if job.is_first:
            files.begin(facts)
            environment.write(out, job)
            write_json(out / SOURCES_FILE, dict.fromkeys(config.rope, "option"))
        missing = distributed.gathered(files.missing() if job.is_first else [])[0]
        if missing:
            draw_all(config, job, Drawer(config, job, weights), files, missing)
        if job.is_first:
            if missing and config.num_bytes > SAY_ABOVE:
                say("all are drawn; their checksum is taken, for the archive")
            files.finish(facts)
            files.write_grid(facts)
        distributed.barrier()
        if config.png:
            write_pngs(job, files, facts)
        if job.is_first:
            leave_report(out)
            say_results(config, files)


def draw_all(
    config: SampleRun, job: Job, draw: Drawer, files: SampleFiles, missing: Sequence[int]
) -> None:
    """Draws images and puts them at their places, until all are there or a signal comes."""
    already = config.num - len(missing)
    with counted(
        "images", config.num, shown=job.is_first, done=already, unit="images/s"
    ) as advance:
        for share in batches(missing, config.batch_size, job.world_size):
            mine = share[job.rank]
            # All processes are about as far; the last part is the picture of the latents.
            each_step = in_parts(advance, sum(map(len, share)), draw.diffusion.num_steps + 1)
            drawn = draw(mine, each_step) if mine else None
            if drawn is not None:
                files.put(mine, drawn)
                each_step()
            leave_if_asked(job, files)
    distributed.barrier()


def in_parts(advance: Callable[[int], None], images: int, parts: int) -> Callable[[], None]:
    """A function that is called so many times until all these images have been counted."""
    number = itertools.count(1)

    def tick() -> None:
        done = next(number)
        advance(images * done // parts - images * (done - 1) // parts)

    return tick


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
            cast_blocks(model.blocks, job.dtype)
        if config.machine.compile:
            model.compile()
        self.model, self.diffusion = model, GaussianDiffusion(config.steps)
        self.shape = (model.in_chans, *config.input_size)
        self.vae: Vae | None = None
        if config.vae != NO_VAE:
            self.vae = load_vae(find_vae(config.vae).folder, job.device)

    def __call__(self, indices: Sequence[int], each_step: Callable[[], None]) -> Tensor | None:
        """[B, 3, H, W] uint8 of the images with these numbers; None where a signal came."""
        config, job = self.config, self.job
        noise = NoisePerImage(config.seed, indices, self.shape, job.device)
        labels = torch.tensor([label_of(config, index) for index in indices], device=job.device)
        with autocast(job.device, job.dtype):
            predict = guided(self.model, labels, config.guidance)
            sampler = BY_NAME[config.sampler]
            for x in sampler(self.diffusion, predict, noise.draw(), noise.draw):
                if job.stop.signal_number:
                    return None
                latents = x
                each_step()
        return to_levels(self.vae.decode(latents) if self.vae else latents)


def label_of(config: SampleRun, index: int) -> int:
    """The class of an image: dealt out, or drawn by (seed, number)."""
    dealt = config.label(index)
    return drawn_class(config.seed, config.num_classes, index) if dealt is None else dealt


def drawn_class(seed: int, num_classes: int, index: int) -> int:
    """The class of an image where none was asked for."""
    drawn = generator_for(seed, "label", index)
    return int(torch.randint(num_classes, (), generator=drawn))


def leave_if_asked(job: Job, files: SampleFiles) -> None:
    """Ends after a signal to any process; what is drawn stays."""
    stop = job.stop.agreed(job.device, ask_all=True)
    if not stop:
        return
    distributed.barrier()
    if job.is_first:
        there = files.num - len(files.missing())
        say(f"stopped with {there} of {files.num} images; the same command goes on")
    sys.exit(128 + stop)


def write_pngs(job: Job, files: SampleFiles, facts: dict[str, Any]) -> None:
    """A file for every image; each process writes its part of them."""
    missing = distributed.gathered(files.missing_pngs() if job.is_first else 0)[0]
    ends = [files.num * rank // job.world_size for rank in (job.rank, job.rank + 1)]
    already = files.num - missing
    with counted("files", files.num, shown=job.is_first, done=already, unit="files/s") as advance:
        for _ in files.write_pngs(facts, range(*ends)):
            advance(job.world_size)
            if job.stop.signal_number:
                break
    leave_if_asked(job, files)


def say_results(config: SampleRun, files: SampleFiles) -> None:
    """Where the results are."""
    say_result(f"{config.num} images: {files.npz}")
    say_result(f"grid: {files.grid}")
    say_result(f"report: {files.folder / REPORT_FILE}")
    if config.png:
        say_result(f"files: {files.png(0).parent}")
