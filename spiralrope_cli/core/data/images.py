"""Image files, images of a folder or an `.npz` as uint8 batches, and tensors to images.

Threads read and decode ahead; memory does not grow with the number of images.

Legend: B batch, (h, w) pixels.
"""

from __future__ import annotations

import contextlib
import errno
import math
import re
import struct
import threading
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
import torchvision  # noqa: F401  loads its operators
from PIL import Image
from torch import Tensor

from spiralrope_cli.core.config.fid import Reading
from spiralrope_cli.core.data.fetched import opened
from spiralrope_cli.core.data.image_sets import FolderInput, ImageInput, NpzImages
from spiralrope_cli.core.data.listing import ImageList
from spiralrope_cli.core.data.npz import stream_rows
from spiralrope_cli.core.data.splits import Split
from spiralrope_cli.core.errors import DataError, SpiralRopeError, UnreadableImageError
from spiralrope_cli.core.runtime.launch import cores_per_process

T = TypeVar("T")

RGB = 3
"""Of torchvision's `ImageReadMode`."""

BITS_PER_SAMPLE = 258
"""Tag of TIFF; Pillow reads 12 bits as 16 without scaling them."""

BROKEN_IMAGE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error)

LARGEST_BATCH = 1 << 28
"""Bytes of pixels after which a batch ends early."""
MOST_THREADS = 8

SMALLEST_SIDE, GAP = 64, 2
"""In a grid, smaller sides are enlarged by repeating pixels; pixels between the images."""


# --- One file


@dataclass(frozen=True)
class Unreadable:
    """An image that could not be decoded; not an exception, as these are hard to pickle."""

    path: str
    reason: str
    not_fetched: SpiralRopeError | None = None  # the image is not to blame, and is never skipped

    def error(self) -> SpiralRopeError:
        """The error that ends a run without --skip-bad."""
        return self.not_fetched or UnreadableImageError(
            f"image {self.path} cannot be read: {self.reason}",
            "remove it, or use --skip-bad to skip such images",
        )


def open_image(path: str, convert: Callable[[Image.Image], T]) -> T | Unreadable:
    """An image, decoded and converted, or `Unreadable`; `path` is an address as in a `Split`."""
    try:
        with Image.open(opened(path)) as image:
            return convert(image)
    except SpiralRopeError as error:
        return Unreadable(path, error.message, error)
    except BROKEN_IMAGE as error:
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise  # the image is not to blame, and must not be skipped
        said = re.sub(r"<_io\.BytesIO[^>]*>", "", str(error).replace(path, ""))
        reason = getattr(error, "strerror", "") or said.strip(" '")
        return Unreadable(path, reason or type(error).__name__)
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return Unreadable(path, f"it has more than {limit:,} pixels; scale it down")


def note_unreadable(unreadable: Iterable[Unreadable], skip: bool, reasons: dict[str, str]) -> None:
    """Adds unreadable images to `reasons` (path -> reason); without `skip` raises for the first."""
    for bad in unreadable:
        if bad.not_fetched or not skip:
            raise bad.error()
        reasons[bad.path] = bad.reason


def as_trained(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """RGB or L: how all commands read an image; docs/formats.md has a line per mode."""
    pixels = _color_jpeg(image)
    if pixels is not None:
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image.load()
    flat = _flattened(image)
    return flat if flat.mode == mode else flat.convert(mode)


def as_tensor(image: Image.Image, mode: str = "RGB") -> Tensor:
    """`as_trained` as uint8 [channels, h, w], without PIL's copy of it."""
    pixels = _color_jpeg(image) if mode == "RGB" else None
    if pixels is not None:
        return pixels
    array = np.array(as_trained(image, mode))
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def _color_jpeg(image: Image.Image) -> Tensor | None:
    """A JPEG file in color that is not decoded yet, as uint8 [3, h, w]; None for any other image.

    torchvision uses the library that PIL uses, so these are PIL's values, in less time. What it
    refuses is left to PIL, whose errors say more, and so is everything once it has no decoder: it
    is deprecated since 0.29.
    """
    if image.format != "JPEG" or image.mode != "RGB":
        return None
    file = image.fp  # type: ignore[attr-defined]
    file.seek(0)
    content = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
    try:
        return torch.ops.image.decode_jpeg(content, RGB)
    except (RuntimeError, AttributeError):
        return None


def _flattened(image: Image.Image) -> Image.Image:
    """12- and 16-bit grey as 8-bit, and transparency over black: `convert` would do neither."""
    if image.mode[0] in "IF":
        values, white = np.asarray(image), 255 if image.mode == "F" else 65535
        if getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE) == (12,):
            white = 4095
        low, high = values.min(), values.max()
        if not 0 <= low <= high <= white or (image.mode == "F" and 0 < high <= 1):
            expected = f"its levels are from {low:g} to {high:g}, not from 0 to {white}"
            raise ValueError(f"{expected}; save it with 8 or 16 bits")
        if image.mode == "F":
            return image
        return Image.fromarray((values / (white / 255)).round().astype(np.uint8))
    if image.mode == "RGBA" and image.getchannel("A").getextrema()[0] == 255:
        return image  # opaque
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image


Decoded = tuple[np.ndarray, bool] | Unreadable


def decode(path: str, reading: Reading) -> tuple[np.ndarray, bool] | Unreadable:
    """[h, w, 3] uint8, and whether the other reading gives another image."""

    def convert(image: Image.Image) -> tuple[np.ndarray, bool]:
        if (pixels := _color_jpeg(image)) is not None:
            return pixels.permute(1, 2, 0).numpy(), False
        flat = _flattened(image)
        if flat is image:
            return np.array(image.convert("RGB")), False
        image.info.pop("transparency", None)  # `convert` would warn
        pil, trained = (np.array(each.convert("RGB")) for each in (image, flat))
        return pil if reading == "as-pil" else trained, not np.array_equal(pil, trained)

    return open_image(path, convert)


def decode_some(splits: Iterable[Split], most: int) -> tuple[int, list[Unreadable]]:
    """Decodes at most `most` images of each split; number of tries, and the unreadable ones."""
    chosen: list[str] = []
    for images in (split.images for split in splits):
        count = min(most, len(images))
        chosen += [images[number * len(images) // count][0] for number in range(count)]
    decoded = (open_image(path, as_trained) for path in chosen)
    return len(chosen), [each for each in decoded if isinstance(each, Unreadable)]


def num_bytes(images: ImageInput, part: range) -> int:
    """Bytes of the pixels of a part of a set, from headers alone; unreadable images count 0."""
    if isinstance(images, NpzImages):
        return len(part) * math.prod(images.header.shape[1:])
    opened = (open_image(images.files[number], lambda image: image) for number in part)
    return sum(3 * math.prod(image.size) for image in opened if not isinstance(image, Unreadable))


# --- Batches for `fid` and `plot samples`


@dataclass
class ImageBatch:
    """A batch of images, grouped by size."""

    numbers: list[int] = field(default_factory=list)  # indices in the set, in the groups' order
    groups: list[Tensor] = field(default_factory=list)  # [B, 3, h, w] uint8, one per size
    unreadable: list[Unreadable] = field(default_factory=list)
    num_differing: int = 0  # images that the two readings see differently

    @property
    def tensors(self) -> list[Tensor]:
        """What a worker sends through shared memory."""
        return self.groups

    def pin_memory(self) -> ImageBatch:
        return replace(self, groups=[group.pin_memory() for group in self.groups])


class FilesOfAnySize:
    """Image files of any size, read by data loader workers."""

    def __init__(self, files: list[str], reading: Reading) -> None:
        self.files, self.reading = ImageList.of((file, 0) for file in files), reading

    def __getitems__(self, numbers: Iterable[int]) -> ImageBatch:
        return _grouped([(n, decode(self.files[n][0], self.reading)) for n in numbers])


def image_batches(
    images: ImageInput,
    part: range,
    batch_size: int,
    *,
    threads: int | None = None,
    pin_memory: bool = False,
    reading: Reading = "as-trained",
) -> Generator[ImageBatch, None, None]:
    """The images of a part of a set, decoded by `threads` threads; None: by the number of cores."""
    if isinstance(images, FolderInput):
        batches = _decoded(images, part, batch_size, threads, reading)
    else:
        batches = _streamed(images, part, batch_size)
    with contextlib.closing(batches):
        for batch in batches:
            yield batch.pin_memory() if pin_memory else batch


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
    images: FolderInput, part: range, batch_size: int, threads: int | None, reading: Reading
) -> Generator[ImageBatch, None, None]:
    if threads is None:
        threads = min(MOST_THREADS, cores_per_process())
    waiting: list[tuple[int, Decoded]] = []
    tasks = (partial(decode, images.files[number], reading) for number in part)
    with contextlib.closing(in_order(tasks, max(threads, 1), 4 * threads)) as decoded:
        for number, result in zip(part, decoded, strict=True):
            waiting.append((number, result))
            sizes = [each[0].nbytes for _, each in waiting if not isinstance(each, Unreadable)]
            full = len(sizes) == batch_size or sum(sizes) > LARGEST_BATCH
            if full or number == part[-1]:
                yield _grouped(waiting)
                waiting = []


def _grouped(decoded: Iterable[tuple[int, Decoded]]) -> ImageBatch:
    """A batch of decoded images, one tensor per size."""
    batch = ImageBatch()
    sizes: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = defaultdict(list)
    for number, result in decoded:
        if isinstance(result, Unreadable):
            batch.unreadable.append(result)
        else:
            image, differs = result
            batch.num_differing += differs
            sizes[image.shape].append((number, image))
    for group in sizes.values():
        batch.numbers += [number for number, _ in group]
        batch.groups.append(_tensor(np.stack([image for _, image in group])))
    return batch


def _tensor(images: np.ndarray) -> Tensor:
    """[B, h, w, 3] -> [B, 3, h, w], without a copy."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def in_order(
    tasks: Iterable[Callable[[], T]],
    threads: int,
    depth: int,
    prepare: Callable[[], object] | None = None,
    ended: threading.Event | None = None,
) -> Generator[T, None, None]:
    """Results of the tasks in their order; close the generator to stop early.

    `Executor.map` would submit all tasks at once, so all images would be in memory. Here at most
    `depth` results wait, and this thread takes the tasks one by one. At the end, also after Ctrl-C,
    it sets `ended`, and waits for the tasks that have begun.
    """
    with ThreadPoolExecutor(threads, "spiralrope", prepare) as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(task))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            if ended:
                ended.set()
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
    pixels = make_grid(images, nrow=columns, padding=GAP, pad_value=255)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
