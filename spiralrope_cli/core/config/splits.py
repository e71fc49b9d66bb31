"""The images of a split, in whatever form a data folder holds them: one list for all commands.

An image is named by an address: the path of its file, or `ARCHIVE::OFFSET+SIZE::MEMBER` where it
is read in place from a larger file.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spiralrope_cli.core.config.folders import (
    class_names,
    folder_of_images,
    images_below,
)
from spiralrope_cli.core.errors import DataError

TRAIN, VAL = ("train",), ("val", "validation", "test")
"""Names of a split, the usual one first."""

STORED = re.compile(r"(.+?)::(\d+)\+(\d+)::(.*)", re.DOTALL)
LABEL_FILES = ("val.txt", "LOC_val_solution.csv")
DEVKIT = "ILSVRC2012_devkit_t12"
KIT_FILES = ("ILSVRC2012_validation_ground_truth.txt", "meta.mat")


@dataclass(frozen=True)
class Split:
    """The images of a split, in the order that seeds refer to."""

    path: Path  # folder or archive
    class_names: tuple[str, ...]  # by class number
    images: list[tuple[str, int]]  # (address, class number)
    notes: tuple[str, ...] = ()


def opened(address: str) -> str | io.BytesIO:
    """What PIL opens: the path, or the bytes of an image in a larger file."""
    if "::" in address and (found := STORED.fullmatch(address)):
        path, first, size, _ = found.groups()
        with open(path, "rb") as file:
            file.seek(int(first))
            return io.BytesIO(file.read(int(size)))
    return address


def train_split(data: str | Path) -> Split:
    """The training images of a data folder; without `train/`, those of its class folders."""
    root = Path(data)
    return find_split(root, TRAIN) or folder_split(root)


def val_split(data: str | Path) -> Split:
    """The validation images of a data folder."""
    if found := find_split(Path(data), VAL):
        return found
    raise DataError(f"{data} has no val/", "a data folder must hold val/ with one folder per class")


def find_split(root: Path, names: Sequence[str]) -> Split | None:
    """A split by its names, of which the first one that is there counts."""
    for name in names:
        if (root / name).is_dir():
            return folder_split(root / name, names == VAL)
    return None


def folder_split(folder: Path, may_be_flat: bool = False) -> Split:
    """Class folders; or a flat folder, where a list beside it has the labels."""
    if may_be_flat:
        inside = (each for each in os.scandir(folder) if each.is_dir() and each.name[0] != ".")
        if not any(inside) and (files := images_below(folder)[0]):
            return flat_split(folder, files, files)
    images, notes = folder_of_images(folder)
    return Split(folder, tuple(class_names(folder)), images, tuple(notes))


# --- A flat val/ of ImageNet, and its labels


def flat_split(path: Path, addresses: list[str], names: list[str]) -> Split:
    """Images without class folders, with the classes that a list beside them gives.

    Args:
        path: their folder or archive.
        addresses: of the images.
        names: of their files, as the list has them.
    """
    listed, classes = _labels_beside(path)
    if not listed:
        raise DataError(
            f"{path} has no class folders, and no list with the classes of its {len(names)} images",
            f"put val.txt with lines FILE CLASS, or {DEVKIT}/ of the same download, beside it",
        )
    stems = [Path(name).stem for name in names]
    if lacking := [stem for stem in stems if stem not in classes]:
        raise DataError(f"{listed} lacks {len(lacking)} image(s) of {path}: {lacking[0]}")
    words = {classes[stem] for stem in stems}
    train = find_split(path.parent, TRAIN)
    known = train.class_names if train else ()
    if not words <= {*known} and all(map(str.isdecimal, words)):  # class numbers, from 0
        known = known or tuple(map(str, range(max(map(int, words)) + 1)))
        numbers = {str(number): number for number in range(len(known))}
    else:
        known = known or tuple(sorted(words))
        numbers = {name: number for number, name in enumerate(known)}
    if odd := sorted(words - numbers.keys()):
        raise DataError(
            f"{listed}: class {odd[0]} is none of the {len(known)} in {train.path if train else ''}"
        )
    labels = [numbers[classes[stem]] for stem in stems]
    # As class folders are sorted.
    images = sorted(zip(addresses, labels, strict=True), key=lambda each: each[::-1])
    return Split(path, known, images, (f"{path}: classes by {listed}",))


def _labels_beside(path: Path) -> tuple[Path | None, dict[str, str]]:
    """The list of labels beside or in `path`, and name of a file without suffix -> its class."""
    places = (path.parent, path)
    for listed in (place / name for place in places for name in LABEL_FILES):
        if listed.is_file():
            lines = re.findall(r"^(\S+?)[\s,]+(\w+)", listed.read_text(), re.MULTILINE)
            return listed, {Path(name).stem: label for name, label in lines}
    for kit in (*places, path.parent / DEVKIT / "data", path.parent / f"{DEVKIT}.tar.gz"):
        if kit.is_file():
            with tarfile.open(kit) as tar:
                files = [tar.extractfile(f"{DEVKIT}/data/{name}") for name in KIT_FILES]
                return kit, _of_kit(*(file.read() if file else b"" for file in files))
        if all((kit / name).is_file() for name in KIT_FILES):
            return kit / KIT_FILES[0], _of_kit(*((kit / name).read_bytes() for name in KIT_FILES))
    return None, {}


def _of_kit(truth: bytes, meta: bytes) -> dict[str, str]:
    """Labels of the development kit, whose class numbers are not in the order of their names."""
    from scipy.io import loadmat

    synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    names = dict(zip(synsets["ILSVRC2012_ID"].tolist(), synsets["WNID"].tolist(), strict=True))
    return {
        f"ILSVRC2012_val_{place:08d}": names[int(number)]
        for place, number in enumerate(truth.split(), 1)
    }
