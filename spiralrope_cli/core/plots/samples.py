"""A grid of images, with their classes."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from spiralrope_cli.core.data.images import GAP, SMALLEST_SIDE, image_grid
from spiralrope_cli.core.plots.curves import DPI, SMALL, TITLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALLEST_TILE = 120
"""Smallest side of an image in the figure, in pixels."""

STRIP = 0.2
"""Height of the label below an image, as a fraction of that of the image."""

CHARACTER, LINE = 0.085, 0.2
"""Width of a letter (at most) and height of a line of the title, in inches."""


def samples_figure(
    images: Tensor, labels: Sequence[str], title: str, columns: int | None = None
) -> Figure:
    """A grid of images.

    Args:
        images: [N, 3, height, width] uint8.
        labels: one per image, or empty.
        title: title of the figure.
        columns: images per row; by default a square.
    """
    from matplotlib.figure import Figure

    count, side = len(images), images.shape[-2]
    columns = min(columns or math.ceil(count**0.5), count)
    strip = math.ceil(STRIP * side) if labels else 0
    grid = image_grid(F.pad(images, (0, 0, 0, strip), value=255), columns)
    larger = max(1, round(SMALLEST_TILE / max(SMALLEST_SIDE, min(images.shape[-2:]))))
    width, height = (larger * pixels / DPI for pixels in grid.size)
    lines = textwrap.wrap(title, max(12, int(width / CHARACTER)))
    above = LINE * (len(lines) + 0.5)
    figure = Figure(figsize=(width, height + above))
    # No resampling: a pixel of the grid is an integer number of pixels of the figure.
    axis = figure.add_axes((0, 0, 1, height / (height + above)))
    axis.imshow(grid, interpolation="nearest", aspect="auto")
    axis.set_axis_off()
    top = 1 - LINE / 4 / (height + above)
    figure.text(0.5, top, "\n".join(lines), fontsize=TITLE, ha="center", va="top")
    cell_width = (grid.size[0] - 2) / columns
    cell_height = (grid.size[1] - 2) / math.ceil(count / columns)
    most = max(3, int(cell_width * larger / DPI / CHARACTER))
    for number, label in enumerate(labels):
        row, column = divmod(number, columns)
        middle = cell_height * (row + 1) - cell_height * strip / (side + strip) / 2
        text = label if len(label) <= most else f"{label[: most - 1]}…"
        place = (cell_width * (column + 0.5), middle)
        axis.text(*place, text, fontsize=SMALL, ha="center", va="center")
    return figure


def labelled_grid(grid: Path, labels: Sequence[str], columns: int) -> bytes | None:
    """A saved grid of images as a PNG with their labels; None if it has no such columns."""
    with Image.open(grid) as opened:
        pixels = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)
    rows = math.ceil(len(labels) / max(columns, 1))
    height, width = (side - GAP for side in pixels.shape[1:])
    if not labels or height % rows or width % columns:
        return None
    height, width = height // rows, width // columns
    tiles = pixels[:, GAP:, GAP:].unfold(1, height - GAP, height).unfold(2, width - GAP, width)
    images = tiles.flatten(1, 2).transpose(0, 1)[: len(labels)]
    sink = io.BytesIO()
    samples_figure(images, labels, "", columns).savefig(sink, format="png", dpi=DPI)
    return sink.getvalue()


def fit_to_size(image: Tensor, size: tuple[int, int]) -> Tensor:
    """[3, h, w] uint8, resized to fit into (height, width), on a white background."""
    height, width = image.shape[1:]
    if (height, width) == size:
        return image
    scale = min(size[0] / height, size[1] / width)
    fitted = (max(1, round(height * scale)), max(1, round(width * scale)))
    smooth = F.interpolate(image[None].float(), fitted, mode="bilinear", antialias=True)[0]
    top, left = (size[0] - fitted[0]) // 2, (size[1] - fitted[1]) // 2
    around = (left, size[1] - fitted[1] - left, top, size[0] - fitted[0] - top)
    return F.pad(smooth.round().to(torch.uint8), around, value=255)
