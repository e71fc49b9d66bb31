"""Generated images side by side, with their classes below."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from spiralrope_cli.core.data.images import SMALLEST_SIDE, picture_grid
from spiralrope_cli.core.plots.style import DPI, SMALL, TITLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALLEST_TILE = 120
"""Pixels of the file along a picture's side, at least."""

STRIP = 0.2
"""Height of the line below a picture, over the picture's."""

CHARACTER, LINE = 0.085, 0.2
"""Inches that a letter is wide at most, and a line of the title is high."""


def samples(
    levels: Tensor, labels: Sequence[str], title: str, columns: int | None = None
) -> Figure:
    """A grid of pictures.

    Args:
        levels: [N, 3, height, width] uint8.
        labels: one for each picture, or none.
        title: above the grid.
        columns: per row; by default a square of pictures.
    """
    from matplotlib.figure import Figure

    columns = min(columns or math.ceil(len(levels) ** 0.5), len(levels))
    strip = math.ceil(STRIP * levels.shape[-2]) if labels else 0
    grid = picture_grid(F.pad(levels, (0, 0, 0, strip), value=255), columns)
    larger = max(1, round(SMALLEST_TILE / max(SMALLEST_SIDE, min(levels.shape[-2:]))))
    width, height = (larger * side / DPI for side in grid.size)
    lines = textwrap.wrap(title, max(12, int(width / CHARACTER)))
    above = LINE * (len(lines) + 0.5)
    figure = Figure(figsize=(width, height + above))
    # Every pixel of the grid has a whole number of pixels of the file.
    axis = figure.add_axes((0, 0, 1, height / (height + above)))
    axis.imshow(grid, interpolation="nearest", aspect="auto")
    axis.set_axis_off()
    top = 1 - LINE / 4 / (height + above)
    figure.text(0.5, top, "\n".join(lines), fontsize=TITLE, ha="center", va="top")
    wide = (grid.size[0] - 2) / columns
    tall = (grid.size[1] - 2) / math.ceil(len(levels) / columns)
    most = max(3, int(wide * larger / DPI / CHARACTER))
    for number, label in enumerate(labels):
        row, column = divmod(number, columns)
        below = tall * (row + 1) - tall * strip / (levels.shape[-2] + strip) / 2
        text = label if len(label) <= most else f"{label[: most - 1]}…"
        axis.text(wide * (column + 0.5), below, text, fontsize=SMALL, ha="center", va="center")
    return figure


def fitted(picture: Tensor, like: Tensor) -> Tensor:
    """[3, h, w] uint8 within the size of another picture, on white."""
    (height, width), (tall, wide) = picture.shape[1:], like.shape[1:]
    if (height, width) == (tall, wide):
        return picture
    scale = min(tall / height, wide / width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    smooth = F.interpolate(picture[None].float(), size, mode="bilinear", antialias=True)[0]
    left, top = (wide - size[1]) // 2, (tall - size[0]) // 2
    around = (left, wide - size[1] - left, top, tall - size[0] - top)
    return F.pad(smooth.round().to(torch.uint8), around, value=255)
