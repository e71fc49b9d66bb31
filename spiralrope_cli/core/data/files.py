"""Image files: opened, carried along where they cannot be decoded, and loaded by processes."""

from __future__ import annotations

import contextlib
import os
import struct
import sys
import zlib
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from spiralrope_cli.core.config.datasets import list_images
from spiralrope_cli.core.errors import DataError, UnreadableImageError, dead_loader
from spiralrope_cli.core.runtime.launch import cores_per_process
from spiralrope_cli.core.runtime.seeds import seed_everything

Transform = Callable[[Image.Image], np.ndarray]
"""A picture as uint8 [channels, h, w]."""

BROKEN_IMAGE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error)

MAX_TRIES = 16
"""Unreadable images in a row before a training sample is given up with `skip_bad`."""

GRACE_SECONDS = 60
"""How long loader processes outlive a SIGTERM: the trainer finishes its step meanwhile."""


# --- Single files


@dataclass(frozen=True)
class Unreadable:
    """A picture that could not be decoded, carried out of a loader process in one piece."""

    path: str
    reason: str

    def error(self) -> UnreadableImageError:
        """The error that ends a run without --skip-bad."""
        return UnreadableImageError(
            f"image {self.path} cannot be read: {self.reason}",
            "remove it, or go on without such images by --skip-bad",
        )


def open_picture(
    path: str, convert: Callable[[Image.Image], Image.Image]
) -> Image.Image | Unreadable:
    """A decoded and converted picture, or why there is none."""
    try:
        with Image.open(path) as image:
            return convert(image)
    except BROKEN_IMAGE as error:
        reason = str(error).replace(path, "").strip(" '") or type(error).__name__
        return Unreadable(path, reason)
    except Image.DecompressionBombError:
        return Unreadable(path, "it is too large")


def decode_some(folders: Iterable[Path | None], most: int) -> tuple[int, list[Unreadable]]:
    """Decodes some pictures of each folder of classes, evenly spread, and at most so many.

    Returns:
        how many, and those of them that cannot be decoded.
    """
    chosen: list[str] = []
    for folder in folders:
        paths = [path for path, _ in list_images(folder)] if folder else []
        count = min(most, len(paths))
        chosen += [paths[number * len(paths) // count] for number in range(count)]
    opened = [open_picture(path, lambda image: image.convert("RGB")) for path in chosen]
    return len(chosen), [each for each in opened if isinstance(each, Unreadable)]


# --- Batches


@dataclass(frozen=True)
class Loaded:
    """One collated batch: images [B, channels, h, w] uint8, labels [B] int64, and what failed."""

    images: Tensor
    labels: Tensor
    unreadable: tuple[Unreadable, ...]

    def pin_memory(self) -> Loaded:
        """The same in page-locked memory; the loader asks, as it knows no such class."""
        return Loaded(self.images.pin_memory(), self.labels.pin_memory(), self.unreadable)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images as float32 and labels on a device."""
        images = self.images.to(device, non_blocking=True).float()
        return images, self.labels.to(device, non_blocking=True)


@dataclass
class BadImages:
    """Images that could not be read, by path."""

    reasons: dict[str, str] = field(default_factory=dict)

    def meet(self, unreadable: tuple[Unreadable, ...], skip: bool) -> None:
        """Notes them, or raises for the first."""
        for bad in unreadable:
            if not skip:
                raise bad.error()
            self.reasons[bad.path] = bad.reason

    def pass_over(self, loaded: Loaded, skip: bool, size: int) -> None:
        """The same for a training batch, which is filled up with the next readable images.

        Raises:
            DataError: it could not be filled up to its size.
        """
        self.meet(loaded.unreadable, skip)
        if len(loaded.labels) < size:
            raise DataError(
                f"{MAX_TRIES} training images in a row cannot be read",
                f"the last: {loaded.unreadable[-1].path}",
            )


class ImageFiles(Dataset[Any]):
    """Image files by key: (number, seed parts) in training, (number, None) in evaluation.

    Args:
        files: (path, class number) of every image.
        transform: picture to uint8 array [channels, h, w].
        grey: whether the network takes one channel.
    """

    def __init__(self, files: list[tuple[str, int]], transform: Transform, grey: bool) -> None:
        # Plain arrays: a list of a million tuples would be copied page by page in each worker.
        self.paths = np.array([os.fsencode(path) for path, _ in files])
        self.labels = np.array([label for _, label in files], dtype=np.int64)
        self.transform = transform
        self.mode = "L" if grey else "RGB"

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, tuple[int, ...] | None]) -> tuple[Any, int, Any]:
        """(array or None, label, unreadable or None); nothing random but by the seed parts."""
        number, parts = key
        path = os.fsdecode(self.paths[number])
        picture = open_picture(path, lambda image: _flattened(image).convert(self.mode))
        if isinstance(picture, Unreadable):
            return None, int(self.labels[number]), picture
        if parts is not None:
            seed_everything("augment", *parts)
        array = np.asarray(self.transform(picture))
        return array, int(self.labels[number]), None


def _flattened(image: Image.Image) -> Image.Image:
    """Transparency over black, and 16 bits of grey as 8: a plain conversion would lose both."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.asarray(image).clip(0, 65535) / 257  # else all but the darkest become white
        return Image.fromarray(levels.round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image


class TrainFiles(ImageFiles):
    """The same, but an unreadable image is replaced by the next readable one, and told."""

    def __getitem__(self, key: tuple[int, tuple[int, ...] | None]) -> tuple[Any, int, Any]:
        """As `ImageFiles`, with all unreadable images that were passed over."""
        number, parts = key
        failed: list[Unreadable] = []
        for offset in range(MAX_TRIES):
            array, label, bad = super().__getitem__(((number + offset) % len(self), parts))
            if bad is None:
                return array, label, tuple(failed)
            failed.append(bad)
        return None, 0, tuple(failed)


def collate(items: Sequence[tuple[Any, int, Any]]) -> Loaded:
    """Stacks what could be read."""
    good = [(array, label) for array, label, _ in items if array is not None]
    bad: list[Unreadable] = []
    for _, _, told in items:
        bad += [told] if isinstance(told, Unreadable) else (told or ())
    images = torch.from_numpy(np.stack([a for a, _ in good])) if good else torch.empty(0)
    labels = torch.tensor([label for _, label in good], dtype=torch.int64)
    return Loaded(images, labels, tuple(bad))


def load(
    files: ImageFiles, batches: Iterable[list[tuple[int, Any]]], workers: int, pin_memory: bool
) -> Generator[Loaded, None, None]:
    """Batches by lists of keys, read ahead by loader processes, which end when it is closed.

    Raises:
        DataError: a loader process was killed.
    """
    if workers < 0:
        workers = min(4, cores_per_process())
    loader = DataLoader(
        files,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_one_thread if workers else None,
        # Processes that a launcher spawned would spawn in turn, and load torch for each anew.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )
    loading = iter(loader)
    try:
        yield from loading
    except (RuntimeError, ConnectionError, EOFError) as error:
        if died := dead_loader(error):
            raise died from error
        raise
    finally:
        # Traceback or not: an iterator that lives on keeps its processes until the very end,
        # where they take a SIGTERM for one that the trainer answers.
        if workers:
            with contextlib.suppress(RuntimeError):  # one that was killed is told above
                loading._shutdown_workers()  # type: ignore[attr-defined]


def _one_thread(worker: int) -> None:
    """Loader processes share the cores; a signal to the whole group is the trainer's to answer."""
    import signal

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_SECONDS))
