"""Classes of a data set as classes of the weights: by names, or by ImageNet's numbers.

So the variants of ImageNet's validation set are evaluated as their papers do: V2
(arXiv 1902.10811), ReaL (2006.07159), -A (1907.07174), -R (2006.16241), Sketch (1905.13549).
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from spiralrope_cli.core.config.datasets import (
    BUILT_IN,
    IMAGENET_CLASSES,
    IMAGENET_NAME,
    DataSet,
    class_difference,
    nameless_note,
    numbering_note,
)
from spiralrope_cli.core.data.splits import find_val_set, val_split
from spiralrope_cli.core.errors import ConfigError, DataError, first_line
from spiralrope_cli.core.storage import parse

NUM_VAL = 50_000
"""Images of ImageNet's validation set; `real.json` has a list of labels for each."""
REAL_OF_TIMM = "timm"
OF_VAL = re.compile(r"ILSVRC2012_val_(\d{8})")


def classes_of(
    data_set: DataSet,
    source: str,
    num_classes: int,
    known: Sequence[str],
    ignore_names: bool = False,
) -> tuple[tuple[int, ...], list[str]]:
    """The class of the weights that each class of a data set is, and notes for the user.

    Class numbers of the weights by those of the data, empty where all are equal; predictions are
    restricted to them. `known` are the names of the weights' classes by number, empty if they have
    none; with `ignore_names` they may differ, if there are as many classes. A ConfigError names the
    first class that the weights do not know.
    """
    names = data_set.class_names
    if known and names == tuple(known):
        return (), numbering_note(names)
    ids = imagenet_ids(names)
    if known and not ignore_names:
        ids = names if {*names} <= {*known} else ids
    else:
        known = _synsets() if ids and num_classes == IMAGENET_CLASSES else ()
    place = {name: number for number, name in enumerate(known)}
    if len(ids) > 1 and {*ids} <= place.keys():
        classes = tuple(place[name] for name in ids)
        notes = []
        if ids != names:
            notes += [
                f"class folders 0 to {len(ids) - 1} of {data_set.data} are ImageNet's classes"
            ]
        if len(classes) < num_classes:
            part = f"the {len(classes)} classes of {data_set.data}, out of {num_classes}"
            notes += [f"predictions of {source} are restricted to {part}"]
        return () if classes == tuple(range(num_classes)) else classes, notes
    if num_classes != data_set.num_classes:
        raise ConfigError(
            f"{source} has {num_classes} classes, {data_set.data} has {data_set.num_classes}",
            "name the data set that it was trained on by --data",
        )
    if other := class_difference(known, names):
        raise ConfigError(
            f"{source} was trained on other classes than those of {data_set.data}: {other}",
            "give the classes the names that they had in training, or name another --data; "
            "--ignore-class-names goes on",
        )
    nameless = [] if ignore_names else nameless_note(source, known, names)
    return (), [*nameless, *numbering_note(names)]


def imagenet_ids(names: Sequence[str]) -> tuple[str, ...]:
    """The WordNet ids of classes that are ImageNet's: named by these, or by all its numbers.

    Empty for other classes.
    """
    if len(names) == IMAGENET_CLASSES and {*names} == {*map(str, range(IMAGENET_CLASSES))}:
        return tuple(_synsets()[int(name)] for name in names)
    named = all(map(IMAGENET_NAME.fullmatch, names)) and {*names} <= {*_synsets()}
    return tuple(names) if named else ()


@functools.cache
def _synsets() -> tuple[str, ...]:
    """WordNet ids of ImageNet's classes, in the order of their numbers."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo().label_names())


# --- ReaL


@functools.cache
def real_images(file: str, data: str) -> list[tuple[str, tuple[int, ...]]]:
    """(address, its classes in the data set) of each validation image that ReaL labels.

    `file` is `real.json` as published, or `timm` for the copy in timm; `data` is a folder of
    ImageNet.
    """
    labels = _read_real(file)
    ids = () if data in BUILT_IN else imagenet_ids(find_val_set(data).class_names)
    if len(ids) != IMAGENET_CLASSES:
        raise DataError(
            f"--real-labels labels ImageNet's validation images, but --data is {data}",
            "name a folder of ImageNet with all 1000 classes",
        )
    place = {name: number for number, name in enumerate(ids)}
    classes = [place[name] for name in _synsets()]
    found = []
    for address, _ in val_split(data).images:
        at = OF_VAL.search(address)
        if not at or not 0 < int(at[1]) <= NUM_VAL:
            raise DataError(
                f"--real-labels: {address} is not named ILSVRC2012_val_NNNNNNNN",
                "the labels of an image are found by its number",
            )
        if here := labels[int(at[1]) - 1]:
            found.append((address, tuple(classes[label] for label in here)))
    if not found:
        raise DataError(f"--real-labels {file} labels no image of {data}")
    return found


def _read_real(file: str) -> list[list[int]]:
    """ImageNet's class numbers of each validation image."""
    path: Any = Path(os.path.expanduser(file))
    if file == REAL_OF_TIMM:
        path = resources.files("timm.data") / "_info" / "imagenet_real_labels.json"
    try:
        labels = parse(path.read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DataError(f"--real-labels {file} cannot be read: {reason}") from error
    known = range(IMAGENET_CLASSES)
    if (
        not isinstance(labels, list)
        or len(labels) != NUM_VAL
        or not all(isinstance(each, list) and all(n in known for n in each) for each in labels)
    ):
        raise DataError(
            f"--real-labels {file} is not real.json: {NUM_VAL} lists of class numbers",
            f"{REAL_OF_TIMM} is the copy that timm has",
        )
    return labels
