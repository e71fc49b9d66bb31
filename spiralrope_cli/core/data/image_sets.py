"""SAMPLES and REFERENCE before anything is computed: what a folder or an `.npz` holds.

No torch, so that errors come before it is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spiralrope_cli.core.config.datasets import (
    BUILT_IN,
    IMAGENET_CLASSES,
    IMAGENET_NAME,
    STREAM,
)
from spiralrope_cli.core.data.fetched import opened, shard_sha256
from spiralrope_cli.core.data.listing import (
    IMAGE_SUFFIXES,
    LARGER_FILES,
    count_files,
    images_below,
    larger_files_below,
    place_in,
    suffix_of,
)
from spiralrope_cli.core.data.named import data_root, is_name
from spiralrope_cli.core.data.npz import (
    STATISTICS,
    Header,
    check_statistics,
    read_array,
    read_headers,
)
from spiralrope_cli.core.data.splits import train_split
from spiralrope_cli.core.data.stored import list_stored
from spiralrope_cli.core.errors import DataError
from spiralrope_cli.core.storage import refuse_own, samples_in

MOST_PIXELS = 178_956_970
"""Of an image: beyond it Pillow refuses an image file as a decompression bomb."""
LONGEST_NOTE = 1 << 16
"""Bytes of a scalar beside statistics."""


@dataclass(frozen=True)
class FolderInput:
    """A folder of images: all files below it with a suffix of images, sorted by path.

    Or images in tar, parquet or Arrow files, by their addresses.
    """

    path: Path | str  # the name of a stream
    files: list[str] = field(repr=False)
    others: str = ""  # its files that are no images, in words

    def __len__(self) -> int:
        return len(self.files)


@dataclass(frozen=True)
class NpzImages:
    """The images of an `.npz`: `arr_0`, [N, h, w, 3] uint8."""

    path: Path
    header: Header

    def __len__(self) -> int:
        return self.header.shape[0]


ImageInput = FolderInput | NpzImages


@dataclass(frozen=True)
class Side:
    """SAMPLES or REFERENCE."""

    role: str  # SAMPLES or REFERENCE
    path: Path | str  # as it was given; text: the name of a stream
    images: ImageInput | None
    stored: tuple[str, ...]  # metrics whose statistics it holds
    num: int | None  # number of images to use; None if unknown
    protocol: str = ""  # of its statistics, empty if unknown
    needed: tuple[str, ...] = ()  # to compute from its images: `fid`, `sfid`, `is`, `features`

    @property
    def words(self) -> str:
        """What it holds, for the plan."""
        parts = [f"statistics for {' and '.join(self.stored)}"] if self.stored else []
        if self.images is None:
            count = "an unknown number of" if self.num is None else f"{self.num:,}"
            return " of ".join([*parts, f"{count} images"])
        of = f" (of {len(self.images):,})" if self.num != len(self.images) else ""
        size = ""
        if isinstance(self.images, NpzImages):
            _, height, width, _ = self.images.header.shape
            size = f" of {height}x{width}"
        return ", ".join([*parts, f"{self.num:,}{of} images{size}"])


def inspect_side(given: str | Path, role: str, num: int = 0) -> Side:
    """What a folder or file holds; only its first `num` images are used, 0: all."""
    path = _path_of(given)
    images, stored, count, protocol = _contents(path, role)
    if images is None:
        if num and num != count:
            raise DataError(
                f"--num-samples {num}: {role} {path} holds statistics of "
                + (f"{count} images" if count else "an unknown number of images")
            )
        return Side(role, path, None, stored, count or None, protocol)
    if num > len(images):
        raise DataError(
            f"--num-samples {num}: {role} {path} holds only {len(images)} images",
            "sample more, or use a smaller number",
        )
    count = num or len(images)
    if count < 2:
        raise DataError(f"{role} {path} has {count} image(s); a covariance needs 2 or more")
    if count != len(images):
        stored = ()  # its statistics are of all images
    return Side(role, path, images, stored, count, protocol)


def _path_of(given: str | Path) -> Path | str:
    """The path of a folder or file; of a stream its name, as a path has no `//`."""
    is_stream = isinstance(given, str) and STREAM.match(given)
    return given if is_stream else samples_in(Path(os.path.expanduser(given)))


def images_in(given: str | Path, role: str) -> ImageInput:
    """The images of a folder or file; at least one."""
    path = _path_of(given)
    images, *_ = _contents(path, role)
    if images is None:
        raise DataError(f"{role} {path} holds statistics, but no images")
    if not len(images):
        raise DataError(f"{role} {path} holds no images: arr_0 is empty")
    return images


def _contents(path: Path | str, role: str) -> tuple[ImageInput | None, tuple[str, ...], int, str]:
    """Images; metrics with stored statistics; number of images and protocol of these."""
    if isinstance(path, str):
        return _image_files(path, role), (), 0, ""
    named = not path.exists() and is_name(str(path))
    if named or path.is_dir() or (path.is_file() and suffix_of(path) in LARGER_FILES):
        return _image_files(path, role), (), 0, ""
    if not path.exists():
        raise DataError(f"{role} {path} does not exist", "name a folder of images or an .npz file")
    if path.suffix != ".npz" and not zipfile.is_zipfile(path):
        raise DataError(f"{role} {path} is neither a folder of images nor an .npz file")
    headers = read_headers(path)
    stored = tuple(metric for metric, (mean, _, _) in STATISTICS.items() if mean in headers)
    for metric in stored:
        check_statistics(path, headers, metric)
    if "arr_0" in headers:
        _check_images(path, headers["arr_0"])
        return NpzImages(path, headers["arr_0"]), stored, 0, ""
    if not stored:
        raise DataError(
            f"{path} has no arr_0 and no mu: it holds {', '.join(list(headers)[:5])}",
            "images must be named arr_0; statistics mu and sigma, or mu_s and sigma_s",
        )
    count = int(_note(path, headers, "num_images", "iu") or 0)
    return None, stored, max(count, 0), str(_note(path, headers, "protocol", "U") or "")


def _image_files(path: Path | str, role: str) -> FolderInput:
    """The images of a folder, of a larger file, or of the training split of a named set."""
    if isinstance(path, str) or not path.exists():
        split = train_split(data_root(str(path)))
        return FolderInput(split.path, [address for address, _ in split.images])
    if path.is_file():
        return FolderInput(path, list_stored([path])["address"])
    refuse_own(path, f"{role} {path}")
    files, others = images_below(path)
    if not files and (stored_there := larger_files_below(path)):
        others -= Counter(each.suffix.lower() for each in stored_there)
        return FolderInput(path, list_stored(stored_there)["address"], count_files(others))
    if not files:
        known = f"known suffixes: {' '.join(IMAGE_SUFFIXES)}"
        raise DataError(f"{path} holds no images{count_files(others)}", known)
    return FolderInput(path, files, count_files(others))


def _note(path: Path, headers: dict[str, Header], name: str, kinds: str) -> Any:
    """A scalar that `--save-stats` wrote beside statistics; None if it is missing."""
    header = headers.get(name)
    if header is None or header.num_bytes > LONGEST_NOTE:
        return None
    if header.shape or header.dtype.kind not in kinds:
        return None
    return read_array(path, name).item()


def _check_images(path: Path, header: Header) -> None:
    if header.dtype != np.uint8:
        raise DataError(
            f"{path}: arr_0 is {header.dtype}; images must be uint8 from 0 to 255",
            "scale to [0, 255], round, and convert to uint8",
        )
    if len(header.shape) != 4 or header.shape[3] != 3 or 0 in header.shape[1:]:
        raise DataError(f"{path}: arr_0 has shape {header.shape}; images must be N x H x W x 3")
    height, width = header.shape[1:3]
    if height * width > MOST_PIXELS:
        raise DataError(
            f"{path}: arr_0 has images of {height}x{width}; at most {MOST_PIXELS:,} pixels are read"
        )
    if header.fortran_order:
        raise DataError(
            f"{path}: arr_0 is in Fortran order and cannot be streamed",
            "save numpy.ascontiguousarray(arr_0)",
        )


@contextlib.contextmanager
def digests_beside(sides: list[Side]) -> Iterator[list[Future[str]]]:
    """SHA-256 of inputs, computed in a background thread.

    The digest of a folder is that of the relative paths and contents of its images.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1, "digest") as pool:
        try:
            yield [pool.submit(digest_of, side, stop) for side in sides]
        finally:
            stop.set()  # after an error, do not wait until gigabytes are read


def digest_of(side: Side, stop: threading.Event | None = None) -> str:
    """SHA-256 of an input; meaningless after `stop` is set."""
    state = hashlib.sha256()
    folder = side.images if isinstance(side.images, FolderInput) else None
    for file in folder.files if folder else [str(side.path)]:
        if folder and file != str(side.path):
            state.update(os.fsencode(place_in(folder.path, file)) + b"\0")
            if isinstance(folder.path, str):
                state.update(shard_sha256(file).encode())
                continue
        # A file that cannot be read is reported where it is decoded.
        with contextlib.suppress(OSError):
            source = opened(file)
            with open(source, "rb") if isinstance(source, str) else source as stream:
                while (chunk := stream.read(1 << 20)) and not (stop and stop.is_set()):
                    state.update(chunk)
    return state.hexdigest()


def names_of(data: str, num_classes: int, stored: Sequence[str] = ()) -> list[str]:
    """The names of all classes, or their numbers if the names are unknown.

    ImageNet's are words, such as `tench`. `stored` are those of the weights. `data` is a built-in
    name or a folder; empty for published weights.
    """
    names = list(stored)
    if not names and data in BUILT_IN:
        names = list(BUILT_IN[data].class_names)
    elif not names and data:
        with contextlib.suppress(DataError):
            names = list(train_split(data).class_names)
    of_imagenet = not (names or data) and num_classes == IMAGENET_CLASSES
    if of_imagenet or (names and all(map(IMAGENET_NAME.fullmatch, names))):
        from timm.data import ImageNetInfo

        info = ImageNetInfo()
        words = dict(zip(info.label_names(), info.label_descriptions(), strict=True))
        names = [str(words.get(name, name)).partition(",")[0] for name in names or words]
    return names if len(names) == num_classes else [str(n) for n in range(num_classes)]
