"""Batches for the classifier loops, the same from memory and from files.

Legend: B images at a time per process, (h, w) pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from spiralrope_cli.core.config.datasets import BUILT_IN
from spiralrope_cli.core.config.runs import ClassifierRun
from spiralrope_cli.core.data import files, memory
from spiralrope_cli.core.data.mixing import erase, mix
from spiralrope_cli.core.data.order import Places, own_parts, own_places
from spiralrope_cli.core.errors import DataError
from spiralrope_cli.core.runtime import distributed

EVAL_BATCH = 256


@dataclass(frozen=True)
class Batch:
    """One micro batch on the device.

    Attributes:
        images: [B, channels, h, w] float32, normalised.
        targets: [B] class numbers, or [B, K] where labels are mixed.
        part: its place in the step's batch.
        numbers: [B] image numbers in the training set, on the CPU.
    """

    images: Tensor
    targets: Tensor
    part: slice
    numbers: Tensor


@dataclass
class BadImages:
    """Images that could not be read, by path."""

    reasons: dict[str, str] = field(default_factory=dict)

    def meet(self, unreadable: tuple[files.Unreadable, ...], skip: bool) -> None:
        """Notes them, or raises for the first."""
        for bad in unreadable:
            if not skip:
                raise bad.error()
            self.reasons[bad.path] = bad.reason

    def passed_over(
        self, batches: Iterable[files.Loaded], skip: bool, size: int
    ) -> Iterator[files.Loaded]:
        """The same for each training batch, which is filled up with the next readable images.

        Raises:
            DataError: one that could not be filled up to its size.
        """
        for loaded in batches:
            self.meet(loaded.unreadable, skip)
            if len(loaded.labels) < size:
                raise DataError(
                    f"{files.MAX_TRIES} training images in a row cannot be read",
                    f"the last: {loaded.unreadable[-1].path}",
                )
            yield loaded


class ClassifierData:
    """The two splits of a run's data set, and how batches are made of them.

    Args:
        run: the run.
        device: where batches go.
        rank: of this process.
        world_size: processes that share each step.
    """

    def __init__(self, run: ClassifierRun, device: torch.device, rank: int, world_size: int):
        self.run, self.device, self.rank, self.world_size = run, device, rank, world_size
        self.micro, self.accumulation = run.split_batch(world_size)
        self._parts = own_parts(rank, self.accumulation, self.micro)
        self.bad = BadImages()
        augment, channels = run.augment, run.model.in_chans
        self._mean = torch.tensor(augment.mean, device=device).view(-1, 1, 1) * 255
        self._std = torch.tensor(augment.std, device=device).view(-1, 1, 1) * 255
        if run.data in BUILT_IN:
            with distributed.first_alone():  # it may have to unpack or download
                splits = memory.load_memory_set(run.data)
            self._train, self._val = (split.to(device) for split in splits)
        else:
            root, size, grey = Path(run.data), run.model.image_size, channels == 1
            self._train_files = files.train_files(root, size, augment, grey)
            self._val_files = files.val_files(root, size, augment.crop_ratio, grey)

    @property
    def in_memory(self) -> bool:
        """Whether the set lives on the device."""
        return self.run.data in BUILT_IN

    def train_steps(self, first_step: int, last_step: int) -> Generator[list[Batch], None, None]:
        """This process's micro batches of each step, from `first_step` up to `last_step`."""
        steps = range(first_step, last_step)
        source = self._train_from_memory(steps) if self.in_memory else self._train_from_files(steps)
        for step in steps:
            yield [self._finish(step, *next(source)) for _ in range(self.accumulation)]

    def _places(self, step: int) -> Iterator[Places]:
        return own_places(self.run, step, self.run.augment.repeated_aug, self._parts)

    def _train_from_memory(self, steps: range) -> Iterator[tuple[Tensor, Tensor, slice, Tensor]]:
        run = self.run
        for step in steps:
            for epoch, part, places, numbers in self._places(step):
                draws = memory.epoch_draws(run.num_train, run.seed, epoch)[places]
                chosen = numbers.to(self.device, non_blocking=True)
                images = self._train.images[chosen].float()
                images = memory.warp(images, draws, run.augment, run.model.image_size)
                yield images, self._train.labels[chosen], part, numbers

    def _train_from_files(self, steps: range) -> Iterator[tuple[Tensor, Tensor, slice, Tensor]]:
        seed = self.run.seed

        def keys() -> Iterator[list[tuple[int, tuple[int, int, int]]]]:
            for step in steps:
                for epoch, _, places, numbers in self._places(step):
                    yield [
                        (number, (seed, epoch, place))
                        for number, place in zip(numbers.tolist(), places.tolist(), strict=True)
                    ]

        machine = self.run.machine
        loaded = files.load(self._train_files, keys(), machine.workers, self._pin)
        batches = self.bad.passed_over(loaded, machine.skip_bad, self.micro)
        for step in steps:
            for _, part, _, numbers in self._places(step):
                yield *self._to_device(next(batches)), part, numbers

    @property
    def _pin(self) -> bool:
        return self.device.type == "cuda"

    def _to_device(self, loaded: files.Loaded) -> tuple[Tensor, Tensor]:
        images = loaded.images.to(self.device, non_blocking=True).float()
        return images, loaded.labels.to(self.device, non_blocking=True)

    def _finish(
        self, step: int, images: Tensor, labels: Tensor, part: slice, numbers: Tensor
    ) -> Batch:
        run = self.run
        images = (images - self._mean) / self._std
        first = step * run.optim.batch_size + part.start
        images = erase(images, run.augment.random_erasing, run.seed, first)
        images, targets = mix(images, labels, run.augment, run.model.num_classes, run.seed, first)
        return Batch(images, targets, part, numbers)

    def remake(self, step: int) -> dict[str, Tensor]:
        """What this process saw in a step, on the CPU."""
        batches = next(self.train_steps(step, step + 1))
        return {
            "images": torch.cat([batch.images.cpu() for batch in batches]),
            "targets": torch.cat([batch.targets.cpu() for batch in batches]),
            "numbers": torch.cat([batch.numbers for batch in batches]),
        }

    def val_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images and labels; over all processes every image comes exactly once."""
        num = self.run.num_val
        starts = range(self.rank * EVAL_BATCH, num, self.world_size * EVAL_BATCH)
        spans = [range(start, min(start + EVAL_BATCH, num)) for start in starts]
        if self.in_memory:
            for span in spans:
                images = self._val.images[span.start : span.stop].float()
                images = memory.resize_and_crop(
                    images, self.run.model.image_size, self.run.augment.crop_ratio
                )
                yield self._normalised(images), self._val.labels[span.start : span.stop]
            return
        machine = self.run.machine
        keys = [[(number, None) for number in span] for span in spans]
        for loaded in files.load(self._val_files, keys, machine.workers, self._pin):
            self.bad.meet(loaded.unreadable, machine.skip_bad)
            if len(loaded.labels):
                images, labels = self._to_device(loaded)
                yield self._normalised(images), labels

    def _normalised(self, images: Tensor) -> Tensor:
        return (images - self._mean) / self._std
