"""Data sets by name or in a folder, and the images of a split in whatever form they lie there.

One list for all commands. No torch, so that errors come before it is loaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spiralrope_cli.core.config.datasets import BUILT_IN, PHOTOGRAPHS, STREAM, DataSet
from spiralrope_cli.core.data.listing import (
    ImageList,
    count_files,
    images_below,
    is_image,
    larger_files,
    list_class_folders,
)
from spiralrope_cli.core.data.named import data_root
from spiralrope_cli.core.data.stored import list_stored
from spiralrope_cli.core.data.streams import CLASS_NAMES, Shards, list_shards, shard_urls
from spiralrope_cli.core.data.val_labels import DAMAGED, DEVKIT, labels_beside, unpacked
from spiralrope_cli.core.errors import DataError
from spiralrope_cli.core.storage import parse, refuse_own

TRAIN, VAL = ("train",), ("val", "validation", "test")
"""Names of a split, the usual one first."""


@dataclass(frozen=True)
class Split:
    """The images of a split, in the order that seeds refer to."""

    path: Path | str  # folder or archive; the name of a stream
    class_names: tuple[str, ...]  # by class number
    images: Sequence[tuple[str, int]]  # (address, class number)
    notes: tuple[str, ...] = ()
    name: str = ""  # as in VAL
    shards: Shards | None = None  # of a stream


# --- Data sets


def find_data_set(data: str) -> DataSet:
    """The data set by name, or in a folder."""
    if data in BUILT_IN:
        return BUILT_IN[data]
    root = _data_folder(data, "train/ and val/ with one folder per class")
    if isinstance(root, str):
        for names in (TRAIN, VAL):
            _refuse_without(root, names)
    train, val = find_split(root, TRAIN), find_split(root, VAL)
    if not (train and val):
        missing = ["train/"] * (not train) + ["val/"] * (not val)
        raise DataError(
            f"{root} has no {' and no '.join(missing)}",
            "a data folder must hold train/ and val/ with one folder per class, as ImageNet",
        )
    if val.class_names != train.class_names:
        only = [
            f"{len(odd)} class folder(s) only in {side.path}: {', '.join(odd[:5])}"
            for side, other in ((train, val), (val, train))
            if (odd := sorted({*side.class_names} - {*other.class_names}))
        ]
        raise DataError("; ".join(only), "train/ and val/ need the same class folders")
    if len(train.class_names) == 1:
        raise DataError(
            f"{train.path} has one class folder, {train.class_names[0]}",
            "a classifier needs two; they lie in train/ itself, not in a folder in it",
        )
    return _of_splits(root, train, val, ", and chooses the best checkpoint")


def find_val_set(data: str) -> DataSet:
    """The validation set by name, or in a folder; needs no `train/`."""
    if data in BUILT_IN:
        return BUILT_IN[data]
    root = _data_folder(data, "val/ with one folder per class")
    return _of_splits(root, None, val_split(root))


def find_train_set(data: str) -> DataSet:
    """The training set by name, or in a folder; needs no `val/`."""
    if data in BUILT_IN:
        return BUILT_IN[data]
    root = _data_folder(data, "one folder per class, or train/ with them", parent=False)
    return _of_splits(root, train_split(root), None)


def _data_folder(data: str, holds: str, *, parent: bool = True) -> Path | str:
    """The data folder; if its `train/` is given, by default that which `val/` lies in as well."""
    root = data_root(data)
    if isinstance(root, str):
        return root
    if root.is_file():
        raise DataError(f"--data {data} is a file", f"name its folder; it must hold {holds}")
    if not root.is_dir():
        raise DataError(
            f"--data {data} is neither a folder nor a built-in name",
            f"built in: {', '.join(BUILT_IN)}; a folder must hold {holds}",
        )
    refuse_own(root, f"--data {data}")
    parent &= root.resolve().name == "train" and not any((root / name).is_dir() for name in VAL)
    return root.resolve().parent if parent else root


def _refuse_without(stream: str, names: Sequence[str], others: Any = True) -> None:
    """Raises, before any shard is read, if none is of a split and there are `others`."""
    if others and not any(shard_urls(stream, name) for name in names):
        raise DataError(
            f"{stream} has no shard with {names[0]} in its name",
            "write wds/https://host/set-{train-{0000..0127},val-{00..07}}.tar for both splits",
        )


def _of_splits(root: Path | str, train: Split | None, val: Split | None, more: str = "") -> DataSet:
    """A data set of image files, with one split or both."""
    found = [split for split in (train, val) if split]
    notes = [note for split in found for note in split.notes]
    if val and val.name == "test":
        notes.insert(0, f"there is no val/: {val.path} is used for validation{more}")
    return DataSet(
        data=root if isinstance(root, str) else str(root.resolve()),
        kind="folder",
        default_arch="deit-b",
        class_names=found[0].class_names,
        num_train=len(train.images) if train else 0,
        num_val=len(val.images) if val else 0,
        defaults=PHOTOGRAPHS,
        notes=tuple(notes),
    )


# --- Splits


def _root(data: str | Path) -> Path | str:
    return data if isinstance(data, str) and STREAM.match(data) else Path(data)


def train_split(data: str | Path) -> Split:
    """The training images of a data folder; without `train/`, those of its class folders."""
    root = _root(data)
    return find_split(root, TRAIN) or folder_split(root)


def val_split(data: str | Path) -> Split:
    """The validation images of a data folder; without `val/`, those of its class folders."""
    root = _root(data)
    if found := find_split(root, VAL):
        return found
    if isinstance(root, str):
        _refuse_without(root, VAL, shard_urls(root, *TRAIN))
    elif find_split(root, TRAIN) or not any(each.is_dir() for each in root.iterdir()):
        hint = "a data folder must hold val/ with one folder per class"
        raise DataError(f"{data} has no val/", hint)
    split = folder_split(root)
    said = f"{data} has no val/: the {len(split.class_names)} class folders in it are evaluated"
    return replace(split, notes=(said, *split.notes))


def find_split(root: Path | str, names: Sequence[str]) -> Split | None:
    """A split by its names, of which the first one that is there counts."""
    if isinstance(root, str):
        there = ((name, shard_urls(root, name)) for name in names)
        return next((stream_split(root, urls, name) for name, urls in there if urls), None)
    lists = (f"{names[0]}20[0-9][0-9].json{packed}" for packed in ("", ".tar.gz"))
    if listed := [path for each in lists for path in sorted(root.glob(each))]:
        return listed_split(root, listed)
    for name in names:
        folder = root / name
        if folder.is_dir() and not larger_files(folder):
            return replace(folder_split(folder, names == VAL), name=name)
        places = (folder, ""), (root, name), (root / "data", name)
        if stored := next((found for place in places if (found := larger_files(*place))), None):
            return replace(stored_split(stored, name), name=name)
    return None


def folder_split(folder: Path | str, may_be_flat: bool = False) -> Split:
    """Class folders; or a flat folder, where a list beside it has the labels; or all of a stream.

    Class folders are in plain sorted order, which gives the class numbers of published weights.
    """
    if isinstance(folder, str):
        return stream_split(folder, shard_urls(folder))
    try:
        entries = [entry for entry in os.scandir(folder) if entry.name[0] != "."]
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from error
    names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names and may_be_flat and (files := images_below(folder)[0]):
        return flat_split(folder, files)
    if not names:
        tars = sorted(entry.name for entry in entries if ".tar" in entry.name)
        but = f", but {len(tars)} archive(s): {tars[0]}, ..." if tars else ""
        unpack = "unpack each into a folder of its name: tar -xf NAME.tar -C NAME"
        hint = unpack if tars else "it must hold one folder of images per class"
        raise DataError(f"{folder} has no class folders{but}", hint)
    images, others = list_class_folders(folder, names)
    notes = [f"{folder} has one class, {names[0]}"] if len(names) == 1 else []
    if loose := sum(is_image(entry.name) for entry in entries):
        notes.append(f"{folder}: {loose} image(s) beside the class folders are left out")
    if others:
        notes.append(f"{folder}: files that are no images are left out{count_files(others)}")
    return Split(folder, tuple(names), images, tuple(notes))


def listed_split(root: Path, listed: Sequence[Path]) -> Split:
    """INaturalist 2018 or 2019: images in `train_val20NN/`, with both splits in JSON files."""
    if len(years := {re.sub(r"\D+", "", path.name) for path in listed}) > 1:
        lists = ", ".join(path.name for path in listed)
        raise DataError(f"{root} has {lists}", "put each year into a folder of its own")
    path, year = listed[0], years.pop()  # unpacked, if it is there in both forms
    try:
        inside = path.name.removesuffix(".tar.gz")
        content = parse(unpacked(path, inside) if inside != path.name else path.read_bytes())
        classes = sorted((each["id"], str(each["name"])) for each in content["categories"])
        number = {key: place for place, (key, _) in enumerate(classes)}
        label = {each["image_id"]: number[each["category_id"]] for each in content["annotations"]}
        files = [(each["file_name"].partition("/")[2], each["id"]) for each in content["images"]]
    except DAMAGED as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path} is not a list of iNaturalist: {reason}") from error
    folders = (root / f"train_val{year}", root / year)  # as packed, and as torchvision renames it
    folder = next((each for each in folders if each.is_dir()), None)
    if not folder:
        hint = f"unpack it there: tar -xf train_val{year}.tar.gz"
        raise DataError(f"{root} has {path.name}, but no train_val{year}/", hint)
    images = ImageList.of(((f"{folder}/{file}", label[key]) for file, key in files), str(folder))
    said = f"{root}: {len(images)} images with their classes by {path.name}"
    return Split(root, tuple(name for _, name in classes), images, (said,))


def stored_split(files: Sequence[Path], name: str) -> Split:
    """Images in tar, parquet or Arrow files, in the order of the files and their rows."""
    where, count = files[0] if len(files) == 1 else files[0].parent, len(files)
    totals = [int(found[1]) for path in files if (found := re.search(r"-of-(\d+)", path.name))]
    if totals and max(totals) != count:
        raise DataError(f"{where} holds {count} of {max(totals)} files", "download the others")
    index = list_stored(files)
    if index["label"].count(None) == len(index["label"]) > 0 and count == 1:
        return flat_split(where, index["address"])
    for listed in (files[0].parent / CLASS_NAMES, files[0].parent.parent / CLASS_NAMES):
        if not index["classes"] and listed.is_file():
            index["classes"] = listed.read_text().splitlines()
    return _with_numbers(where, count, index, name)


def stream_split(spec: str, urls: Sequence[str], name: str = "") -> Split:
    """Images in shards behind URLs or commands."""
    shards, index = list_shards(spec, urls)
    split = _with_numbers(spec, len(urls), index, name or "images")
    notes = split.notes if name in VAL else (*split.notes, shards.note)
    return replace(split, shards=shards, notes=notes, name=name)


def _with_numbers(where: Path | str, count: int, index: dict[str, Any], name: str) -> Split:
    """Listed images, of `count` files, with class numbers."""
    addresses, labels, names = index["address"], index["label"], index["classes"]
    if not addresses:
        raise DataError(f"{where} holds no images")
    if lacking := labels.count(None):
        raise DataError(
            f"{lacking} of the {len(labels)} images in {where} have no class",
            "a WebDataset shard needs KEY.cls beside KEY.jpg, a table a column named label",
        )
    if all(isinstance(label, int) for label in labels):
        names = names or [str(number) for number in range(max(labels) + 1)]
        if max(labels) >= len(names):
            raise DataError(f"{where} has class {max(labels)}, but names of {len(names)} classes")
    else:
        names = sorted({*map(str, labels)})
        numbers = {name: number for number, name in enumerate(names)}
        labels = [numbers[str(label)] for label in labels]
    said = f"{name}: {len(labels)} images in {count} file(s), classes by {index['labels_from']}"
    return Split(where, tuple(names), list(zip(addresses, labels, strict=True)), (said,))


# --- A flat val/ of ImageNet, and its labels


def flat_split(path: Path, addresses: list[str]) -> Split:
    """Images in a folder or an archive alone, with the classes that a list beside it gives."""
    listed, classes = labels_beside(path)
    if not listed:
        count = len(addresses)
        raise DataError(
            f"{path} has no class folders, and no list with the classes of its {count} images",
            f"put val.txt with lines FILE CLASS, or {DEVKIT}/ of the same download, beside it",
        )
    stems = [Path(address.rpartition("::")[2]).stem for address in addresses]
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
    found = [
        (numbers[classes[stem]], stem, each) for stem, each in zip(stems, addresses, strict=True)
    ]
    images = [(address, number) for number, _, address in sorted(found)]  # as class folders
    return Split(path, known, images, (f"{path}: classes by {listed}",))
