"""Batches for both models: the order of the images, and how they are read, augmented and moved.

Order and augmentation are functions of seed and step, so they are the same for any number of
processes and any micro-batch size. The *place* of an image is its index in the order of an epoch,
or of the run.

Legend: B images in a micro-batch, (h, w) pixels or latents, K classes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor

from spiralrope_cli.core.config.datasets import BUILT_IN, EvalProtocol
from spiralrope_cli.core.config.dit_runs import DiTRun, TrainingRun
from spiralrope_cli.core.config.folders import IMAGENET_CLASSES
from spiralrope_cli.core.config.runs import ClassifierRun
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.data import augment, memory
from spiralrope_cli.core.data.classes import real_images
from spiralrope_cli.core.data.color import apply_steps, draw_steps
from spiralrope_cli.core.data.images import as_tensor, in_order
from spiralrope_cli.core.data.latents import LatentCache
from spiralrope_cli.core.data.loader import MAX_TRIES, Batch, BatchIndices, ImageFiles, load
from spiralrope_cli.core.data.splits import train_split, val_split
from spiralrope_cli.core.runtime.launch import cores_per_process, num_loaders
from spiralrope_cli.core.runtime.seeds import generator_for, seed_for

EVAL_BATCH = 256

LATENTS_AHEAD = 2
"""Batches of cached latents that are read ahead."""

Read = Callable[[Iterable[BatchIndices]], Generator[Batch, None, None]]
"""BatchIndices -> their images on the device, in [0, 255], or latents."""


# --- Order of the images


@functools.lru_cache(maxsize=2)
def epoch_order(num_images: int, repeats: int, seed: int, epoch: int) -> Tensor:
    """[num_images] int64, the order of the images in one epoch.

    Args:
        num_images: size of the training set.
        repeats: augmented copies per image, next to each other (repeated augmentation by timm's
            sampler; an epoch then covers a part of the set); 1: shuffling only.
        seed: seed of the run.
        epoch: from 0.
    """
    if repeats == 1:
        generator = generator_for(seed, "order", epoch)
        return torch.randperm(num_images, generator=generator)
    # The sampler has no seed; it uses the number of the epoch as one.
    return repeated_order(num_images, repeats, seed_for(seed, "order", epoch))


def repeated_order(num_images: int, repeats: int, epoch: int) -> Tensor:
    """[num_images] int64 in the order of the published repeated augmentation."""
    sampler = RepeatAugSampler(
        range(num_images), num_replicas=1, rank=0, num_repeats=repeats, selected_round=0
    )
    sampler.set_epoch(epoch)
    return torch.tensor(list(sampler))


def separate_repeats(batch_size: int, repeats: int) -> Tensor:
    """[batch_size] places within a step, reordered so that copies of an image are not neighbours.

    Mixup mixes neighbours, and an image mixed with its own copy is not mixed.
    """
    places = torch.arange(batch_size)
    return torch.cat([places[first::repeats] for first in range(repeats)])


def own_parts(rank: int, micro: int, grad_accum_steps: int) -> list[slice]:
    """The parts of a step's batch that one process computes, one per micro-batch."""
    first = rank * grad_accum_steps
    return [slice(n * micro, (n + 1) * micro) for n in range(first, first + grad_accum_steps)]


# --- Training


@dataclass(frozen=True)
class TrainingData:
    """The training set of a run and its batches; `classifier_data` and `dit_data` make it."""

    run: TrainingRun
    parts: list[slice]  # parts of each step's batch for this process, one per micro-batch
    read: Read
    finish: Callable[[Batch], Batch]  # augments and normalises
    unreadable: dict[str, str] = field(default_factory=dict)  # path -> reason, skipped so far
    repeats: int = 1  # augmented copies per image
    scale: float = 1.0  # factor of cached latents
    helps: str = ""  # if training waits for this data; empty: it is in memory
    waits: list[float] = field(default_factory=list)  # seconds of each wait since they were cleared

    def train_steps(self, first_step: int, last_step: int) -> Generator[list[Batch], None, None]:
        """This process's micro-batches of each step, from `first_step`, before `last_step`."""
        with contextlib.closing(self.read(self.batch_indices(first_step, last_step))) as batches:
            for step in range(first_step, last_step):
                micro_batches = []
                for _ in self.parts:
                    start = time.perf_counter()
                    batch = next(batches)
                    if self.helps and step > first_step:  # the workers have started
                        self.waits.append(time.perf_counter() - start)
                    micro_batches.append(self.finish(batch))
                yield micro_batches

    def batch_indices(self, first_step: int, last_step: int) -> Iterator[BatchIndices]:
        """The images of those micro-batches, and their places."""
        size = self.run.optim.batch_size
        for step in range(first_step, last_step):
            epoch, within = divmod(step, self.run.steps_per_epoch)
            order = epoch_order(self.run.num_train, self.repeats, self.run.seed, epoch)
            places = within * size + separate_repeats(size, self.repeats)
            for part in self.parts:
                mine = places[part]
                indices, first = order[mine].tolist(), step * size + part.start
                yield BatchIndices(indices, mine.tolist(), epoch, part, first)

    def remake(self, step: int) -> dict[str, Tensor]:
        """This process's batch of a step, from 0, made again to save it; on the CPU."""
        [batches] = self.train_steps(step, step + 1)
        return {
            "images": torch.cat([batch.images.cpu() for batch in batches]),
            "labels": torch.cat([batch.labels.cpu() for batch in batches]),
            "numbers": torch.tensor([index for batch in batches for index in batch.at.indices]),
        }


def classifier_data(
    run: ClassifierRun, device: torch.device, rank: int, world_size: int, unreadable: dict[str, str]
) -> TrainingData:
    """The training set of a classifier; skipped images are added to `unreadable`."""
    model, options = run.model, run.augment
    read: Read
    helps = ""
    if in_memory := run.data in BUILT_IN:
        split, _ = memory.splits_on(device, run.data, model.in_chans)
        read = functools.partial(from_memory, split)
    else:
        listed = train_split(run.data).images
        transform, draw = augment.train_transform(model.image_size, options), None
        on_gpu = options.augment_on == "auto" and device.type != "cpu"
        if options.augment_on == "device" or (on_gpu and options.runs_in_batches):
            crop = augment.random_resized_crop
            transform = functools.partial(crop, model.image_size, options.crop_scale)
            draw = functools.partial(draw_steps, options)
        grey = model.in_chans == 1
        files = ImageFiles(listed, transform, grey, MAX_TRIES, run.seed, as_tensor, draw)
        read = functools.partial(load, files, run.machine, device, unreadable)
        helps = more_workers(run.machine, device)
    normalise = augment.Normalise(options.mean, options.std, device)

    def finish(batch: Batch) -> Batch:
        at, images = batch.at, batch.images
        if in_memory:
            draws = augment.epoch_draws(run.num_train, run.seed, at.epoch)[at.places]
            images = augment.warp(images, draws, options, model.image_size)
        if batch.steps:
            images = apply_steps(images, batch.steps)
        images = augment.erase(normalise(images), options.random_erasing, run.seed, at.first)
        mixed = augment.mix(images, batch.labels, options, model.num_classes, run.seed, at.first)
        return Batch(at, *mixed)

    parts, repeats = own_parts(rank, *run.split_batch(world_size)), options.repeated_aug
    return TrainingData(run, parts, read, finish, unreadable, repeats=repeats, helps=helps)


def dit_data(run: DiTRun, device: torch.device, rank: int, world_size: int) -> TrainingData:
    """The training set of a DiT: images, or cached posteriors of a VAE."""
    size, unreadable = run.images.image_size, dict[str, str]()
    parts = own_parts(rank, *run.split_batch(world_size))
    read: Read
    helps = ""

    def mirrored(at: BatchIndices) -> Tensor:
        """[B] bool on the CPU: a function of seed, epoch and place, for all kinds of data."""
        draws = augment.mirror_draws(run.num_train, run.seed, at.epoch)
        return draws[at.places] < run.images.hflip

    if run.images.latents:
        cache = LatentCache(Path(os.path.expanduser(run.images.latents)))
        cache.verify()
        read = functools.partial(from_cache, cache, device, mirrored)
        helps = f"a faster disk than that of {run.images.latents}, or more memory to cache it"
        return TrainingData(run, parts, read, lambda batch: batch, scale=cache.scale, helps=helps)
    if run.data in BUILT_IN:
        channels = 3 if run.images.in_latents else run.model.in_chans
        split, _ = memory.splits_on(device, run.data, channels)
        read = functools.partial(from_memory, split)
    else:
        crop = functools.partial(augment.cropped_array, size=size)
        files = ImageFiles(train_split(run.data).images, crop, tries=MAX_TRIES)
        read = functools.partial(load, files, run.machine, device, unreadable)
        helps = more_workers(run.machine, device)
        if run.vae_in_loop:
            helps += ", or latents that dit-encode made once"

    def finish(batch: Batch) -> Batch:
        images = augment.resize_and_crop(batch.images, size, 1.0) / 127.5 - 1
        return replace(batch, images=augment.mirror(images, mirrored(batch.at)))

    return TrainingData(run, parts, read, finish, unreadable, helps=helps)


def more_workers(machine: MachineConfig, device: torch.device) -> str:
    """What helps if training waits for image files."""
    workers, cores = num_loaders(machine, device.type), cores_per_process()
    if workers < cores - 1:
        return f"--workers {cores - 1}, in place of {workers}"
    return f"more cores (this process has {cores}), or files of smaller images"


def from_memory(
    split: memory.MemorySplit, batches: Iterable[BatchIndices]
) -> Generator[Batch, None, None]:
    """Images of a data set on the device."""
    for at in batches:
        chosen = torch.tensor(at.indices).to(split.images.device, non_blocking=True)
        yield Batch(at, split.images[chosen].float(), split.labels[chosen])


def from_cache(
    cache: LatentCache,
    device: torch.device,
    mirrored: Callable[[BatchIndices], Tensor],
    batches: Iterable[BatchIndices],
) -> Generator[Batch, None, None]:
    """Cached posteriors, read ahead in a thread; the cache also has those of flipped images."""

    def read(at: BatchIndices) -> Batch:
        numbers = torch.tensor(at.indices)
        mean, std = cache.mean_std(numbers, mirrored(at), pin_memory=device.type == "cuda")
        return Batch(at, mean, cache.labels[numbers], std)

    tasks = (functools.partial(read, at) for at in batches)
    with contextlib.closing(in_order(tasks, 1, LATENTS_AHEAD)) as ahead:
        for batch in ahead:
            yield batch.on(device)


# --- Validation


class ValidationImages:
    """The validation images of a data set, with one protocol, split over all processes.

    Attributes:
        unreadable: path -> reason, images that were skipped so far.
        decoded: number of images that this process has read so far.
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
        # The same batches for any number of processes, so that metrics do not depend on it.
        starts = range(rank * EVAL_BATCH, protocol.num_val, world_size * EVAL_BATCH)
        self._spans = [range(first, min(first + EVAL_BATCH, protocol.num_val)) for first in starts]
        self._read: Read
        self._several: list[tuple[int, ...]] = []  # right classes of each image, if not one
        if self._in_memory:
            _, split = memory.splits_on(device, protocol.data, protocol.in_chans)
            self._read = functools.partial(from_memory, split)
        else:
            transform = augment.eval_transform(protocol.image_size, protocol.crop_ratio)
            listed = val_split(protocol.data).images
            if protocol.real_labels:
                labelled = real_images(protocol.real_labels, protocol.data)
                self._several = [labels for _, labels in labelled]
                listed = [(address, number) for number, (address, _) in enumerate(labelled)]
            files = ImageFiles(listed, transform, protocol.in_chans == 1)
            self._read = functools.partial(load, files, machine, device, self.unreadable)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images [B, channels, h, w] and labels; each image once over all processes.

        Labels are class numbers [B]; those of ReaL are bool [B, 1000], true for each right class.
        """
        size, ratio = self.protocol.image_size, self.protocol.crop_ratio
        with contextlib.closing(
            self._read(BatchIndices(list(span), []) for span in self._spans)
        ) as batches:
            for batch in batches:
                images = batch.images
                if self._in_memory:
                    images = augment.resize_and_crop(images, size, ratio)
                self.decoded += len(batch.labels)
                labels = batch.labels
                if self._several:
                    labels = torch.zeros(len(labels), IMAGENET_CLASSES, dtype=torch.bool)
                    for row, number in zip(labels, batch.labels.tolist(), strict=True):
                        row[list(self._several[number])] = True
                    labels = labels.to(images.device)
                if len(labels):  # 0 if no image of the batch could be read
                    yield self._normalise(images), labels
