"""Images of a folder or an `.npz` as uint8 batches, and tensors to images.

Threads read and decode ahead; memory does not grow with the number of images.

Legend: B batch, (h, w) pixels.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spiralrope_cli.core.config.folders import list_images
from spiralrope_cli.core.data.image_sets import FolderInput, ImageInput, NpzImages
from spiralrope_cli.core.data.loader import Unreadable, open_image
from spiralrope_cli.core.data.npz import stream_rows
from spiralrope_cli.core.errors import DataError
from spiralrope_cli.core.runtime.launch import cores_per_process

Result = TypeVar("Result")

LARGEST_BATCH = 1 << 28
"""Bytes of pixels after which a batch ends early."""
MOST_THREADS = 8

SMALLEST_SIDE = 64
"""In a grid, images with a smaller side are enlarged by repeating pixels."""


def decode(path: str) -> np.ndarray | Unreadable:
    """[h, w, 3] uint8: grey and palettes become RGB, alpha is dropped, as in other FID tools."""
    image = open_image(path, lambda image: image.convert("RGB"))
    return image if isinstance(image, Unreadable) else np.array(image)


def decode_some(folders: Iterable[Path | None], most: int) -> tuple[int, list[Unreadable]]:
    """Decodes at most `most` images of each folder; number of tries, and the unreadable ones."""
    chosen: list[str] = []
    for folder in folders:
        paths = [path for path, _ in list_images(folder)] if folder else []
        count = min(most, len(paths))
        chosen += [paths[number * len(paths) // count] for number in range(count)]
    decoded = map(decode, chosen)
    return len(chosen), [each for each in decoded if isinstance(each, Unreadable)]


def num_bytes(images: ImageInput, part: range) -> int:
    """Bytes of the pixels of a part of a set, from headers alone; unreadable images count 0."""
    if isinstance(images, NpzImages):
        return len(part) * math.prod(images.header.shape[1:])
    opened = (open_image(images.files[number], lambda image: image) for number in part)
    return sum(3 * math.prod(image.size) for image in opened if not isinstance(image, Unreadable))


@dataclass
class ImageBatch:
    """A batch of images, grouped by size."""

    numbers: list[int] = field(default_factory=list)  # indices in the set, in the groups' order
    groups: list[Tensor] = field(default_factory=list)  # [B, 3, h, w] uint8, one per size
    unreadable: list[Unreadable] = field(default_factory=list)


def image_batches(
    images: ImageInput, part: range, batch_size: int, *, threads: int, pin_memory: bool
) -> Generator[ImageBatch, None, None]:
    """The images of a part of a set, decoded by `threads` threads; -1: by the number of cores."""
    if isinstance(images, FolderInput):
        batches = _decoded(images, part, batch_size, threads)
    else:
        batches = _streamed(images, part, batch_size)
    with contextlib.closing(batches):
        for batch in batches:
            if pin_memory:
                batch.groups = [group.pin_memory() for group in batch.groups]
            yield batch


def _streamed(images: NpzImages, part: range, batch_size: int) -> Generator[ImageBatch, None, None]:
    _, *shape = images.header.shape
    rows = max(1, min(batch_size, LARGEST_BATCH // math.prod(shape)))
    pieces = stream_rows(images.path, "arr_0", images.header, part, rows)
    firsts = part[::rows]
    # One thread, so that the stream is read in order.
    with contextlib.closing(in_order((partial(next, pieces) for _ in firsts), 1, 2)) as read:
        for first, piece in zip(firsts, read, strict=True):
            yield ImageBatch(list(range(first, first + len(piece))), [_tensor(piece)])


def _decoded(
    images: FolderInput, part: range, batch_size: int, threads: int
) -> Generator[ImageBatch, None, None]:
    if threads < 0:
        threads = min(MOST_THREADS, cores_per_process())
    batch, num_bytes = ImageBatch(), 0
    sizes: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = defaultdict(list)
    tasks = (partial(decode, images.files[number]) for number in part)
    with contextlib.closing(in_order(tasks, max(threads, 1), 4 * threads)) as decoded:
        for number, image in zip(part, decoded, strict=True):
            if isinstance(image, Unreadable):
                batch.unreadable.append(image)
            else:
                sizes[image.shape].append((number, image))
                num_bytes += image.nbytes
            waiting = sum(map(len, sizes.values()))
            if waiting == batch_size or num_bytes > LARGEST_BATCH or number == part[-1]:
                for group in sizes.values():
                    batch.numbers += [number for number, _ in group]
                    batch.groups.append(_tensor(np.stack([image for _, image in group])))
                yield batch
                batch, num_bytes = ImageBatch(), 0
                sizes.clear()


def _tensor(images: np.ndarray) -> Tensor:
    """[B, h, w, 3] -> [B, 3, h, w], without a copy."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def in_order(
    tasks: Iterable[Callable[[], Result]],
    threads: int,
    depth: int,
    prepare: Callable[[], object] | None = None,
) -> Generator[Result, None, None]:
    """Results of the tasks in their order; close the generator to stop early.

    `Executor.map` would submit all tasks at once, so all images would be in memory. Here at most
    `depth` results wait, and this thread takes the tasks one by one.
    """
    with ThreadPoolExecutor(threads, "spiralrope", prepare) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(task))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


# --- Tensors as images


def to_uint8(images: Tensor) -> Tensor:
    """[N, 1 or 3, H, W] in [-1, 1] -> [N, 3, H, W] uint8 on the CPU; grey becomes RGB.

    Raises:
        DataError: a value is not finite, which would become black or white.
    """
    if not images.isfinite().all():
        raise DataError("images are not finite", "try --precision fp32, or other weights")
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.to("cpu").expand(-1, 3, -1, -1)


def image_grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """A grid of [N, 3, H, W] uint8; by default a square."""
    from torchvision.utils import make_grid

    larger = max(1, math.ceil(SMALLEST_SIDE / min(images.shape[-2:])))
    images = images.repeat_interleave(larger, 2).repeat_interleave(larger, 3)
    columns = columns or math.ceil(math.sqrt(len(images)))
    pixels = make_grid(images, nrow=columns, padding=2, pad_value=255)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
