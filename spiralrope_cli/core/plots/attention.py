"""Where a token looks: attention maps over the picture, one per head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spiralrope_cli.core.plots.style import COLOR_MAP, SMALL, grid_of_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = 1.9
"""Side of a panel in inches."""

MOST_COLUMNS = 5
"""Panels beside each other where one layer is drawn; several layers have a row each."""

OPACITY = 0.65
DIMMED = 160
"""Levels that black and white move towards each other below a map, whose brightness counts."""


def attention(
    picture: np.ndarray,
    maps: np.ndarray,
    *,
    grid: tuple[int, int],
    layers: Sequence[int],
    heads: Sequence[int],
    patch: tuple[int, int] | None,
    title: str,
) -> Figure:
    """The picture, and over it what each head of each layer attends to.

    Args:
        picture: [height, width] grey or [height, width, 3], uint8.
        maps: [layers, heads, 1 + h*w] attention to the class token and to the patches.
        grid: patches as (rows, columns).
        layers: their numbers.
        heads: their numbers; of several the mean is drawn too.
        patch: (row, column) of the query, None for the class token.
        title: above all.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    names = [f"head {head}" for head in heads]
    if len(heads) > 1:
        maps, names = np.concatenate((maps, maps.mean(1, keepdims=True)), axis=1), [*names, "mean"]
    cells = len(layers) * (1 + len(names))
    columns = 1 + len(names) if len(layers) > 1 else min(MOST_COLUMNS, cells)
    rows, shape = -(-cells // columns), picture.shape[0] / picture.shape[1]
    height = rows * (PANEL * shape + 0.4) + 0.5
    figure = Figure(figsize=(PANEL * columns + 0.8, height), layout="constrained")
    axes = grid_of_axes(figure, cells, columns)
    panels = iter(axes)
    for layer, of_layer in zip(layers, maps, strict=True):
        axis = next(panels)
        _show(axis, picture, patch, grid, dimmed=False)
        axis.set_title(f"layer {layer}\n", fontsize=SMALL)
        for name, row in zip(names, of_layer, strict=True):
            axis = next(panels)
            _show(axis, picture, patch, grid, dimmed=True)
            extent = (0, picture.shape[1], picture.shape[0], 0)
            looks: dict[str, Any] = {
                "cmap": COLOR_MAP,
                "vmin": 0,
                "alpha": OPACITY,
                "extent": extent,
            }
            axis.imshow(row[1:].reshape(grid), interpolation="nearest", **looks)
            told = f"{name}\nmax {100 * row[1:].max():.2g} %, class {100 * row[0]:.2g} %"
            axis.set_title(told, fontsize=SMALL)
    bar = figure.colorbar(
        ScalarMappable(cmap=COLOR_MAP), ax=axes, shrink=0.6 if rows > 1 else 1, aspect=25
    )
    bar.set_ticks([0, 1], labels=["0", "max"])
    bar.set_label("attention to a patch", fontsize=SMALL)
    figure.suptitle(title, fontsize=11)
    return figure


def _show(
    axis: Axes,
    picture: np.ndarray,
    patch: tuple[int, int] | None,
    grid: tuple[int, int],
    *,
    dimmed: bool,
) -> None:
    from matplotlib.patches import Rectangle

    height, width = picture.shape[:2]
    grey = dimmed and picture.ndim == 3
    shown, dim = picture.mean(-1) if grey else picture, DIMMED if dimmed else 0
    extent = (0, width, height, 0)
    axis.imshow(shown, cmap="gray", vmin=-dim, vmax=255 + dim, extent=extent)
    axis.set(xticks=[], yticks=[])
    if patch is None:
        return
    tall, wide = height / grid[0], width / grid[1]
    place = (patch[1] * wide, patch[0] * tall)
    for color, style in (("white", "-"), ("black", "--")):
        box: dict[str, Any] = {
            "fill": False,
            "edgecolor": color,
            "linestyle": style,
            "linewidth": 1.8,
            "zorder": 3,
        }
        axis.add_patch(Rectangle(place, wide, tall, **box))
