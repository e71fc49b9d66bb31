"""Atomic writes: a file is complete or absent, even if the process is killed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: Path, *, sole: bool = False, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary path in the same folder; at the end it is renamed to `path`.

    After an error the temporary file is removed, and `path` is unchanged.

    Args:
        path: the file to create or replace; its folder must exist.
        sole: no other process writes this file. The temporary name is then always the same, so
            that the next run overwrites what a killed process left, perhaps gigabytes.
        durable: wait until the content is on the disk: a rename alone may survive a power cut
            without it.
    """
    beside = path.with_name(f".{path.name}.{'new' if sole else os.getpid()}")
    try:
        yield beside
        if durable:
            flush(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Waits until a file, or the list of names of a folder, is on the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Writes a whole file atomically."""
    with atomic_write(path, durable=durable) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
