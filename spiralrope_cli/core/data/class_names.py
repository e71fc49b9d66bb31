"""What classes are called, where that is known."""

from __future__ import annotations

from pathlib import Path

from spiralrope_cli.core.config.datasets import class_folders, class_names
from spiralrope_cli.core.errors import DataError

IMAGENET_CLASSES = 1000


def names_of(data: str, num_classes: int) -> list[str]:
    """The names of all classes, or their numbers where nobody knows.

    Args:
        data: a built-in name, a folder, or nothing for published weights.
        num_classes: how many there must be.
    """
    names = _known(data, num_classes)
    return names if len(names) == num_classes else [str(n) for n in range(num_classes)]


def _known(data: str, num_classes: int) -> list[str]:
    if data == "fashion-mnist":
        from torchvision.datasets import FashionMNIST

        return list(FashionMNIST.classes)
    if not data and num_classes == IMAGENET_CLASSES:
        from timm.data import ImageNetInfo

        return [name.split(",")[0] for name in ImageNetInfo().label_descriptions()]
    try:
        return class_names(class_folders(Path(data))) if data else []
    except DataError:
        return []
