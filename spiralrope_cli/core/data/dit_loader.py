"""Batches for the diffusion loop: pictures in [-1, 1], or cached posteriors of a VAE.

Legend: B images at a time per process, L channels, (H, W) of the picture or the latent.
"""

from __future__ import annotations

import contextlib
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
from spiralrope_cli.core.data.latents import LatentCache
from spiralrope_cli.core.data.order import Places, own_parts, own_places
from spiralrope_cli.core.data.validation import BadImages
from spiralrope_cli.core.runtime import distributed
from spiralrope_cli.core.runtime.seeds import generator_for

Loaded = tuple[Tensor, Tensor | None, Tensor]
"""Pictures and None, or means and standard deviations of latents; and labels."""


@dataclass(frozen=True)
class DiTBatch:
    """One micro batch on the device.

    Attributes:
        images: [B, L, H, W] float32, pictures in [-1, 1], or means of cached posteriors.
        std: standard deviations of cached posteriors, as images, else None.
        labels: [B] class numbers.
        part: its place in the step's batch.
        numbers: [B] image numbers in the training set, on the CPU.
    """

    images: Tensor
    std: Tensor | None
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

    Raises:
        DataError: a shard of the cached latents is missing or damaged.
    """

    def __init__(self, run: DiTRun, device: torch.device, rank: int, world_size: int) -> None:
        self.run, self.device = run, device
        self.micro, self.accumulation = run.split_batch(world_size)
        self.parts = own_parts(rank, self.accumulation, self.micro)
        self.bad = BadImages()
        if run.pictures.latents:
            self._cache = LatentCache(Path(run.pictures.latents).expanduser())
            self._cache.verify()
            self._load = self._from_cache
        elif run.data in BUILT_IN:
            with distributed.first_alone():  # it may have to unpack or download
                self._train = memory.load_memory_set(run.data)[0].to(device, run.model.in_chans)
            self._load = self._from_memory
        else:
            crop = functools.partial(cropped_array, size=run.pictures.image_size)
            pictures = list_images(class_folders(Path(run.data)))
            self._files = files.TrainFiles(pictures, crop, grey=False)
            self._load = self._from_files

    def train_steps(self, first_step: int, last_step: int) -> Generator[list[DiTBatch], None, None]:
        """This process's micro batches of each step, from `first_step` up to `last_step`."""
        steps = range(first_step, last_step)
        source = self._load(steps)
        for step in steps:
            batches = []
            for places in own_places(self.run, step, 1, self.parts):
                images, std, labels = next(source)
                batches.append(DiTBatch(images, std, labels, places.part, places.numbers))
            yield batches

    def _places(self, steps: range) -> Iterator[Places]:
        for step in steps:
            yield from own_places(self.run, step, 1, self.parts)

    def _mirrored(self, places: Places) -> Tensor:
        """[B] bool on the CPU: by seed, epoch and place, for all kinds of data alike."""
        draws = mirror_draws(self.run.num_train, self.run.seed, places.epoch)
        return draws[places.places] < self.run.pictures.hflip

    def _from_memory(self, steps: range) -> Iterator[Loaded]:
        channels = 3 if self.run.pictures.in_latents else self.run.model.in_chans
        for places in self._places(steps):
            chosen = places.numbers.to(self.device, non_blocking=True)
            images = self._train.images[chosen].float()
            images = memory.resize_and_crop(images, self.run.pictures.image_size, 1.0)
            images = images.expand(-1, channels, -1, -1) / 127.5 - 1
            yield mirror(images, self._mirrored(places)), None, self._train.labels[chosen]

    def _from_files(self, steps: range) -> Iterator[Loaded]:
        machine = self.run.machine
        keys = (
            [(number, None) for number in places.numbers.tolist()] for places in self._places(steps)
        )
        loader = files.load(self._files, keys, machine.workers, self.device.type == "cuda")
        with contextlib.closing(loader) as loaded:
            batches = self.bad.passed_over(loaded, machine.skip_bad, self.micro)
            for places, batch in zip(self._places(steps), batches, strict=False):
                images = batch.images.to(self.device, non_blocking=True).float() / 127.5 - 1
                labels = batch.labels.to(self.device, non_blocking=True)
                yield mirror(images, self._mirrored(places)), None, labels

    def _from_cache(self, steps: range) -> Iterator[Loaded]:
        keys = ((places.numbers, self._mirrored(places)) for places in self._places(steps))
        posteriors = self._cache.batches(keys, self.device)
        for places, (mean, std) in zip(self._places(steps), posteriors, strict=True):
            labels = self._cache.labels[places.numbers]
            yield mean, std, labels.to(self.device, non_blocking=True)

    @property
    def scale(self) -> float:
        """What cached latents are multiplied by; pixels are taken as they are."""
        return self._cache.scale if self.run.pictures.latents else 1.0

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
