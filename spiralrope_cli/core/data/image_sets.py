"""Sets of images as they are measured: an `.npz` or a folder, in batches of uint8 tensors.

Reading and decoding go on in threads beside the computation; memory does not grow with the set.

Legend: B batch, (h, w) pixels.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Generator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from spiralrope_cli.core.data.inputs import FolderInput, ImageInput, NpzImages
from spiralrope_cli.core.data.npz import stream_rows
from spiralrope_cli.core.data.pictures import Unreadable, open_picture
from spiralrope_cli.core.runtime.threads import cores_per_process, in_order

LARGEST_BATCH = 1 << 28
"""Bytes of pixels after which a batch is closed before it is full."""
MOST_THREADS = 8


@dataclass
class ImageBatch:
    """Some images, together where they have one size.

    Attributes:
        numbers: place in the set of every image, in the order of the groups.
        groups: [B, 3, h, w] uint8 each, one for every size.
        unreadable: what could not be decoded.
    """

    numbers: list[int] = field(default_factory=list)
    groups: list[Tensor] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)


def image_batches(
    images: ImageInput, part: range, batch_size: int, *, threads: int, pin_memory: bool
) -> Generator[ImageBatch, None, None]:
    """The images of a part of a set.

    Args:
        images: the set.
        part: which of them, one after the other.
        batch_size: images in a batch, at most.
        threads: how many images are decoded at the same time; -1 goes by the cores.
        pin_memory: whether the tensors will be copied to a GPU.

    Raises:
        DataError: the file is damaged.
    """
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
    pieces = stream_rows(images.path, "arr_0", images.header, part, batch_size)
    firsts = part[::batch_size]
    # One thread, so that the stream is read in order.
    with contextlib.closing(in_order((partial(next, pieces) for _ in firsts), 1, 2)) as read:
        for first, piece in zip(firsts, read, strict=True):
            yield ImageBatch(list(range(first, first + len(piece))), [_tensor(piece)])


def _decoded(
    images: FolderInput, part: range, batch_size: int, threads: int
) -> Generator[ImageBatch, None, None]:
    if threads < 0:
        threads = min(MOST_THREADS, cores_per_process())
    tasks = (partial(decode, images.files[number]) for number in part)
    batch, sizes, num_bytes = ImageBatch(), _BySize(list), 0
    with contextlib.closing(in_order(tasks, max(threads, 1), 4 * threads)) as pictures:
        for number, picture in zip(part, pictures, strict=True):
            if isinstance(picture, Unreadable):
                batch.unreadable.append(picture)
            else:
                sizes[picture.shape].append((number, picture))
                num_bytes += picture.nbytes
            waiting = sum(map(len, sizes.values()))
            if waiting == batch_size or num_bytes > LARGEST_BATCH or number == part[-1]:
                for group in sizes.values():
                    batch.numbers += [number for number, _ in group]
                    batch.groups.append(_tensor(np.stack([picture for _, picture in group])))
                yield batch
                batch, sizes, num_bytes = ImageBatch(), _BySize(list), 0


_BySize = defaultdict[tuple[int, ...], list[tuple[int, np.ndarray]]]


def _tensor(pictures: np.ndarray) -> Tensor:
    """[B, h, w, 3] as [B, 3, h, w], without a copy."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


def decode(path: str) -> np.ndarray | Unreadable:
    """[h, w, 3] uint8 of any image: grey and palettes become RGB, alpha is dropped.

    So do the other tools whose figures ours are compared with.
    """
    picture = open_picture(path, lambda image: image.convert("RGB"))
    return picture if isinstance(picture, Unreadable) else np.array(picture)
