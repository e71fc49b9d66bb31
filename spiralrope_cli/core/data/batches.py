"""Batches of both models: which image stands where in a run, and how it comes to the device.

What stands in a step is a function of seed and step, and so is all that is random about it: the
same for any number of processes and any micro batch size.

Legend: B images at a time per process, (h, w) pixels or latents, K classes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor

from spiralrope_cli.core.config.datasets import BUILT_IN, class_folders, list_images, val_folder
from spiralrope_cli.core.config.dit_runs import DiTRun, TrainingRun
from spiralrope_cli.core.config.runs import ClassifierRun, EvalProtocol
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.data import augment, memory
from spiralrope_cli.core.data.images import in_order
from spiralrope_cli.core.data.latents import LatentCache
from spiralrope_cli.core.data.loader import MAX_TRIES, Batch, ImageFiles, Places, load
from spiralrope_cli.core.errors import DataError
from spiralrope_cli.core.runtime.seeds import generator_for, seed_for

EVAL_BATCH = 256

LATENTS_AHEAD = 2
"""Batches of cached latents that are read while the network is busy."""

Read = Callable[[Iterable[Places]], Generator[Batch, None, None]]
"""Gives the images that stand at some places, on the device, in [0, 255] or as latents."""


# --- Which image stands where


@functools.lru_cache(maxsize=2)
def epoch_order(num_images: int, repeats: int, seed: int, epoch: int) -> Tensor:
    """[num_images] int64, the image numbers of one epoch.

    Args:
        num_images: size of the training set.
        repeats: how often each image stands in a row (repeated augmentation, by timm's
            sampler, which then covers a part of the set per epoch); 1 is plain shuffling.
        seed: of the run.
        epoch: counted from 0.
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
    """[batch_size] places within a step, so that repeats of an image are not neighbours.

    Neighbours are mixed with each other, and an image mixed with itself would be none.
    """
    places = torch.arange(batch_size)
    return torch.cat([places[first::repeats] for first in range(repeats)])


def own_parts(rank: int, micro: int, grad_accum_steps: int) -> list[slice]:
    """The parts of a step's batch that one process takes, one per micro batch."""
    first = rank * grad_accum_steps
    return [slice(n * micro, (n + 1) * micro) for n in range(first, first + grad_accum_steps)]


# --- Training


@dataclass(frozen=True)
class TrainingData:
    """The training set of a run, and how its batches are made; see the two functions below."""

    run: TrainingRun
    steps_per_epoch: int
    parts: list[slice]  # of each step's batch, those that this process takes
    read: Read
    finish: Callable[[Batch], Batch]  # augments and normalises
    unreadable: dict[str, str] = field(default_factory=dict)  # path -> reason, left out so far
    repeats: int = 1  # how often each image stands in a row
    scale: float = 1.0  # what cached latents are multiplied by; pixels are taken as they are

    def train_steps(self, first_step: int, last_step: int) -> Generator[list[Batch], None, None]:
        """This process's micro batches of each step, from `first_step` up to `last_step`."""
        with contextlib.closing(self.read(self.places(first_step, last_step))) as batches:
            for _ in range(first_step, last_step):
                yield [self.finish(next(batches)) for _ in self.parts]

    def places(self, first_step: int, last_step: int) -> Iterator[Places]:
        """What stands in those micro batches."""
        size = self.run.optim.batch_size
        for step in range(first_step, last_step):
            epoch, within = divmod(step, self.steps_per_epoch)
            order = epoch_order(self.run.num_train, self.repeats, self.run.seed, epoch)
            places = within * size + apart(size, self.repeats)
            for part in self.parts:
                mine = places[part]
                numbers, first = order[mine].tolist(), step * size + part.start
                yield Places(numbers, mine.tolist(), epoch, part, first)

    def remake(self, step: int, labels: str = "labels") -> dict[str, Tensor]:
        """What this process saw in a step, on the CPU; `labels` is what those are called."""
        [batches] = self.train_steps(step, step + 1)
        return {
            "images": torch.cat([batch.images.cpu() for batch in batches]),
            labels: torch.cat([batch.labels.cpu() for batch in batches]),
            "numbers": torch.tensor([n for batch in batches for n in batch.at.numbers]),
        }


def classifier_data(
    run: ClassifierRun, device: torch.device, rank: int, world_size: int, unreadable: dict[str, str]
) -> TrainingData:
    """The training set of a classifier, which notes what cannot be read in `unreadable`."""
    model, options = run.model, run.augment
    read: Read
    if in_memory := run.data in BUILT_IN:
        split, _ = memory.splits_on(device, run.data, model.in_chans)
        read = functools.partial(from_memory, split)
    else:
        listed = list_images(Path(run.data) / "train")
        transform, grey = augment.train_transform(model.image_size, options), model.in_chans == 1
        files = ImageFiles(listed, transform, grey, MAX_TRIES, run.seed)
        read = functools.partial(load, files, run.machine, device, unreadable)
    normalise = augment.Normalise(options.mean, options.std, device)

    def finish(batch: Batch) -> Batch:
        at, images = batch.at, batch.images
        if in_memory:
            draws = augment.epoch_draws(run.num_train, run.seed, at.epoch)[at.places]
            images = augment.warp(images, draws, options, model.image_size)
        images = augment.erase(normalise(images), options.random_erasing, run.seed, at.first)
        mixed = augment.mix(images, batch.labels, options, model.num_classes, run.seed, at.first)
        return Batch(at, *mixed)

    parts = own_parts(rank, *run.split_batch(world_size))
    return TrainingData(
        run, run.steps_per_epoch, parts, read, finish, unreadable, repeats=options.repeated_aug
    )


def dit_data(run: DiTRun, device: torch.device, rank: int, world_size: int) -> TrainingData:
    """The training set of a diffusion transformer: images, or cached posteriors of a VAE."""
    size, unreadable = run.images.image_size, dict[str, str]()
    parts = own_parts(rank, *run.split_batch(world_size))
    read: Read

    def mirrored(at: Places) -> Tensor:
        """[B] bool on the CPU: by seed, epoch and place, for all kinds of data alike."""
        draws = augment.mirror_draws(run.num_train, run.seed, at.epoch)
        return draws[at.places] < run.images.hflip

    if run.images.latents:
        cache = LatentCache(Path(run.images.latents).expanduser())
        cache.verify()
        read = functools.partial(from_cache, cache, device, mirrored)
        return TrainingData(
            run, run.steps_per_epoch, parts, read, lambda batch: batch, scale=cache.scale
        )
    if run.data in BUILT_IN:
        channels = 3 if run.images.in_latents else run.model.in_chans
        split, _ = memory.splits_on(device, run.data, channels)
        read = functools.partial(from_memory, split)
    else:
        crop = functools.partial(augment.cropped_array, size=size)
        files = ImageFiles(list_images(class_folders(Path(run.data))), crop, tries=MAX_TRIES)
        read = functools.partial(load, files, run.machine, device, unreadable)

    def finish(batch: Batch) -> Batch:
        images = augment.resize_and_crop(batch.images, size, 1.0) / 127.5 - 1
        return replace(batch, images=augment.mirror(images, mirrored(batch.at)))

    return TrainingData(run, run.steps_per_epoch, parts, read, finish, unreadable)


def from_memory(
    split: memory.MemorySplit, batches: Iterable[Places]
) -> Generator[Batch, None, None]:
    """Images of a set that lives on the device."""
    for at in batches:
        chosen = torch.tensor(at.numbers).to(split.images.device, non_blocking=True)
        yield Batch(at, split.images[chosen].float(), split.labels[chosen])


def from_cache(
    cache: LatentCache,
    device: torch.device,
    mirrored: Callable[[Places], Tensor],
    batches: Iterable[Places],
) -> Generator[Batch, None, None]:
    """Posteriors of latents, read ahead in a thread; those of mirrored images lie there too."""

    def read(at: Places) -> Batch:
        numbers = torch.tensor(at.numbers)
        mean, std = cache.mean_std(numbers, mirrored(at), pin_memory=device.type == "cuda")
        return Batch(at, mean, cache.labels[numbers], std)

    tasks = (functools.partial(read, at) for at in batches)
    with contextlib.closing(in_order(tasks, 1, LATENTS_AHEAD)) as ahead:
        for batch in ahead:
            yield batch.on(device)


# --- Validation


class ValidationImages:
    """The validation images of a data set under one protocol, shared by all processes.

    Attributes:
        unreadable: path -> reason, images that were left out so far.
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
        self.unreadable: dict[str, str] = {}
        self.decoded = 0
        self.protocol, self.machine = protocol, machine
        self._in_memory = protocol.data in BUILT_IN
        self._normalise = augment.Normalise(protocol.mean, protocol.std, device)
        # The same spans for any number of processes, so that metrics do not depend on it.
        starts = range(rank * EVAL_BATCH, protocol.num_val, world_size * EVAL_BATCH)
        self._spans = [range(first, min(first + EVAL_BATCH, protocol.num_val)) for first in starts]
        self._read: Read
        if self._in_memory:
            _, split = memory.splits_on(device, protocol.data, protocol.in_chans)
            self._read = functools.partial(from_memory, split)
        else:
            folder = val_folder(Path(protocol.data))
            if folder is None:
                raise DataError(f"{protocol.data} has no val/")
            transform = augment.eval_transform(protocol.image_size, protocol.crop_ratio)
            files = ImageFiles(list_images(folder), transform, protocol.in_chans == 1)
            self._read = functools.partial(load, files, machine, device, self.unreadable)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images [B, channels, h, w] and labels [B].

        Over all processes every image comes exactly once.
        """
        size, ratio = self.protocol.image_size, self.protocol.crop_ratio
        with contextlib.closing(
            self._read(Places(list(span), []) for span in self._spans)
        ) as batches:
            for batch in batches:
                images = batch.images
                if self._in_memory:
                    images = augment.resize_and_crop(images, size, ratio)
                self.decoded += len(batch.labels)
                if len(batch.labels):  # else none of them could be read
                    yield self._normalise(images), batch.labels
