"""Statistics as files: of references, kept by what they were computed from, and as references.

No torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing

from spiralrope_cli.core.atomic import atomic_write
from spiralrope_cli.core.config.fid import statistics_folder
from spiralrope_cli.core.data.inputs import STATISTICS, FolderInput, Side
from spiralrope_cli.core.data.npz import read_array, read_headers
from spiralrope_cli.core.errors import DataError, SpiralRopeError
from spiralrope_cli.core.runtime.console import say

CHUNK = 1 << 20
LAYOUT = 1
"""Raised where older statistics must not be found again."""


@contextlib.contextmanager
def digests_beside(sides: list[Side]) -> Iterator[list[Future[str]]]:
    """SHA-256 of inputs, computed in a thread while other things happen.

    A folder's digest is of the relative paths and contents of its images.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1, "digest") as pool:
        try:
            yield [pool.submit(digest_of, side, stop) for side in sides]
        finally:
            stop.set()  # who leaves early does not wait for gigabytes


def digest_of(side: Side, stop: threading.Event | None = None) -> str:
    """SHA-256 of an input, as its figures tell it; anything once it is told to stop."""
    state = hashlib.sha256()
    files = side.images.files if isinstance(side.images, FolderInput) else [side.path]
    for file in files:
        if file != side.path:
            state.update(os.fsencode(os.path.relpath(file, side.path)) + b"\0")
        # Who cannot read a file learns so where it is decoded.
        with contextlib.suppress(OSError), open(file, "rb") as stream:
            while (chunk := stream.read(CHUNK)) and not (stop and stop.is_set()):
                state.update(chunk)
    return state.hexdigest()


class ReferenceCache:
    """Named parts of the statistics of one reference.

    Args:
        content: digest of the reference.
        protocol: by which its statistics are made.
    """

    def __init__(self, content: str, protocol: str) -> None:
        key = hashlib.sha256(repr((LAYOUT, content, protocol)).encode()).hexdigest()[:32]
        self._stem = statistics_folder() / key

    def _path(self, part: str) -> Path:
        return self._stem.with_name(f"{self._stem.name}-{part}.npz")

    def load(self, part: str) -> dict[str, np.ndarray] | None:
        """The arrays of a part; None if it is not here, or damaged."""
        path = self._path(part)
        if not path.is_file():
            return None
        try:
            return {name: read_array(path, name) for name in read_headers(path)}
        except DataError:
            return None

    def store(self, part: str, **arrays: np.typing.ArrayLike) -> str:
        """Keeps a part; says what went wrong, if anything, as the figures matter more."""
        try:
            write_npz(self._path(part), **arrays)
        except OSError as error:
            return f"statistics of REFERENCE cannot be kept in {self._stem.parent}: {error}"
        return ""


def save_statistics(
    path: Path, stats: Mapping[str, tuple[Any, ...]], num: int, protocol: str
) -> None:
    """Writes mean and covariance under the names that pytorch-fid and ADM read.

    Args:
        path: of the file.
        stats: `fid`, perhaps `sfid` -> mean [D] and covariance [D, D].
        num: of how many images they are, 0 if unknown.
        protocol: by which they were made, empty if unknown.
    """
    arrays = {}
    for name, (mean, covariance, _) in STATISTICS.items():
        if name in stats:
            arrays[mean], arrays[covariance] = (np.asarray(each) for each in stats[name])
    try:
        write_npz(path, num_images=num, protocol=protocol, **arrays)
    except OSError as error:
        raise SpiralRopeError(f"--save-stats {path} cannot be written: {error}") from error
    say(f"statistics of SAMPLES, {num or 'an unknown number of'} images, are in {path}")


def write_npz(path: Path, **arrays: np.typing.ArrayLike) -> None:
    """Writes arrays under their names; the file has its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as beside, beside.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]
