"""Batches of image files, decoded and augmented by data loader workers.

Legend: B images in a batch, K classes, (h, w) pixels or latents.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.data.color import Ops
from spiralrope_cli.core.data.images import Unreadable, as_trained, note_unreadable, open_image
from spiralrope_cli.core.data.listing import ImageList
from spiralrope_cli.core.errors import ConfigError, DataError, dead_loader
from spiralrope_cli.core.runtime.launch import num_loaders
from spiralrope_cli.core.runtime.seeds import seed_everything

Transform = Callable[[Any], np.ndarray]
"""Image, as `as_trained` or `as_tensor` gives it -> uint8 [channels, h, w]."""

Loaded = tuple[np.ndarray | None, int, tuple[Unreadable, ...], Ops]
"""Array, None if no try was readable; label, unreadable images, operations for the device."""

MAX_TRIES = 16
"""With `skip_bad`, unreadable images in a row after which training stops."""

PREFETCH = 4
"""Batches that each worker reads ahead at most."""

AT_ONCE = 64
"""Images that a worker reads at once."""
LONGEST_TEMP_FOLDER = 75
"""A socket has a path of 107 bytes at most; `/pymp-XXXXXXXX/listener-XXXXXXXX` is 32 of them."""

NOISES = ("noise", "posterior")
"""Purposes of the noise of a DiT's sample: of x_t, and of x_0 from the posterior of its latents."""

LIFE_AFTER_SIGTERM = 60
"""Workers live so long after a SIGTERM, because the trainer finishes its step."""


# --- Batches


class BatchIndices(NamedTuple):
    """The images of a batch, and their places in a training run.

    Lists, because it is sent to workers: tensors would go through shared memory.
    """

    indices: list[int]  # [B] in the data set
    places: list[int]  # [B] in the epoch; empty for validation
    epoch: int = 0  # from 0
    part: slice = slice(0)  # this micro-batch, as a part of the step's batch
    first: int = 0  # place of its first image in the run


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    at: BatchIndices  # its images, and their places in the run
    # [B, channels, h, w]: uint8 from the loader, float32 on the device. First in [0, 255], then
    # normalised, for a DiT in [-1, 1]. For cached latents: posterior means.
    images: Tensor
    labels: Tensor  # [B] class numbers; after mixing [B, K]
    std: Tensor | None = None  # standard deviations of cached posteriors, shape of `images`
    noise: Mapping[str, Tensor] = field(default_factory=dict)  # by NOISES, if it is drawn ahead
    unreadable: tuple[Unreadable, ...] = ()  # images that were skipped or replaced
    ops: tuple[Ops, ...] = ()  # of each image, what the device applies; empty: nothing

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a worker sends through shared memory."""
        return self.images, self.labels

    def pin_memory(self) -> Batch:
        """In page-locked memory; `DataLoader` calls this for a class that it does not know."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())

    def on(self, device: torch.device) -> Batch:
        """On a device, images as float32."""
        images = self.images.to(device, non_blocking=True).float()
        std = None if self.std is None else self.std.to(device, non_blocking=True)
        labels = self.labels.to(device, non_blocking=True)
        return replace(self, images=images, labels=labels, std=std)


@dataclass(eq=False)
class ImageFiles(Dataset[Any]):
    """Image files with class labels."""

    images: Sequence[tuple[str, int]]  # (path, class number) of each
    transform: Transform
    grey: bool = False  # convert to one channel
    tries: int = 1  # the next image replaces an unreadable one, at most so many in a row
    # Of the run, if the transform is random; it is then a function of seed, epoch and place.
    seed: int | None = None
    read: Callable[..., Any] = as_trained  # or `as_tensor`, whichever the transform takes
    draw_ops: Callable[[], Ops] | None = None  # what the device applies after the transform

    def __post_init__(self) -> None:
        self.images = ImageList.of(self.images)
        self.read = partial(self.read, mode="L" if self.grey else "RGB")

    def __getitem__(self, key: tuple[int, tuple[int, ...] | None]) -> Loaded:
        """One image, by its index and the seed parts of its augmentation, if any."""
        first, seed_parts = key
        failed: list[Unreadable] = []
        for index in range(first, first + self.tries):
            path, label = self.images[index % len(self.images)]
            image = open_image(path, self.read)
            if not isinstance(image, Unreadable):
                if seed_parts is not None:
                    seed_everything("augment", *seed_parts)
                array = np.asarray(self.transform(image))
                return array, label, tuple(failed), self.draw_ops() if self.draw_ops else ()
            failed.append(image)
            if image.not_fetched:
                break
        return None, self.images[first][1], tuple(failed), ()

    def __getitems__(self, at: BatchIndices) -> Batch:
        """A batch of the readable images; `DataLoader` calls this once per batch."""
        seed_parts: list[tuple[int, ...] | None] = [None] * len(at.indices)
        if self.seed is not None and at.places:
            seed_parts = [(self.seed, at.epoch, place) for place in at.places]
        keys = zip(at.indices, seed_parts, strict=True)
        loaded = [self[key] for key in keys]
        good = [(array, label, ops) for array, label, _, ops in loaded if array is not None]
        images = torch.empty(0)
        if arrays := [array for array, *_ in good]:
            # Without `out` it would keep the order of a decoded image, channels last, which is slow
            # to normalise.
            whole = np.empty((len(arrays), *arrays[0].shape), np.uint8)
            images = torch.from_numpy(np.stack(arrays, out=whole))
        return Batch(
            at,
            images,
            torch.tensor([label for _, label, _ in good], dtype=torch.int64),
            unreadable=tuple(each for _, _, failed, _ in loaded for each in failed),
            ops=tuple(ops for *_, ops in good if ops),
        )


def load(
    files: ImageFiles,
    machine: MachineConfig,
    device: torch.device,
    unreadable: dict[str, str],
    batches: Iterable[BatchIndices],
) -> Generator[Batch, None, None]:
    """Batches on the device, read ahead by workers.

    A worker reads at most `AT_ONCE` images, so that all of them work on a large batch. Skipped
    images are added to `unreadable`, path -> reason.
    """
    started: deque[BatchIndices] = deque()

    def parts() -> Iterator[BatchIndices]:
        for at in batches:
            started.append(at)
            for first in range(0, len(at.indices), AT_ONCE):
                part = slice(first, first + AT_ONCE)
                yield at._replace(indices=at.indices[part], places=at.places[part])

    workers, on_gpu = num_loaders(machine, device.type), device.type == "cuda"
    read: list[Batch] = []
    with contextlib.closing(read_ahead(files, parts(), workers, pin_memory=on_gpu)) as loading:
        for batch in loading:
            note_unreadable(batch.unreadable, machine.skip_bad, unreadable)
            if files.tries > 1 and len(batch.labels) < len(batch.at.indices):
                raise DataError(
                    f"{files.tries} training images in a row cannot be read",
                    f"the last: {batch.unreadable[-1].path}",
                )
            read.append(batch.on(device))
            if sum(len(each.at.indices) for each in read) == len(started[0].indices):
                yield _together(started.popleft(), read)
                read = []


def _together(at: BatchIndices, parts: list[Batch]) -> Batch:
    """One batch of its parts."""
    if len(parts) == 1:
        return parts[0]
    return Batch(
        at,
        torch.cat([part.images for part in parts]),
        torch.cat([part.labels for part in parts]),
        unreadable=tuple(bad for part in parts for bad in part.unreadable),
        ops=tuple(ops for part in parts for ops in part.ops),
    )


def read_ahead(
    files: Any, batches: Iterable[Any], workers: int, *, pin_memory: bool, prefetch: int = PREFETCH
) -> Generator[Any, None, None]:
    """`files.__getitems__(batch)` in order, by workers, which end when the generator is closed.

    A result has `tensors`, to be moved between processes, and `pin_memory()`. Each worker reads at
    most `prefetch` batches ahead.
    """
    folder = tempfile.gettempdir()
    if workers and len(os.fsencode(folder)) > LONGEST_TEMP_FOLDER:
        raise ConfigError(
            f"TMPDIR is {folder}; sockets between processes lie in it, and it may have at most "
            f"{LONGEST_TEMP_FOLDER} characters",
            "name another one, or use --workers 0",
        )
    loader = DataLoader(
        files,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=_one_thread if workers else None,
        # In a spawned process the default is to spawn again, and each worker would import torch.
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
        # An iterator that a traceback still refers to would keep its workers alive until the
        # interpreter exits; and there they ignore the SIGTERM (see `_one_thread`).
        if workers:
            with contextlib.suppress(RuntimeError):  # a killed worker is reported above
                loading._shutdown_workers()  # type: ignore[attr-defined]


def _as_it_is(batch: Any) -> Any:
    if get_worker_info():  # an error in the thread that sends it would be lost, and this would wait
        for tensor in batch.tensors:
            tensor.share_memory_()
    return batch


def _one_thread(worker: int) -> None:
    """Workers use one thread each, and leave Ctrl-C and SIGTERM to the trainer."""
    import signal

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(LIFE_AFTER_SIGTERM))
    sys.excepthook = _report_error


def _report_error(kind: Any, error: BaseException, trace: Any) -> None:
    """Prints an error of a thread, unless the trainer was killed: that has a message of its own."""
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)
