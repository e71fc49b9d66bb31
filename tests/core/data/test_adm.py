from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from spiralrope_cli.core.data.adm import center_crop, cropped_array


def picture(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize(("width", "height"), [(100, 70), (70, 100), (16, 16), (15, 9), (33, 32)])
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_any_picture_gets_the_size(width, height, size):
    assert cropped_array(picture(width, height), size).shape == (3, *size)
    assert cropped_array(picture(width, height).convert("L"), size).shape == (1, *size)


def test_halves_by_boxes_then_bicubic_then_the_centre():
    image = picture(76, 70)  # two halvings: 38 x 35, then 19 x 17
    small = image.resize((38, 35), Image.Resampling.BOX).resize((19, 17), Image.Resampling.BOX)
    larger = small.resize((round(19 * 16 / 17), 16), Image.Resampling.BICUBIC)
    expected = np.asarray(larger)[:, 1:17]
    assert np.array_equal(np.asarray(center_crop(image, (16, 16))), expected)


def test_the_centre_stays_in_the_centre():
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[28:36, 60:68] = 255
    cropped = np.asarray(center_crop(Image.fromarray(pixels), (32, 32))).astype(int)
    assert np.abs(cropped - cropped[:, ::-1]).max() <= 1
    assert np.abs(cropped - cropped[::-1]).max() <= 1
    assert cropped[16, 16, 0] > 200
    assert cropped[4, 4, 0] == 0
