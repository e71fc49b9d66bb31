"""Files of ours: complete or absent, even if the process is killed, and with checksums.

A `.safetensors` file has a CRC-32 in its metadata, of all else in it. What torch saves is a zip
archive, which has one for each of its members. So a flipped bit is found when a file is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

CHECKSUM_KEY = "crc32"


def cache_folder() -> Path:
    """Folder of downloads, lists of images and statistics."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SPIRALROPE_CACHE") or Path(base) / "spiralrope")


class DamagedError(ValueError):
    """A file does not hold what its checksum was made of."""


def unique_beside(path: Path) -> Path:
    """A hidden path beside this one that no other process has.

    Not by the number of the process alone: containers that share a disk may have the same ones.
    """
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")


@contextlib.contextmanager
def atomic_write(path: Path, *, sole: bool = False, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary path in the same folder; at the end it is renamed to `path`.

    After an error the temporary file or folder is removed, and `path` is unchanged.

    Args:
        path: the file to create or replace, or a new folder; its own folder must exist.
        sole: no other process writes this file. The temporary name is then always the same, so
            that the next run overwrites what a killed process left, perhaps gigabytes.
        durable: wait until the content is on the disk: a rename alone may survive a power cut
            without it.
    """
    beside = path.with_name(f".{path.name}.new") if sole else unique_beside(path)
    try:
        yield beside
        for part in (*beside.rglob("*"), beside) if durable else ():
            flush(part)
        os.replace(beside, path)
        if durable:
            flush(path.parent)
    except OSError as error:
        if error.errno and error.filename in (None, str(beside), beside):  # a full disk names none
            error.filename = str(path)
        raise
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        else:
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


def parse(text: str | bytes, read: Callable[[Any], Any] = json.loads) -> Any:
    """What JSON holds, or YAML by its `read`; ValueError also if it is nested too deeply."""
    try:
        return read(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def repeated_key(node: Any) -> str:
    """A key that a mapping of YAML has twice, at any depth; PyYAML would take the last one."""
    waiting, known = [node] if node else [], {id(node)}
    while waiting:
        node = waiting.pop()
        pairs = node.value if node.id == "mapping" else ()
        keys = [str(key.value) for key, _ in pairs]
        if repeated := next((key for key in keys if keys.count(key) > 1), ""):
            return repeated
        values = node.value if node.id == "sequence" else [value for _, value in pairs]
        inside = [each for each in values if id(each) not in known]  # an alias may lead back
        known.update(map(id, inside))
        waiting += inside
    return ""


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            state.update(chunk)
    return state.hexdigest()


def with_checksum(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> dict[str, str]:
    """Metadata for a `.safetensors` file of these tensors, with the checksum of both."""
    return {**metadata, CHECKSUM_KEY: _crc32(tensors, metadata)}


def read_safetensors(
    path: Path, *, verify: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, mapped from the disk, and metadata; files without a checksum are not verified.

    Raises:
        DamagedError: the checksum is another one.
        OSError, SafetensorError: it cannot be read.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected = metadata.get(CHECKSUM_KEY) if verify else None
    if expected is not None and _crc32(tensors, metadata) != expected:
        raise DamagedError("its checksum is not the one in its metadata")
    return tensors, metadata


def check_zip(path: Path) -> None:
    """Reads every member of what `torch.save` wrote; raises DamagedError if one is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise DamagedError(str(error)) from error
    if wrong is not None:
        raise DamagedError(f"the checksum of {Path(wrong).name} in it is another one")


def _crc32(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """CRC-32 of names, shapes, values and metadata: finds damage, ten times as fast as a disk."""
    import torch

    rest = {name: value for name, value in metadata.items() if name != CHECKSUM_KEY}
    value = zlib.crc32(json.dumps(rest, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), value)
        value = zlib.crc32(flat.numpy().data, value)
    return f"{value:08x}"
