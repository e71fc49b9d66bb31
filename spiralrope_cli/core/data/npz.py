"""`.npz` files without pickle: headers before contents, and images streamed out of the zip."""

from __future__ import annotations

import contextlib
import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from spiralrope_cli.core.errors import DataError

_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class Header:
    """What an array says of itself: its shape, its type, and where its bytes begin."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    offset: int


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
    """The headers of all arrays of a file, without their contents.

    Raises:
        DataError: no zip, damaged, or it holds an array that only unpickling could read.
    """
    with _readable(path), zipfile.ZipFile(path) as archive:
        headers = {}
        for entry in archive.infolist():
            if entry.filename.endswith(".npy"):
                with archive.open(entry) as stream:
                    header = _read_header(stream, path, entry.filename)
                if entry.file_size != header.offset + _num_bytes(header):
                    raise DataError(
                        f"{path} is damaged: {entry.filename} is {entry.file_size} bytes long, and "
                        f"its header speaks of {header.offset + _num_bytes(header)}",
                        "copy or write it again",
                    )
                headers[entry.filename.removesuffix(".npy")] = header
    if not headers:
        raise DataError(f"{path} holds no arrays", "numpy.savez writes such files")
    return headers


def _num_bytes(header: Header) -> int:
    return math.prod(header.shape) * header.dtype.itemsize


def _read_header(stream: IO[bytes], path: Path, name: str) -> Header:
    try:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran_order, dtype = read(stream)
    except ValueError as error:
        raise DataError(f"{path}: {name} is no array of numpy ({error})") from error
    if dtype.hasobject:
        raise DataError(
            f"{path}: {name} holds pickled objects, which could run any program; it is not read",
            "save plain arrays of numbers",
        )
    return Header(shape, dtype, fortran_order, stream.tell())


def read_array(path: Path, name: str) -> np.ndarray:
    """One whole array, never unpickled.

    Raises:
        DataError: the file is damaged.
    """
    with _readable(path), zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
        return npy.read_array(stream, allow_pickle=False)


def stream_rows(
    path: Path, name: str, header: Header, part: range, rows: int
) -> Iterator[np.ndarray]:
    """A part of an array, some rows at a time, in C order.

    A stored entry is entered at the right place; a compressed one is unpacked up to there.

    Args:
        path: of the file.
        name: of the array.
        header: of the array.
        part: which rows, one after the other.
        rows: how many at a time.

    Raises:
        DataError: the file is damaged.
    """
    row_shape, row_bytes = header.shape[1:], _num_bytes(header) // header.shape[0]
    with _readable(path), zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
        stream.seek(header.offset + part.start * row_bytes)
        for first in range(part.start, part.stop, rows):
            piece = np.empty((min(rows, part.stop - first), *row_shape), header.dtype)
            _fill(stream, piece)
            yield piece
        if part.stop == header.shape[0]:
            stream.read(1)  # at its end a zip compares what was read with the checksum


def _fill(stream: IO[bytes], array: np.ndarray) -> None:
    view, have = array.reshape(-1).view(np.uint8).data, 0
    while have < len(view):
        more = stream.readinto(view[have:])  # type: ignore[attr-defined]
        if not more:
            raise EOFError("it ends early")
        have += more
