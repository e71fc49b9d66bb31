"""Grids of images with their classes, and attention maps of one query token over an image.

Fused attention returns no weights, so they are computed again from its q and k.

Legend: B batch, N tokens with the prefix, H heads, D channels of a head.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from spiralrope_cli.core.data.images import GAP, SMALLEST_SIDE, image_grid
from spiralrope_cli.core.plots.curves import COLOR_MAP, DPI, HEADING, SMALL, TITLE, grid_of_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMALLEST_TILE = 120
"""Smallest side of an image in the figure, in pixels."""

STRIP = 0.2
"""Height of the label below an image, as a fraction of that of the image."""

CHARACTER, LINE = 0.085, 0.2
"""Width of a letter (at most) and height of a line of the title, in inches."""

PANEL = 1.9
"""Side of a panel in inches."""

MOST_COLUMNS = 5
"""Panels per row for one layer; several layers have a row each."""

OPACITY = 0.65
DIMMED = 160
"""Lower contrast of the image below a map, so that the map stands out."""


# --- Grids of images


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
    fitted = ImageOps.pad(to_pil_image(image), size[::-1], Image.Resampling.BILINEAR, "white")
    return pil_to_tensor(fitted)


# --- Attention maps


class Watch(TorchFunctionMode):
    """Records q, k and v, [B, H, N, D] each, of every call of fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Makes the call, and records it if it is attention."""
        if func is F.scaled_dot_product_attention:
            self.calls.append((args[0], args[1], args[2]))
        return func(*args, **(kwargs or {}))


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) in float32: [B, H, M, D] and [B, H, N, D] -> [B, H, M, N]."""
    return (q.float() @ k.float().mT * q.shape[-1] ** -0.5).softmax(-1)


@torch.no_grad()
def attention_from(model: nn.Module, images: Tensor, token: int, layers: Sequence[int]) -> Tensor:
    """Attention weights of one query token.

    Args:
        model: a network with one fused attention per layer.
        images: [B, channels, height, width], normalised.
        token: index of the query; prefix tokens come first.
        layers: indices of layers.

    Returns:
        [layers, B, H, N] float32; each row sums to 1.
    """
    with Watch() as watch:
        model(images)
    chosen = [watch.calls[layer] for layer in layers]
    return torch.stack([attention_weights(q[:, :, [token]], k)[:, :, 0] for q, k, _ in chosen])


def attention_figure(
    image: np.ndarray,
    maps: np.ndarray,
    *,
    grid: tuple[int, int],
    layers: Sequence[int],
    heads: Sequence[int],
    patch: tuple[int, int] | None,
    title: str,
) -> Figure:
    """The image, and an attention map per head and layer.

    Args:
        image: [height, width] grey or [height, width, 3], uint8.
        maps: [layers, heads, 1 + h*w], attention to class token and patches.
        grid: patches as (rows, columns).
        layers: indices of the layers.
        heads: indices of the heads; for several the mean is drawn too.
        patch: (row, column) of the query; None: the class token.
        title: title of the figure.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    names = [f"head {head}" for head in heads]
    if len(heads) > 1:
        maps, names = np.concatenate((maps, maps.mean(1, keepdims=True)), axis=1), [*names, "mean"]
    cells = len(layers) * (1 + len(names))
    columns = 1 + len(names) if len(layers) > 1 else min(MOST_COLUMNS, cells)
    height, width = image.shape[:2]
    rows, extent = -(-cells // columns), (0, width, height, 0)
    inches = (PANEL * columns + 0.8, rows * (PANEL * (height / width) + 0.4) + 0.5)
    figure = Figure(figsize=inches, layout="constrained")
    axes = grid_of_axes(figure, cells, columns)
    panels = iter(axes)
    for layer, of_layer in zip(layers, maps, strict=True):
        axis = next(panels)
        axis.imshow(image, cmap="gray", vmin=0, vmax=255, extent=extent)
        axis.set_title(f"layer {layer}\n", fontsize=SMALL)
        _frame(axis, patch, grid)
        for name, attended in zip(names, of_layer, strict=True):
            axis = next(panels)
            grey = image.mean(-1) if image.ndim == 3 else image
            axis.imshow(grey, cmap="gray", vmin=-DIMMED, vmax=255 + DIMMED, extent=extent)
            look: dict[str, Any] = {"cmap": COLOR_MAP, "vmin": 0, "alpha": OPACITY}
            to_patches = attended[1:].reshape(grid)
            axis.imshow(to_patches, interpolation="nearest", extent=extent, **look)
            most, to_class = 100 * attended[1:].max(), 100 * attended[0]
            axis.set_title(f"{name}\nmax {most:.2g} %, class {to_class:.2g} %", fontsize=SMALL)
            _frame(axis, patch, grid)
    bar = figure.colorbar(
        ScalarMappable(cmap=COLOR_MAP), ax=axes, shrink=0.6 if rows > 1 else 1, aspect=25
    )
    bar.set_ticks([0, 1], labels=["0", "max"])
    bar.set_label("attention to a patch", fontsize=SMALL)
    figure.suptitle(title, fontsize=HEADING)
    return figure


def _frame(axis: Axes, patch: tuple[int, int] | None, grid: tuple[int, int]) -> None:
    """Removes ticks, and draws a frame around the query patch, visible on black and white."""
    from matplotlib.patches import Rectangle

    axis.set(xticks=[], yticks=[])
    if patch is None:
        return
    right, bottom = axis.get_xlim()[1], axis.get_ylim()[0]
    width, height = right / grid[1], bottom / grid[0]
    corner = (patch[1] * width, patch[0] * height)
    for color, style in (("white", "-"), ("black", "--")):
        line: dict[str, Any] = {"edgecolor": color, "linestyle": style, "linewidth": 1.8}
        axis.add_patch(Rectangle(corner, width, height, fill=False, zorder=3, **line))
