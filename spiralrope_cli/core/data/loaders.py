"""Batches for the classifier loops, the same from memory and from files.

Legend: B images at a time per process, (h, w) pixels, K classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spiralrope_cli.core.config.datasets import BUILT_IN
from spiralrope_cli.core.config.runs import ClassifierRun, EvalProtocol
from spiralrope_cli.core.data import files, memory
from spiralrope_cli.core.data.mixing import erase, mix
from spiralrope_cli.core.data.order import Places, own_parts, own_places
from spiralrope_cli.core.data.validation import ValidationImages


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
        augment, model = run.augment, run.model
        self.validation = ValidationImages(
            EvalProtocol(
                data=run.data,
                num_val=run.num_val,
                image_size=model.image_size,
                in_chans=model.in_chans,
                crop_ratio=augment.crop_ratio,
                mean=augment.mean,
                std=augment.std,
            ),
            run.machine,
            device,
            rank,
            world_size,
        )
        self.bad = self.validation.bad
        if self.in_memory:
            self._train, _ = memory.splits_on(device, run.data, model.in_chans)
        else:
            grey = model.in_chans == 1
            self._train_files = files.train_files(Path(run.data), model.image_size, augment, grey)

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
        on_gpu = self.device.type == "cuda"
        loader = files.load(self._train_files, keys(), machine.workers, on_gpu)
        with contextlib.closing(loader) as loaded:
            batches = self.bad.passed_over(loaded, machine.skip_bad, self.micro)
            for step in steps:
                for _, part, _, numbers in self._places(step):
                    yield *next(batches).on(self.device), part, numbers

    def _finish(
        self, step: int, images: Tensor, labels: Tensor, part: slice, numbers: Tensor
    ) -> Batch:
        run = self.run
        images = self.validation.normalised(images)
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
