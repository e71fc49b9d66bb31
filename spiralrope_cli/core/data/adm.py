"""The picture preparation of ADM, which DiTs are trained and measured with (arXiv 2105.05233)."""

from __future__ import annotations

import numpy as np
from PIL import Image


def center_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Halves by boxes while it is twice as large, then bicubic until it covers, then the centre.

    Args:
        image: of any size.
        size: (height, width) in pixels.
    """
    height, width = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    larger = (round(image.width * scale), round(image.height * scale))
    image = image.resize(larger, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def cropped_array(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """The same as uint8 [channels, h, w]."""
    pixels = np.asarray(center_crop(image, size))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
