"""What a Spiral RoPE does, read off `core/rope.py` itself.

Legend: D channels of a head, P = D/2 channel pairs, (h, w) the grid of patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spiralrope_cli.core.config.plots import RopePlot
from spiralrope_cli.core.config.rope import RopeConfig
from spiralrope_cli.core.plots.style import (
    COLOR_MAP,
    COLORS,
    MARKERS,
    SMALL,
    TITLE,
    color_bar,
    finish,
    grid_of_axes,
)
from spiralrope_cli.core.rope import SpiralRoPE, leaves_grid, pair_layout, projections

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LABELS = 4
"""Directions per half of the head that are each written at their arrow or below their column."""


@dataclass(frozen=True)
class Measured:
    """What is drawn of one set of options.

    Attributes:
        config: the options.
        frequency: [P] radians per patch.
        turn: [P] degrees by which a pair's axes are turned.
        first_half: [P] bool, True where a pair follows the turned row axis.
        across: [P] patches along a pair's direction per column to the right.
        down: [P] the same per row downwards.
        clamped: [h, w] share of the channels whose position leaves the grid.
        scores: [h, w] of the centre's query with every patch's key.
    """

    config: RopeConfig
    frequency: Tensor
    turn: Tensor
    first_half: Tensor
    across: Tensor
    down: Tensor
    clamped: Tensor
    scores: Tensor

    @property
    def turns(self) -> list[float]:
        """Every turn once, in degrees."""
        return sorted(set(self.turn.tolist()))

    @property
    def labelled(self) -> list[float]:
        """Those of them that are written."""
        return self.turns[:: math.ceil(len(self.turns) / MOST_LABELS)]

    @property
    def apart(self) -> float:
        """Degrees between neighbouring directions."""
        return 180 / self.config.num_directions


def rope(plot: RopePlot) -> Figure:
    """Directions, frequencies, the clamp's reach and the scores of a query in the centre.

    One set of options has a panel each; several have a row each, or stand side by side where
    there is one panel.

    Raises:
        ConfigError: a head size that does not fit the options.
    """
    from matplotlib.figure import Figure

    found = [measure(config, plot) for config in plot.ropes]
    cells = [(each, panel) for each in found for panel in plot.panels]
    columns = len(plot.panels) if len(found) > 1 else math.ceil(len(cells) ** 0.5)
    if len(plot.panels) == 1:
        columns = min(len(found), 4)
    rows = math.ceil(len(cells) / columns)
    figure = Figure(figsize=(4.6 * columns, 4.2 * rows), layout="constrained")
    axes = grid_of_axes(figure, len(cells), columns)
    for axis, (each, panel) in zip(axes, cells, strict=True):
        PANELS[panel](axis, each, plot, found)
    return figure


def measure(config: RopeConfig, plot: RopePlot) -> Measured:
    """What one set of options does."""
    frequency, angle, first_half = pair_layout(config, plot.head_dim)
    # One step to the right and one step down from the middle of three by three patches.
    row_half, column_half = projections((3, 3), angle)
    across, down = (torch.where(first_half, row_half[n], column_half[n]) for n in (5, 7))
    return Measured(
        config=config,
        frequency=frequency,
        turn=(angle * 180 / math.pi).round(decimals=6),
        first_half=first_half,
        across=across,
        down=down,
        clamped=leaves_grid(plot.grid, config, plot.head_dim).double().mean(1).view(plot.grid),
        scores=centre_scores(config, plot),
    )


def centre_scores(config: RopeConfig, plot: RopePlot) -> Tensor:
    """[h, w] scores of a query in the centre with every key, all of equal content.

    q and k are all ones, so a score is the mean cosine of the differences of their phases: 1
    where nothing is turned.
    """
    embedding = SpiralRoPE(plot.head_dim, config, plot.pretrain_grid)
    rows, columns = plot.grid
    tokens = torch.ones(1, 1, rows * columns, plot.head_dim)
    turned = embedding(tokens, plot.grid)[0, 0]
    scores = turned @ turned[rows // 2 * columns + columns // 2] / plot.head_dim
    return scores.view(plot.grid)


def _draw_rose(axis: Axes, each: Measured, plot: RopePlot, found: list[Measured]) -> None:
    counts = []
    for number, turn in enumerate(each.turns):
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        for first, style, face in ((True, "-", color), (False, "--", "white")):
            mine = (each.turn == turn) & (each.first_half == first)
            if not mine.any():
                continue
            counts.append(2 * int(mine.sum()))
            x, y = (float(along[mine][0]) for along in (each.across, each.down))
            axis.plot([-x, 0], [-y, 0], style, color=color, linewidth=0.8, alpha=0.4)
            axis.plot([0, x], [0, y], style, color=color, linewidth=2)
            axis.plot(x, y, marker, color=color, markersize=6, markerfacecolor=face)
            if turn in each.labelled:
                side = "left" if x > 0.3 else "center"
                axis.text(1.1 * x, 1.14 * y, f"{turn:.4g}°", ha=side, va="center", fontsize=SMALL)
    axis.set(xlim=(-1.45, 1.45), ylim=(1.45, -1.45), aspect="equal", xticks=[], yticks=[])
    axis.set_xlabel("columns →\nsolid: row half of a head, dashed: column half")
    axis.set_ylabel("← rows")
    axis.spines[:].set_color("0.8")
    channels = " to ".join(map(str, sorted({min(counts), max(counts)})))
    _title(axis, each, f"{len(counts)} directions, {channels} channels each")


def _draw_frequencies(axis: Axes, each: Measured, plot: RopePlot, found: list[Measured]) -> None:
    turning = each.frequency > 0
    unturned = float(each.frequency[turning].min()) / 3
    height = torch.where(turning, each.frequency, unturned)
    for number, turn in enumerate(each.turns):
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        for first, shift, face in ((True, -0.15, color), (False, 0.15, "white")):
            mine = (each.turn == turn) & (each.first_half == first)
            place = turn + shift * each.apart
            seen, zero = (height[mine & part].numpy() for part in (turning, ~turning))
            axis.plot([place] * len(seen), seen, marker, color=color, ms=5, markerfacecolor=face)
            axis.plot([place] * len(zero), zero, "x", color=color, ms=5)
    axis.set_yscale("log")
    if not turning.all():
        axis.axhline(unturned * 1.7, color="0.5", linewidth=0.8)
    side = max(plot.pretrain_grid)
    axis.axhline(2 * math.pi / side, color="0.3", linestyle=":", linewidth=1.2, zorder=0)
    axis.set(xlim=(-each.apart / 2, 90 - each.apart / 2), ylabel="radians per patch")
    axis.set_xticks(each.labelled, [f"{turn:.4g}°" for turn in each.labelled])
    axis.set_box_aspect(1)
    zeros = "" if turning.all() else "; ×: not turned"
    halves = f"filled: row half, open: column half{zeros}"
    finish(axis, "", f"turn of the axes (dotted: one turn in {side} patches)\n{halves}")
    other = axis.secondary_yaxis("right", functions=(_inverse, _inverse))
    other.set_ylabel("wavelength (patches)")
    count = len(set(each.frequency[turning].tolist()))
    _title(axis, each, f"{count} frequencies up to {each.frequency.max():.3g}")


def _inverse(values: Any) -> Any:
    """Radians per patch to patches per turn, and back."""
    import numpy as np

    with np.errstate(divide="ignore"):
        return 2 * math.pi / np.asarray(values, dtype=float)


def _draw_clamp(axis: Axes, each: Measured, plot: RopePlot, found: list[Measured]) -> None:
    highest = 100 * max(float(other.clamped.max()) for other in found)
    image = axis.imshow(100 * each.clamped.numpy(), cmap=COLOR_MAP, vmin=0, vmax=highest or 1)
    color_bar(axis, image, "% of the channels")
    axis.set(xlabel="column", ylabel="row")
    if not each.clamped.any():
        middle: dict[str, Any] = {"transform": axis.transAxes, "ha": "center", "va": "center"}
        axis.text(0.5, 0.5, "no patch", color="white", **middle)
    exact = each.config.projection == "exact"
    _title(axis, each, "positions beyond the grid" if exact else "positions the clamp moves")


def _draw_score(axis: Axes, each: Measured, plot: RopePlot, found: list[Measured]) -> None:
    lowest = min(float(other.scores.min()) for other in found)
    rows, columns = plot.grid
    top, left = -(rows // 2) - 0.5, -(columns // 2) - 0.5
    extent = (left, left + columns, top + rows, top)
    image = axis.imshow(
        each.scores.numpy(), cmap=COLOR_MAP, vmin=min(lowest, 0.99), vmax=1, extent=extent
    )
    color_bar(axis, image, "mean cosine")
    axis.plot(0, 0, "x", color="black", markersize=7)
    axis.set(xlabel="columns from the query", ylabel="rows from the query")
    _title(axis, each, "score of a query in the centre")


def _title(axis: Axes, each: Measured, text: str) -> None:
    axis.set_title(f"rotate {each.config.rotate}: {text}", fontsize=TITLE, loc="left")


PANELS = {
    "rose": _draw_rose,
    "frequencies": _draw_frequencies,
    "clamp": _draw_clamp,
    "score": _draw_score,
}
