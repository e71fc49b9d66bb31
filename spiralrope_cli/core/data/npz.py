"""`.npz` files without pickle: headers, streamed rows, statistics. No torch.

`numpy.load` reads a whole array of an `.npz`: 50,000 images would be 10 GB of memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing
from numpy.lib import format as npy

from spiralrope_cli.core.config.fid import statistics_folder
from spiralrope_cli.core.errors import DataError, SpiralRopeError
from spiralrope_cli.core.runtime.progress import say
from spiralrope_cli.core.storage import atomic_write

_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)

POOL_SIZE, SPATIAL_SIZE = 2048, 2023
STATISTICS = {"fid": ("mu", "sigma", POOL_SIZE), "sfid": ("mu_s", "sigma_s", SPATIAL_SIZE)}
"""Metric -> names of mean and covariance in a file, as in ADM's reference batches, and size."""

LONGEST_HEADER = 1 << 16
"""Of an array, in bytes; numpy writes 128."""

LAYOUT = 2
"""Increase it if cached statistics of older versions must not be used."""


# --- Any array


@dataclass(frozen=True)
class Header:
    """Shape and dtype of an array, and the offset of its data."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        raise DataError(
            f"{path} is damaged: {str(error) or type(error).__name__}", "copy or write it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def read_headers(path: Path) -> dict[str, Header]:
    """The headers of all arrays of a file; pickled arrays are refused."""
    with _readable(path), zipfile.ZipFile(path) as archive:
        headers = {}
        for entry in archive.infolist():
            if entry.filename.endswith(".npy"):
                with archive.open(entry) as stream:
                    header = _read_header(stream, path, entry.filename)
                if entry.file_size != (size := header.offset + header.num_bytes):
                    raise DataError(
                        f"{path} is damaged: {entry.filename} has {entry.file_size} bytes, but its "
                        f"header needs {size}",
                        "copy or write it again",
                    )
                headers[entry.filename.removesuffix(".npy")] = header
    if not headers:
        raise DataError(f"{path} holds no arrays", "use a file that numpy.savez wrote")
    return headers


def _read_header(entry: IO[bytes], path: Path, name: str) -> Header:
    stream = io.BytesIO(entry.read(LONGEST_HEADER))  # an archive of kilobytes may hold gigabytes
    try:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran_order, dtype = read(stream)
    except ValueError as error:
        raise DataError(f"{path}: {name} is not a numpy array ({error})") from error
    if dtype.hasobject:
        raise DataError(
            f"{path}: {name} holds pickled objects, which could run code; it is not read",
            "save plain arrays of numbers",
        )
    return Header(shape, dtype, fortran_order, stream.tell())


def read_array(path: Path, name: str) -> np.ndarray:
    """One whole array, without pickle."""
    with _readable(path), zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
        return npy.read_array(stream, allow_pickle=False)


def stream_rows(
    path: Path, name: str, header: Header, part: range, rows: int
) -> Iterator[np.ndarray]:
    """A part of an array in C order, `rows` rows at a time."""
    num_rows = header.shape[0]
    with _readable(path), zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
        # seek skips in a stored entry; a compressed entry has to be unpacked up to this offset.
        stream.seek(header.offset + part.start * (header.num_bytes // num_rows))
        for first in range(part.start, part.stop, rows):
            piece = np.empty((min(rows, part.stop - first), *header.shape[1:]), header.dtype)
            view = piece.reshape(-1).view(np.uint8).data
            while view:
                if not (count := stream.readinto(view)):  # type: ignore[attr-defined]
                    raise EOFError("it ends early")
                view = view[count:]
            yield piece
        if part.stop == num_rows:
            stream.read(1)  # at its end a zip compares what was read with the checksum


# --- Statistics


def check_statistics(path: Path, headers: dict[str, Header], metric: str) -> None:
    """Refuses a file that lacks one of the two, or has it in another shape or type."""
    mean, covariance, size = STATISTICS[metric]
    if covariance not in headers:
        raise DataError(f"{path} has {mean} but no {covariance}")
    for name, shape in ((mean, (size,)), (covariance, (size, size))):
        if headers[name].shape != shape:
            raise DataError(
                f"{path}: {name} has shape {headers[name].shape}, and it must be {shape}",
                "they are statistics of other features",
            )
        if headers[name].dtype.kind != "f":
            raise DataError(f"{path}: {name} is {headers[name].dtype}, and it must be float")


def read_statistics(path: Path, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D, D], float64; checks that they are finite and a covariance."""
    mean_name, covariance_name, _ = STATISTICS[metric]
    mean = read_array(path, mean_name).astype(np.float64)
    covariance = read_array(path, covariance_name).astype(np.float64)
    for name, values in ((mean_name, mean), (covariance_name, covariance)):
        if not np.isfinite(values).all():
            raise DataError(
                f"{path}: {name} holds {np.size(values) - np.isfinite(values).sum()} "
                "values that are NaN or infinite"
            )
    scale = np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > 1e-5 * scale or covariance.diagonal().min() < 0:
        raise DataError(
            f"{path}: {covariance_name} is not a covariance: it is not symmetric, "
            "or has negative variances"
        )
    return mean, covariance


class ReferenceCache:
    """Cached statistics of one reference, one file per part; the key is its digest and protocol."""

    def __init__(self, content: str, protocol: str) -> None:
        key = hashlib.sha256(repr((LAYOUT, content, protocol)).encode()).hexdigest()[:32]
        self._stem = statistics_folder() / key

    def _path(self, part: str) -> Path:
        return self._stem.with_name(f"{self._stem.name}-{part}.npz")

    def load(self, parts: Iterable[str]) -> dict[str, dict[str, np.ndarray]]:
        """Part -> its arrays; empty unless all parts are here and readable."""
        found = {}
        for part in parts:
            path = self._path(part)
            try:
                found[part] = {name: read_array(path, name) for name in read_headers(path)}
            except DataError:
                return {}
        return found

    def store(self, part: str, **arrays: np.typing.ArrayLike) -> None:
        """Writes a part; an error is only a warning, because the metrics are still valid."""
        try:
            write_npz(self._path(part), **arrays)
        except OSError as error:
            folder = self._stem.parent
            say(f"warning: statistics of REFERENCE cannot be cached in {folder}: {error}")


def save_statistics(
    path: Path, stats: Mapping[str, tuple[Any, ...]], num: int, protocol: str
) -> None:
    """Writes mean [D] and covariance [D, D] under the names that pytorch-fid and ADM read.

    `num` is the number of images, 0 if unknown; `protocol` is empty if unknown.
    """
    arrays = {}
    for name, (mean, covariance, _) in STATISTICS.items():
        if name in stats:
            arrays[mean], arrays[covariance] = (np.asarray(each) for each in stats[name])
    try:
        write_npz(path, num_images=num, protocol=protocol, **arrays)
    except OSError as error:
        raise SpiralRopeError(f"--save-stats {path} cannot be written: {error}") from error
    say(f"statistics of SAMPLES ({num or 'an unknown number of'} images) are in {path}")


def write_npz(path: Path, **arrays: np.typing.ArrayLike) -> None:
    """Writes arrays atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as beside, beside.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]
