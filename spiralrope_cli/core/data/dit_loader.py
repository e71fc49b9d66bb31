"""Batches for the diffusion loop: pictures in [-1, 1], or cached latents.

Legend: B images at a time per process, L channels, (H, W) of the picture or the latent.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spiralrope_cli.core.config.datasets import BUILT_IN, class_folders, list_images
from spiralrope_cli.core.config.dit_runs import DiTRun
from spiralrope_cli.core.data import files, memory
from spiralrope_cli.core.data.adm import cropped_array
from spiralrope_cli.core.data.order import own_parts, own_places
from spiralrope_cli.core.data.validation import BadImages
from spiralrope_cli.core.runtime import distributed
from spiralrope_cli.core.runtime.seeds import generator_for


@dataclass(frozen=True)
class DiTBatch:
    """One micro batch on the device.

    Attributes:
        images: [B, L, H, W] float32, pictures in [-1, 1].
        labels: [B] class numbers.
        part: its place in the step's batch.
        numbers: [B] image numbers in the training set, on the CPU.
    """

    images: Tensor
    labels: Tensor
    part: slice
    numbers: Tensor


class DiTData:
    """The training set of a run, and how batches are made of it.

    Args:
        run: the run.
        device: where batches go.
        rank: of this process.
        world_size: processes that share each step.
    """

    def __init__(self, run: DiTRun, device: torch.device, rank: int, world_size: int) -> None:
        self.run, self.device = run, device
        self.micro, self.accumulation = run.split_batch(world_size)
        self.parts = own_parts(rank, self.accumulation, self.micro)
        self.bad = BadImages()
        if run.data in BUILT_IN:
            with distributed.first_alone():  # it may have to unpack or download
                self._train = memory.load_memory_set(run.data)[0].to(device, run.model.in_chans)
        else:
            crop = functools.partial(cropped_array, size=run.pictures.image_size)
            grey = run.model.in_chans == 1 and not run.pictures.in_latents
            pictures = list_images(class_folders(Path(run.data)))
            self._files = files.TrainFiles(pictures, crop, grey)

    def train_steps(self, first_step: int, last_step: int) -> Generator[list[DiTBatch], None, None]:
        """This process's micro batches of each step, from `first_step` up to `last_step`."""
        steps = range(first_step, last_step)
        in_memory = self.run.data in BUILT_IN
        source = self._from_memory(steps) if in_memory else self._from_files(steps)
        for step in steps:
            batches = []
            for epoch, part, places, numbers in own_places(self.run, step, 1, self.parts):
                images, labels = next(source)
                mirrored = mirror_draws(self.run.num_train, self.run.seed, epoch)[places]
                images = mirror(images / 127.5 - 1, mirrored < self.run.pictures.hflip)
                batches.append(DiTBatch(images, labels, part, numbers))
            yield batches

    def _from_memory(self, steps: range) -> Iterator[tuple[Tensor, Tensor]]:
        channels = 3 if self.run.pictures.in_latents else self.run.model.in_chans
        for step in steps:
            for _, _, _, numbers in own_places(self.run, step, 1, self.parts):
                chosen = numbers.to(self.device, non_blocking=True)
                images = self._train.images[chosen].float()
                images = memory.resize_and_crop(images, self.run.pictures.image_size, 1.0)
                yield images.expand(-1, channels, -1, -1), self._train.labels[chosen]

    def _from_files(self, steps: range) -> Iterator[tuple[Tensor, Tensor]]:
        run, pin = self.run, self.device.type == "cuda"
        keys = (
            [(number, None) for number in numbers.tolist()]
            for step in steps
            for _, _, _, numbers in own_places(run, step, 1, self.parts)
        )
        loaded = files.load(self._files, keys, run.machine.workers, pin)
        for batch in self.bad.passed_over(loaded, run.machine.skip_bad, self.micro):
            images = batch.images.to(self.device, non_blocking=True).float()
            yield images, batch.labels.to(self.device, non_blocking=True)

    def remake(self, step: int) -> dict[str, Tensor]:
        """What this process saw in a step, on the CPU."""
        batches = next(self.train_steps(step, step + 1))
        return {
            "images": torch.cat([batch.images.cpu() for batch in batches]),
            "labels": torch.cat([batch.labels.cpu() for batch in batches]),
            "numbers": torch.cat([batch.numbers for batch in batches]),
        }


@functools.lru_cache(maxsize=2)
def mirror_draws(num_images: int, seed: int, epoch: int) -> Tensor:
    """[num_images] float32 in [0, 1): one random number per place in the epoch."""
    return torch.rand(num_images, generator=generator_for(seed, "mirror", epoch))


def mirror(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirrors those pictures of [B, L, H, W] that [B] bool on the CPU chooses."""
    if not chosen.any():
        return images
    where = chosen.to(images.device, non_blocking=True)[:, None, None, None]
    return torch.where(where, images.flip(-1), images)
