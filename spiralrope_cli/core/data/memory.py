"""Small data sets that live in memory as tensors, augmented in batches without loader workers.

Legend: B batch, (h, w) pixels.
"""

from __future__ import annotations

import functools
import gzip
import math
import shutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spiralrope_cli.core.atomic import atomic_write
from spiralrope_cli.core.config.folders import cache_folder
from spiralrope_cli.core.config.runs import AugmentConfig
from spiralrope_cli.core.errors import DataError
from spiralrope_cli.core.runtime import distributed
from spiralrope_cli.core.runtime.seeds import generator_for

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
RAW_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
CROP_ASPECT = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class MemorySplit:
    """One split: images [N, channels, h, w] uint8 and labels [N] int64."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device, channels: int) -> MemorySplit:
        """The same split on a device, grey pictures in each of so many channels."""
        images = self.images.to(device)
        return MemorySplit(images.expand(-1, channels, -1, -1), self.labels.to(device))


def is_here(data: str) -> bool:
    """Whether a built-in set can be loaded without a network."""
    if data == "digits" or DEBIAN_FASHION_MNIST.is_dir():
        return True
    return _is_unpacked(cache_folder() / "FashionMNIST" / "raw")


def _is_unpacked(raw: Path) -> bool:
    return all((raw / name).is_file() for name in RAW_FILES)


def load_memory_set(data: str) -> tuple[MemorySplit, MemorySplit]:
    """Training and validation split of a built-in set.

    Raises:
        DataError: the set is not here and cannot be had.
    """
    return {"digits": load_digits, "fashion-mnist": load_fashion_mnist}[data]()


@functools.lru_cache(maxsize=1)
def splits_on(device: torch.device, data: str, channels: int) -> tuple[MemorySplit, MemorySplit]:
    """The same on a device, kept there for all that look at the set; every process must ask.

    Raises:
        DataError: as `load_memory_set`.
    """
    with distributed.first_alone():  # it may have to unpack or download
        train, val = load_memory_set(data)
    return train.to(device, channels), val.to(device, channels)


def load_digits() -> tuple[MemorySplit, MemorySplit]:
    """The bundled scans: 1797 of 8x8 pixels (UCI, CC BY 4.0), split by indices in the file."""
    packaged = resources.files("spiralrope_cli") / "data" / "digits.npz"
    with packaged.open("rb") as file, np.load(file) as arrays:
        images = torch.from_numpy(arrays["images"]).unsqueeze(1)
        labels = torch.from_numpy(arrays["labels"]).long()
        parts = [torch.from_numpy(arrays[name]).long() for name in ("train", "val")]
    train, val = (MemorySplit(images[part], labels[part]) for part in parts)
    return train, val


def load_fashion_mnist() -> tuple[MemorySplit, MemorySplit]:
    """Fashion-MNIST through torchvision, unpacked once from Debian's package or downloaded."""
    from torchvision.datasets import FashionMNIST

    root = cache_folder()
    raw = root / "FashionMNIST" / "raw"
    packed = DEBIAN_FASHION_MNIST
    try:
        if not _is_unpacked(raw) and packed.is_dir():
            raw.mkdir(parents=True, exist_ok=True)
            for name in RAW_FILES:
                _unpack(packed / f"{name}.gz", raw / name)
        there = _is_unpacked(raw)
        splits = [FashionMNIST(str(root), train, download=not there) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"fashion-mnist is not here and cannot be downloaded: {str(error).splitlines()[0]}",
            f"put its four unpacked files into {raw}, or install the Debian package "
            "dataset-fashion-mnist",
        ) from error
    train, val = (MemorySplit(split.data.unsqueeze(1), split.targets) for split in splits)
    return train, val


def _unpack(packed: Path, target: Path) -> None:
    with (
        atomic_write(target) as beside,
        gzip.open(packed) as source,
        beside.open("wb") as sink,
    ):
        shutil.copyfileobj(source, sink)


@functools.lru_cache(maxsize=2)
def epoch_draws(num_images: int, seed: int, epoch: int) -> Tensor:
    """[num_images, 5] float32 in [0, 1): one row of random numbers per place in the epoch."""
    return torch.rand(num_images, 5, generator=generator_for(seed, "geometry", epoch))


def warp(images: Tensor, draws: Tensor, augment: AugmentConfig, size: tuple[int, int]) -> Tensor:
    """Moves, turns, crops or mirrors each picture by its own random numbers.

    Args:
        images: [B, channels, h, w] float.
        draws: [B, 5] in [0, 1).
        augment: the options.
        size: (height, width) to give back.

    Returns:
        [B, channels, *size]; outside the picture lies black, or with `crop` its border.
    """
    height, width = images.shape[-2:]
    draws = draws.to(images.device, non_blocking=True)
    mirror = 1 - 2 * (draws[:, 0] < augment.hflip).float()
    centred = 2 * draws - 1
    if augment.geometry == "shift":
        angle = centred[:, 1] * math.radians(augment.max_rotation)
        shift_x = centred[:, 2] * (2 * augment.max_shift / width)
        shift_y = centred[:, 3] * (2 * augment.max_shift / height)
        cos, sin, ratio = angle.cos(), angle.sin(), height / width
        # Coordinates run from -1 to 1 on both axes, whatever the picture's shape.
        rows = [cos * mirror, -sin * ratio, shift_x, sin / ratio * mirror, cos, shift_y]
        padding = "zeros"
    else:
        area = augment.crop_scale + (1 - augment.crop_scale) * draws[:, 1]
        low, high = (math.log(aspect) for aspect in CROP_ASPECT)
        aspect = (low + (high - low) * draws[:, 4]).exp()
        wide, tall = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
        zero = torch.zeros_like(area)
        left, top = (1 - wide) * centred[:, 2], (1 - tall) * centred[:, 3]
        rows = [wide * mirror, zero, left, zero, tall, top]
        padding = "border"
    affine = torch.stack(rows, dim=1).view(-1, 2, 3)
    grid = F.affine_grid(affine, [len(images), images.shape[1], *size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode=padding, align_corners=False)


def resize_and_crop(images: Tensor, size: tuple[int, int], crop_ratio: float) -> Tensor:
    """The evaluation protocol on tensors: shorter side to size / crop_ratio, then the centre.

    Args:
        images: [B, channels, h, w] float.
        size: (height, width) to give back.
        crop_ratio: share of the resized picture's shorter side that is kept.

    Returns:
        [B, channels, *size].
    """
    height, width = images.shape[-2:]
    if (height, width) == size and crop_ratio == 1:
        return images
    scale = max(size[0] / height, size[1] / width) / crop_ratio
    larger = (max(round(height * scale), size[0]), max(round(width * scale), size[1]))
    images = F.interpolate(images, larger, mode="bicubic", antialias=True)
    top, left = (larger[0] - size[0]) // 2, (larger[1] - size[1]) // 2
    return images[..., top : top + size[0], left : left + size[1]].clamp(0, 255)
