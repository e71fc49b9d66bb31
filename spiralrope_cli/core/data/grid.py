"""From what a network draws to pictures."""

from __future__ import annotations

import math

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

SMALLEST_SIDE = 64
"""Smaller pictures are enlarged in a grid, pixel by pixel."""


def to_levels(images: Tensor) -> Tensor:
    """[N, 1 or 3, H, W] in [-1, 1] -> [N, 3, H, W] uint8 on the CPU; grey becomes RGB."""
    levels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.to("cpu").expand(-1, 3, -1, -1)


def picture_grid(levels: Tensor, columns: int | None = None) -> Image.Image:
    """Pictures side by side.

    Args:
        levels: [N, 3, H, W] uint8.
        columns: per row; by default a square of pictures.
    """
    larger = max(1, math.ceil(SMALLEST_SIDE / min(levels.shape[-2:])))
    levels = levels.repeat_interleave(larger, 2).repeat_interleave(larger, 3)
    columns = columns or math.ceil(math.sqrt(len(levels)))
    pixels = make_grid(levels, nrow=columns, padding=2, pad_value=255)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
