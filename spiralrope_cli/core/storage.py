"""Files of ours: which there are, written whole even if the process is killed, with checksums.

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

from spiralrope_cli.core.errors import ConfigError, DataError, first_line

if TYPE_CHECKING:
    from torch import Tensor

CHECKSUM_KEY = "crc32"
CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"
CURVES_FILE, REPORT_FILE = "curves.png", "report.html"
SOURCES_FILE, ENVIRONMENT_FILE = "sources.json", "environment.json"
PIPELINE_FILE, SWEEP_FILE, FID_FILE = "pipeline.json", "sweep.json", "fid.json"
EVAL_FILE, SIZES_FILE = "eval.json", "eval-sizes.png"
SAMPLES_FILE, SAMPLES, NPZ_FILE = "samples.png", "samples", "samples.npz"
METADATA_FILE, PART_FILE = "samples.json", "samples.npz.part"
MODEL_FILE, EMA_FILE, TRAINER_FILE = "model.safetensors", "ema.safetensors", "trainer.pt"

# What it is -> files of which it has all, and what takes it. Any folder may have a config.yaml.
MARKS: dict[str, tuple[tuple[tuple[str, ...], ...], str]] = {
    "a folder of samples": (
        ((METADATA_FILE, NPZ_FILE), (METADATA_FILE, PART_FILE)),
        "fid and plot samples take it",
    ),
    "a training run": (
        ((CONFIG_FILE, CHECKPOINTS), (CONFIG_FILE, SOURCES_FILE)),
        "dit-sample samples images from the run of a DiT; eval takes that of a DeiT",
    ),
    "the folder of a pipeline": (
        tuple(
            (PIPELINE_FILE, stage) for stage in ("pretrain", "finetune", "dit-train", "dit-sample")
        ),
        "name a stage in it, such as dit-train or dit-sample",
    ),
    "the folder of a sweep": (((SWEEP_FILE, REPORT_FILE),), "name a run in it"),
    "a folder of latents": ((("00000.safetensors",),), "dit-train --latents takes it"),
}


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


def read_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        ConfigError: it cannot be read, is no YAML, or has a key twice.
    """
    import yaml

    try:
        text = path.read_text()
        content = parse(text, yaml.safe_load)
        repeated = _repeated_key(yaml.compose(text, yaml.SafeLoader))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{path} is not YAML: {line}{error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not YAML: {first_line(error)}") from error
    if repeated:
        raise ConfigError(f"{path} has the key {repeated!r} twice", "leave one out")
    return content


def _repeated_key(node: Any) -> str:
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


# --- Folders of ours


def own_folder(folder: Path) -> tuple[str, str]:
    """What a folder of ours is, and what takes it; both empty for any other folder."""
    for kind, (marks, hint) in MARKS.items():
        if any(all((folder / name).exists() for name in names) for names in marks):
            return kind, hint
    return "", ""


def refuse_own(folder: Path, given: str) -> None:
    """Refuses a folder of ours that was `given` as a folder of images: it has curves and grids."""
    kind, hint = own_folder(folder)
    if kind and not (folder / "train").is_dir():
        raise DataError(f"{given} is {kind}, not a folder of images", hint)


def nearest_folder(path: Path) -> Path:
    """A path, or its nearest parent that exists."""
    absolute = path.absolute()
    return next(each for each in (absolute, *absolute.parents) if each.exists())


def check_writable(given: str, option: str = "--out", *, folder: bool = False) -> None:
    """Raises if the file or folder that an option names cannot be written; creates nothing."""
    path = Path(given)
    there = nearest_folder(path if folder else path.parent)
    if path.is_dir() and not folder:
        why = "it is a folder"
    elif not there.is_dir():
        why = "it is a file" if there == path.absolute() else f"{there} is a file"
    elif not os.access(there, os.W_OK | os.X_OK):
        why = f"nothing can be written to {there}"
    else:
        return
    raise ConfigError(f"{option} {given} cannot be written: {why}", "choose another")


def samples_in(folder: Path) -> Path:
    """The images of a folder of samples, or of a pipeline that has them; else the folder itself."""
    kind, _ = own_folder(folder)
    drawn = folder / "dit-sample"
    if "pipeline" in kind and drawn.is_dir():
        kind, folder = "samples", drawn
    if "samples" not in kind:
        return folder
    if not (folder / NPZ_FILE).exists():
        raise DataError(f"{folder} is not finished", "the same dit-sample command goes on with it")
    return folder / NPZ_FILE
