"""Batches for both models: how images are read in their order, augmented and moved.

Augmentation is a function of seed and step, so it is the same for any number of processes and any
micro-batch size. The *place* of an image is its index in the order of an epoch, or of
the run.

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
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from spiralrope_cli.core.config.datasets import BUILT_IN, IMAGENET_CLASSES, EvalProtocol
from spiralrope_cli.core.config.dit_runs import DiTRun, TrainingRun
from spiralrope_cli.core.config.runs import ClassifierRun
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.data import augment, memory
from spiralrope_cli.core.data.classes import real_images
from spiralrope_cli.core.data.color import apply_ops, draw_ops
from spiralrope_cli.core.data.images import as_tensor
from spiralrope_cli.core.data.latents import LatentCache
from spiralrope_cli.core.data.loader import (
    MAX_TRIES,
    NOISES,
    Batch,
    BatchIndices,
    ImageFiles,
    load,
    read_ahead,
)
from spiralrope_cli.core.data.order import epoch_order, own_parts, separate_repeats, shards_ahead
from spiralrope_cli.core.data.splits import train_split, val_split
from spiralrope_cli.core.data.streams import Shards
from spiralrope_cli.core.runtime.distributed import local_rank
from spiralrope_cli.core.runtime.launch import cores_per_process, num_loaders
from spiralrope_cli.core.runtime.seeds import CPU, NoisePerImage

EVAL_BATCH = 256

LATENTS_AHEAD = 3
"""Batches of cached latents that are read ahead, each by a worker; of 256 images of 256 px, three
take 48 MB of shared memory, and Docker gives 64."""

Read = Callable[[Iterable[BatchIndices]], Generator[Batch, None, None]]
"""BatchIndices -> their images on the device, in [0, 255], or latents."""


# --- Training


@dataclass(frozen=True)
class TrainingData:
    """The training set of a run and its batches; `classifier_data` and `dit_data` make it."""

    run: TrainingRun
    parts: list[slice]  # parts of each step's batch for this process, one per micro-batch
    read: Read
    finish: Callable[[Batch], Batch]  # augments and normalises
    unreadable: dict[str, str] = field(default_factory=dict)  # path -> reason, skipped so far
    shards: Shards | None = None  # of a stream
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
        counts, per_epoch = self.shards.counts if self.shards else (), self.run.steps_per_epoch
        wanted = shards_ahead(self.order, counts, size, per_epoch, range(first_step, last_step))
        for step, shards in zip(range(first_step, last_step), wanted, strict=True):
            if self.shards and local_rank()[0] == 0:  # for all processes of the machine
                self.shards.fetch_ahead(shards)
            epoch, within = divmod(step, per_epoch)
            order = self.order(epoch)
            places = within * size + separate_repeats(size, self.repeats)
            for part in self.parts:
                mine = places[part]
                indices, first = order[mine].tolist(), step * size + part.start
                yield BatchIndices(indices, mine.tolist(), epoch, part, first)

    def order(self, epoch: int) -> Tensor:
        """[num_train] int64, the order of the images in one epoch."""
        counts = self.shards.counts if self.shards else ()
        return epoch_order(self.run.num_train, self.repeats, self.run.seed, epoch, counts)

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
    helps, shards = "", None
    if in_memory := run.data in BUILT_IN:
        split, _ = memory.splits_on(device, run.data, model.in_chans)
        read = functools.partial(from_memory, split)
    else:
        listed = train_split(run.data)
        transform, draw = augment.train_transform(model.image_size, options), None
        on_gpu = options.augment_on == "auto" and device.type != "cpu"
        if options.augment_on == "device" or (on_gpu and options.runs_in_batches):
            crop = augment.random_resized_crop
            transform = functools.partial(crop, model.image_size, options.crop_scale)
            draw = functools.partial(draw_ops, options)
        grey = model.in_chans == 1
        images, shards = listed.images, listed.shards
        files = ImageFiles(images, transform, grey, MAX_TRIES, run.seed, as_tensor, draw)
        read = functools.partial(load, files, run.machine, device, unreadable)
        helps = more_workers(run.machine, device, shards)
    normalise = augment.Normalise(options.mean, options.std, device)

    def finish(batch: Batch) -> Batch:
        at, images = batch.at, batch.images
        if in_memory:
            draws = augment.epoch_draws(run.num_train, run.seed, at.epoch)[at.places]
            images = augment.warp(images, draws, options, model.image_size)
        if batch.ops:
            images = apply_ops(images, batch.ops)
        images = augment.erase(normalise(images), options.random_erasing, run.seed, at.first)
        mixed = augment.mix(images, batch.labels, options, model.num_classes, run.seed, at.first)
        return Batch(at, *mixed)

    parts, repeats = own_parts(rank, *run.split_batch(world_size)), options.repeated_aug
    return TrainingData(run, parts, read, finish, unreadable, shards, repeats=repeats, helps=helps)


def dit_data(run: DiTRun, device: torch.device, rank: int, world_size: int) -> TrainingData:
    """The training set of a DiT: images, or cached posteriors of a VAE."""
    size, unreadable = run.images.image_size, dict[str, str]()
    parts = own_parts(rank, *run.split_batch(world_size))
    read: Read
    helps, shards = "", None

    if run.images.latents:
        cache = LatentCache(Path(os.path.expanduser(run.images.latents)))
        cache.verify()
        latents = DrawnLatents(cache, run.seed, run.images.hflip)
        cores = cores_per_process()
        workers = min(num_loaders(run.machine, device.type), LATENTS_AHEAD)
        read = functools.partial(from_cache, latents, device, workers)
        helps = f"a faster disk than that of {run.images.latents}, or more memory to cache it"
        if workers < LATENTS_AHEAD:
            more = f"--workers {min(cores - 1, LATENTS_AHEAD)}, in place of {workers}"
            helps = f"{more if workers < cores - 1 else f'more cores than {cores}'}, {helps}"
        return TrainingData(run, parts, read, lambda batch: batch, scale=cache.scale, helps=helps)
    if run.data in BUILT_IN:
        channels = 3 if run.images.in_latents else run.model.in_chans
        split, _ = memory.splits_on(device, run.data, channels)
        read = functools.partial(from_memory, split)
    else:
        crop = functools.partial(augment.cropped_array, size=size)
        listed = train_split(run.data)
        files, shards = ImageFiles(listed.images, crop, tries=MAX_TRIES), listed.shards
        read = functools.partial(load, files, run.machine, device, unreadable)
        helps = more_workers(run.machine, device, shards)
        if run.vae_in_loop:
            helps += ", or latents that dit-encode made once"

    def finish(batch: Batch) -> Batch:
        images = augment.resize_and_crop(batch.images, size, 1.0) / 127.5 - 1
        chosen = mirrored(batch.at, run.num_train, run.seed, run.images.hflip)
        return replace(batch, images=augment.mirror(images, chosen))

    return TrainingData(run, parts, read, finish, unreadable, shards, helps=helps)


def mirrored(at: BatchIndices, num_images: int, seed: int, hflip: float) -> Tensor:
    """[B] bool on the CPU: a function of seed, epoch and place, for all data of a DiT."""
    return augment.mirror_draws(num_images, seed, at.epoch)[at.places] < hflip


def more_workers(machine: MachineConfig, device: torch.device, shards: Shards | None) -> str:
    """What helps if training waits for image files, or for shards of a stream."""
    workers, cores = num_loaders(machine, device.type), cores_per_process()
    if workers < cores - 1:
        return f"--workers {cores - 1}, in place of {workers}"
    network = ", a faster network" if shards else ""
    return f"more cores (this process has {cores}){network}, or files of smaller images"


def from_memory(
    split: memory.MemorySplit, batches: Iterable[BatchIndices]
) -> Generator[Batch, None, None]:
    """Images of a data set on the device."""
    for at in batches:
        chosen = torch.tensor(at.indices).to(split.images.device, non_blocking=True)
        yield Batch(at, split.images[chosen].float(), split.labels[chosen])


@dataclass(eq=False)
class DrawnLatents(Dataset[Any]):
    """Cached posteriors, and the noise that the loss takes with them, for loader workers.

    In the trainer this takes a third of a train step of DiT-S/2 on an H200: two generators per
    image. A thread there takes as much, because each draw takes the interpreter's lock.
    """

    cache: LatentCache  # has those of flipped images too
    seed: int
    hflip: float

    def __getitems__(self, at: BatchIndices) -> Batch:
        """As images means, standard deviations and noise, [4, B, L, h, w]; without labels.

        Each tensor costs the trainer a message, and it has the labels.
        """
        numbers, samples = torch.tensor(at.indices), range(at.first, at.first + len(at.indices))
        flip = mirrored(at, len(self.cache), self.seed, self.hflip)
        mean, std = self.cache.mean_std(numbers, flip)
        noise = [NoisePerImage(self.seed, samples, mean.shape[1:], CPU, name) for name in NOISES]
        drawn = torch.stack((mean, std, *(each.draw() for each in noise)))
        return Batch(at, drawn, torch.empty(0))


def from_cache(
    latents: DrawnLatents, device: torch.device, workers: int, batches: Iterable[BatchIndices]
) -> Generator[Batch, None, None]:
    """Cached posteriors and their noise, read and drawn ahead by workers."""
    on_gpu = device.type == "cuda"
    with contextlib.closing(
        read_ahead(latents, batches, workers, pin_memory=on_gpu, prefetch=1)
    ) as loading:
        for batch in loading:
            labels = latents.cache.labels[batch.at.indices].to(device, non_blocking=True)
            mean, std, *noise = batch.on(device).images.unbind()
            yield Batch(batch.at, mean, labels, std, dict(zip(NOISES, noise, strict=True)))


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
