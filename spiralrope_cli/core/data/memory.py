"""Small data sets that are kept in memory as tensors, without data loader workers."""

from __future__ import annotations

import functools
import gzip
import shutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spiralrope_cli.core.errors import DataError, first_line
from spiralrope_cli.core.runtime import distributed
from spiralrope_cli.core.storage import atomic_write, cache_folder

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
RAW_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True)
class MemorySplit:
    """One split: images [N, channels, h, w] uint8 and labels [N] int64."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device, channels: int) -> MemorySplit:
        """On a device; grey images are repeated to `channels` channels."""
        images = self.images.to(device)
        return MemorySplit(images.expand(-1, channels, -1, -1), self.labels.to(device))


def is_here(data: str) -> bool:
    """Whether a built-in set can be loaded without a download."""
    if data == "digits" or DEBIAN_FASHION_MNIST.is_dir():
        return True
    raw = cache_folder() / "FashionMNIST" / "raw"
    return all((raw / name).is_file() for name in RAW_FILES)


def load_memory_set(data: str) -> tuple[MemorySplit, MemorySplit]:
    """Training and validation split of a built-in set."""
    return {"digits": load_digits, "fashion-mnist": load_fashion_mnist}[data]()


@functools.lru_cache(maxsize=1)
def splits_on(device: torch.device, data: str, channels: int) -> tuple[MemorySplit, MemorySplit]:
    """`load_memory_set` on a device, cached; every process must call it."""
    with distributed.main_process_first():  # it may have to unpack or download
        train, val = load_memory_set(data)
    return train.to(device, channels), val.to(device, channels)


def load_digits() -> tuple[MemorySplit, MemorySplit]:
    """The bundled digits: 1797 scans of 8x8 pixels (UCI, CC BY 4.0); the split is in the file."""
    packaged = resources.files("spiralrope_cli") / "data" / "digits.npz"
    with packaged.open("rb") as file, np.load(file) as arrays:
        images = torch.from_numpy(arrays["images"]).unsqueeze(1)
        labels = torch.from_numpy(arrays["labels"]).long()
        parts = [torch.from_numpy(arrays[name]).long() for name in ("train", "val")]
    train, val = (MemorySplit(images[part], labels[part]) for part in parts)
    return train, val


def load_fashion_mnist() -> tuple[MemorySplit, MemorySplit]:
    """Fashion-MNIST by torchvision: unpacked once from Debian's package, or downloaded."""
    from torchvision.datasets import FashionMNIST

    root = cache_folder()
    raw = root / "FashionMNIST" / "raw"
    packed = DEBIAN_FASHION_MNIST
    try:
        for name in RAW_FILES if packed.is_dir() else ():
            if not (raw / name).is_file():
                raw.mkdir(parents=True, exist_ok=True)
                _unpack(packed / f"{name}.gz", raw / name)
        splits = [FashionMNIST(str(root), train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"fashion-mnist is not here and cannot be downloaded: {first_line(error)}",
            f"put its four unpacked files into {raw}, or install the Debian package "
            "dataset-fashion-mnist",
        ) from error
    train, val = (MemorySplit(split.data.unsqueeze(1), split.targets) for split in splits)
    return train, val


def _unpack(packed: Path, target: Path) -> None:
    with atomic_write(target) as beside, gzip.open(packed) as source, beside.open("wb") as sink:
        shutil.copyfileobj(source, sink)
