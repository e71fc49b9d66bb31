"""Held-out images as the evaluation protocol shows them, from memory and from files.

Legend: B images at a time per process, (h, w) pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from spiralrope_cli.core.config.datasets import BUILT_IN
from spiralrope_cli.core.config.runs import EvalProtocol
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.data import files, memory
from spiralrope_cli.core.errors import DataError

EVAL_BATCH = 256


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
        self._mean = torch.tensor(protocol.mean, device=device).view(-1, 1, 1) * 255
        self._std = torch.tensor(protocol.std, device=device).view(-1, 1, 1) * 255
        # The same spans for any number of processes, so that figures do not depend on it.
        starts = range(rank * EVAL_BATCH, protocol.num_val, world_size * EVAL_BATCH)
        self._spans = [slice(first, min(first + EVAL_BATCH, protocol.num_val)) for first in starts]
        if protocol.data in BUILT_IN:
            _, self._split = memory.splits_on(device, protocol.data, protocol.in_chans)
        else:
            size, ratio, grey = protocol.image_size, protocol.crop_ratio, protocol.in_chans == 1
            self._files = files.val_files(Path(protocol.data), size, ratio, grey)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images [B, channels, h, w] and labels [B].

        Over all processes every image comes exactly once.
        """
        from_memory = self.protocol.data in BUILT_IN
        for images, labels in self._from_memory() if from_memory else self._from_files():
            self.decoded += len(labels)
            yield self.normalised(images), labels

    def _from_memory(self) -> Iterator[tuple[Tensor, Tensor]]:
        size, ratio = self.protocol.image_size, self.protocol.crop_ratio
        for span in self._spans:
            images = self._split.images[span].float()
            yield memory.resize_and_crop(images, size, ratio), self._split.labels[span]

    def _from_files(self) -> Iterator[tuple[Tensor, Tensor]]:
        keys = [[(n, None) for n in range(span.start, span.stop)] for span in self._spans]
        on_gpu = self.device.type == "cuda"
        loader = files.load(self._files, keys, self.machine.workers, on_gpu)
        with contextlib.closing(loader) as batches:
            for loaded in batches:
                self.bad.meet(loaded.unreadable, self.machine.skip_bad)
                if len(loaded.labels):
                    yield loaded.on(self.device)

    def normalised(self, images: Tensor) -> Tensor:
        """[..., channels, h, w] pixels in [0, 255] as the network takes them."""
        return (images - self._mean) / self._std
