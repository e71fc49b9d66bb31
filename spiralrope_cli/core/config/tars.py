"""The images of a tar file and where they lie in it; nothing is unpacked.

One tar file per class in another, as ImageNet's training images; one folder per class; images
alone, as ImageNet's validation images; or a WebDataset shard, with KEY.jpg beside KEY.cls or
KEY.json.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from spiralrope_cli.core.config.folders import IMAGENET_NAME, is_image
from spiralrope_cli.core.errors import DataError

LABELS = (".json", ".cls")
"""Files of a sample that hold its class; the last one counts."""
KEYS = ("label", "cls")
"""Keys of that JSON."""


class Listed(NamedTuple):
    """The images of a file."""

    file: Path  # where their bytes are
    rows: list[tuple[int, int, str, str | int | None]]  # (offset, size, name, class if known)
    labels_from: str  # in words
    class_names: list[str]  # empty: those that occur, or numbers


def read_tar(path: Path) -> Listed:
    """The images of a tar file."""
    images: list[tuple[int, int, str]] = []
    labels: dict[str, str | int] = {}
    found: list[tuple[int, int, str, str | int | None]]
    try:
        with open(path, "rb") as file:
            for first, size, name in _members(file):
                stem, suffix = os.path.splitext(name)
                if is_image(os.path.basename(name)):
                    images.append((first, size, name))
                elif suffix in LABELS:
                    file.seek(first)
                    if (label := _label(file.read(size), suffix)) is not None:
                        labels[stem] = label
    except (tarfile.TarError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as a tar file: {error}",
            "it must be whole and not compressed: gunzip FILE.tar.gz; repeat a download that ended",
        ) from error
    common = os.path.commonpath([os.path.dirname(name) for *_, name in images]) if images else ""
    if labels:
        found = [(*image, labels.get(os.path.splitext(image[2])[0])) for image in images]
        return Listed(path, found, "its .cls and .json files", [])
    one = path.stem if IMAGENET_NAME.fullmatch(path.stem) else None  # train/n01440764.tar
    found = [(*image, one or _folder(image[2], common)) for image in images]
    found.sort(key=lambda row: (row[3] or "", row[2]))  # as class folders
    return Listed(path, found, "folders and tar files in it", [])


def _members(file: IO[bytes], base: int = 0, inside: str = "") -> Iterator[tuple[int, int, str]]:
    """(offset, size, name) of each file, also of those in tar files in it."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            if not member.isreg() or member.issparse():
                continue
            first, name = base + member.offset_data, member.name.removeprefix("./")
            if name.endswith(".tar") and (inner := tar.extractfile(member)):
                yield from _members(inner, first, f"{inside}{name.removesuffix('.tar')}/")
            else:
                yield first, member.size, inside + name


def _label(content: bytes, suffix: str) -> str | int | None:
    """The class in a `.cls` or `.json` file of a sample."""
    if suffix == ".json":
        values = json.loads(content)
        found = next((values[key] for key in KEYS if key in values), None)
        return found if isinstance(found, int) else None if found is None else str(found)
    word = content.decode().strip()
    return int(word) if word.isdecimal() else word


def _folder(name: str, common: str) -> str | None:
    """The class folder of an image below the folder that all images share."""
    first, *rest = os.path.relpath(name, common or ".").split(os.sep)
    return first if rest else None
