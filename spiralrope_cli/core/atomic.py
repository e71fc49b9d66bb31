"""Files that are there whole or not at all, whenever a process is killed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: Path, *, sole: bool = False, durable: bool = False) -> Iterator[Path]:
    """A name beside `path` to write to; what stands there at the end takes the name `path`.

    Args:
        path: the file to make or to replace; its folder has to be there.
        sole: no other process writes this file, so that the name beside it can be a fixed one:
            what a killed process left there, perhaps gigabytes, is written over.
        durable: waits until the content is on the disk, so that a power cut cannot empty it.

    Yields:
        The name to write to. After an error nothing is left there, and `path` is as it was.
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
    """Waits until a file's content, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Writes a file of which nobody ever sees a part."""
    with atomic_write(path, durable=durable) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
