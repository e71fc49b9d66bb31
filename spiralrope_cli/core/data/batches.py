"""Batches of both models: which image stands where in a run, and how it comes to the device.

What stands in a step is a function of seed and step, and so is all that is random about it: the
same for any number of processes and any micro batch size. The places of a micro batch travel with
its images from the reading to the loss.

Legend: B images at a time per process, (h, w) pixels or latents, K classes.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor

from spiralrope_cli.core.config.datasets import BUILT_IN, class_folders, list_images, val_folder
from spiralrope_cli.core.config.dit_runs import DiTRun, TrainingRun
from spiralrope_cli.core.config.runs import ClassifierRun, EvalProtocol
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.data import augment, memory
from spiralrope_cli.core.data.files import BadImages, ImageFiles, TrainFiles, load
from spiralrope_cli.core.data.latents import LatentCache
from spiralrope_cli.core.errors import DataError
from spiralrope_cli.core.runtime.seeds import generator_for, seed_for

EVAL_BATCH = 256


# --- Which image stands where


@functools.lru_cache(maxsize=2)
def epoch_order(num_images: int, repeats: int, seed: int, epoch: int) -> Tensor:
    """Image numbers of one epoch.

    Args:
        num_images: size of the training set.
        repeats: how often each picture stands in a row (repeated augmentation, by timm's
            sampler, which then covers a part of the set per epoch); 1 is plain shuffling.
        seed: of the run.
        epoch: counted from 0.

    Returns:
        [num_images] int64.
    """
    if repeats == 1:
        generator = generator_for(seed, "order", epoch)
        return torch.randperm(num_images, generator=generator)
    # The sampler knows no seed: it draws from the number of the epoch.
    return repeated_order(num_images, repeats, seed_for(seed, "order", epoch))


def repeated_order(num_images: int, repeats: int, epoch: int) -> Tensor:
    """[num_images] int64 in the order of the published repeated augmentation."""
    sampler = RepeatAugSampler(
        range(num_images), num_replicas=1, rank=0, num_repeats=repeats, selected_round=0
    )
    sampler.set_epoch(epoch)
    return torch.tensor(list(sampler))


def apart(batch_size: int, repeats: int) -> Tensor:
    """[batch_size] places within a step, so that repeats of a picture are not neighbours.

    Neighbours are mixed with each other, and a picture mixed with itself would be none.
    """
    places = torch.arange(batch_size)
    return torch.cat([places[first::repeats] for first in range(repeats)])


def step_slice(step: int, steps_per_epoch: int, batch_size: int) -> tuple[int, int]:
    """Epoch of a step, and the place of its first image in that epoch."""
    epoch, within = divmod(step, steps_per_epoch)
    return epoch, within * batch_size


def own_parts(rank: int, micro: int, accumulation: int) -> list[slice]:
    """The parts of a step's batch that one process takes, one per micro batch."""
    first = rank * accumulation
    return [slice(n * micro, (n + 1) * micro) for n in range(first, first + accumulation)]


class Places(NamedTuple):
    """What stands in one micro batch.

    Attributes:
        epoch: counted from 0.
        part: its place in the step's batch.
        first: place of its first image in the run.
        places: [B] in the epoch, on the CPU.
        numbers: [B] of the images in the training set, on the CPU.
    """

    epoch: int
    part: slice
    first: int
    places: Tensor
    numbers: Tensor


def own_places(run: TrainingRun, step: int, repeats: int, parts: list[slice]) -> Iterator[Places]:
    """What stands in the given parts of a step."""
    size = run.optim.batch_size
    epoch, first = step_slice(step, run.steps_per_epoch, size)
    order = epoch_order(run.num_train, repeats, run.seed, epoch)
    places = first + apart(size, repeats)
    for part in parts:
        yield Places(epoch, part, step * size + part.start, places[part], order[places[part]])


# --- Training


@dataclass(frozen=True)
class Batch:
    """One micro batch on the device.

    Attributes:
        at: what stands in it.
        images: [B, channels, h, w] float32, normalised, or in [-1, 1] for a DiT; of cached
            latents, the means of their posteriors.
        labels: [B] class numbers, or [B, K] where they are mixed.
        std: standard deviations of cached posteriors, as images, else None.
    """

    at: Places
    images: Tensor
    labels: Tensor
    std: Tensor | None = None


@dataclass(frozen=True)
class TrainingData:
    """The training set of a run, and how its batches are made; see the two functions below.

    Attributes:
        run: the run.
        parts: of each step's batch, those that this process takes.
        read: gives the images in [0, 255] that stand at some places.
        finish: augments and normalises them.
        bad: images that could not be read.
        repeats: how often each image stands in a row.
        scale: what cached latents are multiplied by; pixels are taken as they are.
    """

    run: TrainingRun
    parts: list[slice]
    read: Callable[[Iterator[Places]], Generator[Batch, None, None]]
    finish: Callable[[Batch], Batch]
    bad: BadImages
    repeats: int = 1
    scale: float = 1.0

    def train_steps(self, first_step: int, last_step: int) -> Generator[list[Batch], None, None]:
        """This process's micro batches of each step, from `first_step` up to `last_step`."""
        steps = range(first_step, last_step)
        own = (own_places(self.run, step, self.repeats, self.parts) for step in steps)
        places = itertools.chain.from_iterable(own)
        with contextlib.closing(self.read(places)) as batches:
            for _ in steps:
                yield [self.finish(next(batches)) for _ in self.parts]

    def remake(self, step: int, labels: str = "labels") -> dict[str, Tensor]:
        """What this process saw in a step, on the CPU; `labels` is what those are called."""
        [batches] = self.train_steps(step, step + 1)
        return {
            "images": torch.cat([batch.images.cpu() for batch in batches]),
            labels: torch.cat([batch.labels.cpu() for batch in batches]),
            "numbers": torch.cat([batch.at.numbers for batch in batches]),
        }


def classifier_data(
    run: ClassifierRun, device: torch.device, rank: int, world_size: int, bad: BadImages
) -> TrainingData:
    """The training set of a classifier, which notes what cannot be read in `bad`.

    Raises:
        DataError: the set is missing.
    """
    model, options = run.model, run.augment
    if in_memory := run.data in BUILT_IN:
        split, _ = memory.splits_on(device, run.data, model.in_chans)
        read = functools.partial(from_memory, split)
    else:
        transform = augment.train_transform(model.image_size, options)
        files = TrainFiles(list_images(Path(run.data) / "train"), transform, model.in_chans == 1)
        read = functools.partial(from_files, run, files, bad, device, True)
    normalise = augment.Normalise(options.mean, options.std, device)

    def finish(batch: Batch) -> Batch:
        at, images = batch.at, batch.images
        if in_memory:
            draws = augment.epoch_draws(run.num_train, run.seed, at.epoch)[at.places]
            images = augment.warp(images, draws, options, model.image_size)
        images = normalise(images)
        images = augment.erase(images, options.random_erasing, run.seed, at.first)
        mixed = augment.mix(images, batch.labels, options, model.num_classes, run.seed, at.first)
        return Batch(at, *mixed)

    parts = own_parts(rank, *run.split_batch(world_size))
    return TrainingData(run, parts, read, finish, bad, repeats=options.repeated_aug)


def dit_data(run: DiTRun, device: torch.device, rank: int, world_size: int) -> TrainingData:
    """The training set of a diffusion transformer: images, or cached posteriors of a VAE.

    Raises:
        DataError: the set is missing, or a shard of the cached latents is missing or damaged.
    """
    size, bad = run.pictures.image_size, BadImages()
    parts = own_parts(rank, *run.split_batch(world_size))
    if run.pictures.latents:
        cache = LatentCache(Path(run.pictures.latents).expanduser())
        cache.verify()
        read = functools.partial(from_cache, run, cache, device)
        return TrainingData(run, parts, read, lambda batch: batch, bad, scale=cache.scale)
    if run.data in BUILT_IN:
        channels = 3 if run.pictures.in_latents else run.model.in_chans
        split, _ = memory.splits_on(device, run.data, channels)
        read = functools.partial(from_memory, split)
    else:
        crop = functools.partial(augment.cropped_array, size=size)
        files = TrainFiles(list_images(class_folders(Path(run.data))), crop, grey=False)
        read = functools.partial(from_files, run, files, bad, device, False)

    def finish(batch: Batch) -> Batch:
        images = augment.resize_and_crop(batch.images, size, 1.0) / 127.5 - 1
        return replace(batch, images=augment.mirror(images, mirrored(run, batch.at)))

    return TrainingData(run, parts, read, finish, bad)


def mirrored(run: DiTRun, at: Places) -> Tensor:
    """[B] bool on the CPU: by seed, epoch and place, for all kinds of data alike."""
    return augment.mirror_draws(run.num_train, run.seed, at.epoch)[at.places] < run.pictures.hflip


def from_memory(
    split: memory.MemorySplit, places: Iterator[Places]
) -> Generator[Batch, None, None]:
    """Images of a set that lives on the device."""
    for at in places:
        chosen = at.numbers.to(split.images.device, non_blocking=True)
        yield Batch(at, split.images[chosen].float(), split.labels[chosen])


def from_files(
    run: TrainingRun,
    files: TrainFiles,
    bad: BadImages,
    device: torch.device,
    random: bool,
    places: Iterator[Places],
) -> Generator[Batch, None, None]:
    """Images that loader processes decode, augmented by seed, epoch and place if `random`."""

    def key(at: Places) -> list[tuple[int, tuple[int, ...] | None]]:
        seeds = [(run.seed, at.epoch, place) if random else None for place in at.places.tolist()]
        return list(zip(at.numbers.tolist(), seeds, strict=True))

    places, ahead = itertools.tee(places)  # keys are asked for some batches ahead
    loader = load(files, map(key, ahead), run.machine.workers, device.type == "cuda")
    with contextlib.closing(loader) as batches:
        for at, loaded in zip(places, batches, strict=True):
            bad.pass_over(loaded, run.machine.skip_bad, len(at.numbers))
            yield Batch(at, *loaded.on(device))


def from_cache(
    run: DiTRun, cache: LatentCache, device: torch.device, places: Iterator[Places]
) -> Generator[Batch, None, None]:
    """Posteriors of latents; those of the mirrored image lie in the cache too."""
    places, ahead = itertools.tee(places)
    keys = ((at.numbers, mirrored(run, at)) for at in ahead)
    for at, (mean, std) in zip(places, cache.batches(keys, device), strict=True):
        yield Batch(at, mean, cache.labels[at.numbers].to(device, non_blocking=True), std)


class ValidationImages:
    """The validation images of a data set under one protocol.

    Args:
        protocol: which images, and how they are resized, cropped and normalised.
        machine: its loader processes, and whether damaged images are skipped.
        device: where batches go.
        rank: of this process.
        world_size: processes that share the images.

    Attributes:
        bad: images that could not be read.
        decoded: images that this process took out of the data set so far.
    """

    def __init__(
        self,
        protocol: EvalProtocol,
        machine: MachineConfig,
        device: torch.device,
        rank: int,
        world_size: int,
    ) -> None:
        self.protocol, self.machine, self.device = protocol, machine, device
        self.bad, self.decoded = BadImages(), 0
        self._normalise = augment.Normalise(protocol.mean, protocol.std, device)
        # The same spans for any number of processes, so that figures do not depend on it.
        starts = range(rank * EVAL_BATCH, protocol.num_val, world_size * EVAL_BATCH)
        self._spans = [slice(first, min(first + EVAL_BATCH, protocol.num_val)) for first in starts]
        if protocol.data in BUILT_IN:
            _, self._split = memory.splits_on(device, protocol.data, protocol.in_chans)
        else:
            folder = val_folder(Path(protocol.data))
            if folder is None:
                raise DataError(f"{protocol.data} has no val/")
            transform = augment.eval_transform(protocol.image_size, protocol.crop_ratio)
            self._files = ImageFiles(list_images(folder), transform, protocol.in_chans == 1)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images [B, channels, h, w] and labels [B].

        Over all processes every image comes exactly once.
        """
        from_memory = self.protocol.data in BUILT_IN
        for images, labels in self._from_memory() if from_memory else self._from_files():
            self.decoded += len(labels)
            yield self._normalise(images), labels

    def _from_memory(self) -> Iterator[tuple[Tensor, Tensor]]:
        size, ratio = self.protocol.image_size, self.protocol.crop_ratio
        for span in self._spans:
            images = self._split.images[span].float()
            yield augment.resize_and_crop(images, size, ratio), self._split.labels[span]

    def _from_files(self) -> Iterator[tuple[Tensor, Tensor]]:
        keys = [[(n, None) for n in range(span.start, span.stop)] for span in self._spans]
        loader = load(self._files, keys, self.machine.workers, self.device.type == "cuda")
        with contextlib.closing(loader) as batches:
            for loaded in batches:
                self.bad.meet(loaded.unreadable, self.machine.skip_bad)
                if len(loaded.labels):
                    yield loaded.on(self.device)
