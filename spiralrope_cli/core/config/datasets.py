"""Data sets and their defaults. Standard library only, so that errors come before torch loads.

A data set is a built-in name or a folder with `train/` and `val/`, each with one folder per class.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spiralrope_cli.core.errors import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


STREAM = re.compile(r"wds/(pipe:|(https?|file):/)")
"""How a set of WebDataset shards begins that are no files in a folder."""


def slug_of(data: str) -> str:
    """A short name of a built-in set or a folder: no `train/`, no version, no cache of the Hub."""
    if STREAM.match(data):  # NAME of NAME-{train,val}-{000..127}.tar
        split = r"(?:(?:train|val|validation|test)[_.-]*)?"
        file = re.search(rf"(\w[\w.-]*?)[_.-]*{split}(?:\{{|\.tar|\.tgz)", data)
        return file[1] if file else "stream"
    root = Path(data)
    if re.fullmatch(r"\d+\.\d+\.\d+", root.name):  # of TensorFlow Datasets
        root = root.parent
    if root.parent.name == "snapshots":
        return root.parent.parent.name.split("--")[-1]
    return root.parent.name if root.name == "train" else root.name


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set, before any image is read."""

    data: str  # built-in name, or folder
    kind: str  # `memory` (tensors), `folder` (image files) or `latents` (cached latents)
    default_arch: str  # of classifiers
    class_names: tuple[str, ...]  # by class number
    num_train: int
    num_val: int
    defaults: dict[str, Any] = field(default_factory=dict)  # they override the recipe
    finetune: dict[str, Any] = field(default_factory=dict)  # they override both, for finetune
    default_dit: str = "dit-b4"
    dit: dict[str, Any] = field(default_factory=dict)  # defaults of dit-train
    num_samples: int = 50_000  # default of dit-sample
    notes: tuple[str, ...] = ()  # what the user may not expect of its files

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    def inert_options(self) -> list[tuple[str, str]]:
        """Fields of a run that have no effect with this data set, with the reason."""
        idle = ("workers", "skip_bad", "augment_on") if self.kind == "memory" else ()
        return [(name, f"{self.data} is kept in memory") for name in idle]

    def defaults_of(self, command: str) -> dict[str, Any]:
        """Field name -> value, for a training command; they override its recipe."""
        if command == "dit-train":
            return self.dit
        return {**self.defaults, **(self.finetune if command == "finetune" else {})}


@dataclass(frozen=True, kw_only=True)
class EvalProtocol:
    """Validation images and their preprocessing."""

    data: str  # a built-in name or a folder
    num_val: int
    image_size: tuple[int, int]  # (height, width) in pixels
    in_chans: int
    crop_ratio: float  # resized to image size / this, then cropped at the centre
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]
    real_labels: str = ""  # as `EvalOptions`; empty: the labels of the data set

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == self.in_chans:
            raise ConfigError(
                f"--data {self.data} has {len(self.mean)} channel(s), but the weights take "
                f"{self.in_chans}"
            )


# Common defaults of the built-in sets: small grey images.
_SMALL_GREY = {
    "in_chans": 1,
    "crop_ratio": 1.0,
    "geometry": "shift",
    "auto_augment": "none",
    "color_jitter": 0.0,
    "random_erasing": 0.0,
    "drop_path": 0.0,
    "weight_decay": 0.05,
    "lr_rule": "linear",
    "min_lr": 1e-5,
}

# 8x8 or 28x28 pixels need no VAE. A flipped digit is another sign.
_DIT_SMALL_GREY = {
    "vae": "none",
    "hflip": 0.0,
    "schedule": "cosine",
    "lr": 2e-3,
    "betas": (0.9, 0.99),
    "log_every": 25,
}

# Finetuning on the set of pretraining is short.
_SHORT = {"warmup_epochs": 1, "lr": 2e-4, "lr_rule": "none"}

DIGITS = DataSet(
    data="digits",
    kind="memory",
    default_arch="deit-ti",
    class_names=tuple("0123456789"),
    num_train=1437,
    num_val=360,
    defaults={
        **_SMALL_GREY,
        "image_size": (8, 8),
        "patch_size": 2,
        "mean": (0.3054,),
        "std": (0.3760,),
        "hflip": 0.0,
        "translate": 0.5,
        "degrees": 10.0,
        "epochs": 50,
        "warmup_epochs": 3,
        "batch_size": 32,
        "lr": 1.6e-2,
        "ema_decay": 0.99,
        "mixup": 0.0,
        "cutmix": 0.0,
        "smoothing": 0.1,
        "log_every": 22,
        "validate_every": 5,
        "save_every": 10,
    },
    finetune={**_SHORT, "epochs": 10, "validate_every": 2, "save_every": 5},
    default_dit="dit-ti2",
    dit={
        **_DIT_SMALL_GREY,
        "image_size": (8, 8),
        "epochs": 100,
        "warmup_epochs": 4,
        "batch_size": 64,
        "ema_decay": 0.995,
        "sample_every": 500,
        "save_every": 500,
    },
    num_samples=200,
)

FASHION_MNIST = DataSet(
    data="fashion-mnist",
    kind="memory",
    default_arch="deit-ti",
    class_names=(
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    num_train=60000,
    num_val=10000,
    defaults={
        **_SMALL_GREY,
        "image_size": (28, 28),
        "patch_size": 4,
        "mean": (0.2860,),
        "std": (0.3530,),
        "hflip": 0.5,
        "translate": 2.0,
        "degrees": 5.0,
        "epochs": 20,
        "warmup_epochs": 2,
        "batch_size": 256,
        "lr": 2e-3,
        "ema_decay": 0.999,
        "mixup": 0.2,
        "cutmix": 0.0,
        "smoothing": 0.1,
        "log_every": 25,
        "validate_every": 1,
        "save_every": 1,
    },
    finetune={**_SHORT, "epochs": 3},
    default_dit="dit-ti4",
    dit={
        **_DIT_SMALL_GREY,
        "image_size": (28, 28),
        "epochs": 10,
        "warmup_epochs": 1,
        "batch_size": 128,
        "ema_decay": 0.999,
        "sample_every": 1000,
        "save_every": 1000,
    },
    num_samples=200,
)

BUILT_IN = {built_in.data: built_in for built_in in (DIGITS, FASHION_MNIST)}
NAMED = ("cifar100", "inat18", "inat19")
"""Names of folders of images; `data/named.py` knows where they lie."""
DATA_SETS = (*BUILT_IN, *NAMED)
DATA_NAMES = ", ".join((*DATA_SETS, "hfds/OWNER/NAME", "tfds/NAME", "wds/URL"))

PHOTOGRAPHS: dict[str, Any] = {
    "image_size": (224, 224),
    "patch_size": 16,
    "in_chans": 3,
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
    "crop_ratio": 0.875,
}


# --- Class names: weights carry them, so that class numbers can be compared with those of data

IMAGENET_CLASSES, IMAGENET_NAME = 1000, re.compile(r"n\d{8}")
"""Published weights carry no names; in such folders their order is right."""


def class_difference(before: Sequence[str], now: Sequence[str]) -> str:
    """Which class numbers mean something else; empty where none do, or names are not known."""
    if not (before and now):
        return ""
    if len(before) != len(now):
        return f"{len(before)} classes, now {len(now)}"
    changed = [n for n, (was, name) in enumerate(zip(before, now, strict=True)) if was != name]
    if not changed:
        return ""
    more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    return f"class {changed[0]} was {before[changed[0]]!r}, now {now[changed[0]]!r}{more}"


def nameless_note(source: str, known: Sequence[str], names: Sequence[str]) -> list[str]:
    """A note where weights do not say which classes they know; `names` are those of the data."""
    imagenet = len(names) == IMAGENET_CLASSES and all(map(IMAGENET_NAME.fullmatch, names))
    if known or imagenet:
        return []
    return [f"{source} has no class names to compare with those of the data"]


def numbering_note(names: Sequence[str]) -> list[str]:
    """A note where class folders are called by numbers that are not those of their classes."""
    if all(name.isdecimal() for name in names):
        for number, name in enumerate(names):
            if int(name) != number:
                return [
                    f"class folders are numbers, and are sorted as text: class {number} is {name!r}"
                ]
    return []
