"""Figures of Spiral RoPE, computed by `core/rope.py`.

Legend: D channels of a head, P = D/2 channel pairs, (h, w) the grid of patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spiralrope_cli.core.config.models import RopeConfig
from spiralrope_cli.core.config.plots import RopePlot
from spiralrope_cli.core.plots.curves import (
    COLOR_MAP,
    COLORS,
    MARKERS,
    SMALL,
    TITLE,
    grid_of_axes,
    style_lines,
)
from spiralrope_cli.core.rope import SpiralRoPE, leaves_grid, mixed_angles, pair_layout, projections

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LABELS = 4
"""Labelled directions per half of the head."""


@dataclass(frozen=True)
class RopeView:
    """What is drawn for one set of options; where frequencies are learned, P has all heads."""

    config: RopeConfig
    frequency: Tensor  # [P] radians per patch
    angle: Tensor  # [P] degrees between the axes of a pair and those of the grid
    first_half: Tensor  # [P] bool, True for pairs along the rotated row axis
    across: Tensor  # [P] change of position per column to the right, in patches
    down: Tensor  # [P] change of position per row downwards, in patches
    clamped: Tensor  # [h, w] fraction of the channels whose position is outside the grid
    scores: Tensor  # [h, w] scores of the query in the centre with each key
    head: Tensor | None = None  # [P] the head of each pair, where frequencies are learned

    @property
    def angles(self) -> list[float]:
        """Distinct angles, ascending."""
        return sorted(set(self.angle.tolist()))

    @property
    def labelled(self) -> list[float]:
        """Angles with a label."""
        return self.angles[:: math.ceil(len(self.angles) / MOST_LABELS)]


def rope_figure(plot: RopePlot, freqs: Tensor | None = None) -> Figure:
    """Directions, frequencies, clamped positions, and scores of a query in the centre.

    Several sets of options have a row each; with one panel they are side by side. `freqs` are the
    learned frequencies of one layer, [2, H, D/2].
    """
    from matplotlib.figure import Figure

    views = [view_of(config, plot) for config in plot.ropes if freqs is None]
    views += [] if freqs is None else [mixed_view(freqs, plot)]
    cells = [(view, panel) for view in views for panel in plot.panels]
    columns = len(plot.panels) if len(views) > 1 else math.ceil(len(cells) ** 0.5)
    if len(plot.panels) == 1:
        columns = min(len(views), 4)
    rows = math.ceil(len(cells) / columns)
    figure = Figure(figsize=(4.6 * columns, 4.2 * rows), layout="constrained")
    for axis, (view, panel) in zip(grid_of_axes(figure, len(cells), columns), cells, strict=True):
        title = DRAW[panel](axis, view, plot, views)
        axis.set_title(f"{view.config.name}: {title}", fontsize=TITLE, loc="left")
    return figure


def view_of(config: RopeConfig, plot: RopePlot) -> RopeView:
    """The view of one set of options."""
    frequency, angle, first_half = pair_layout(config, plot.head_dim)
    # One patch to the right (5) and one patch down (7) from the centre of a 3x3 grid.
    row_half, column_half = projections((3, 3), angle)
    across, down = (torch.where(first_half, row_half[n], column_half[n]) for n in (5, 7))
    return RopeView(
        config=config,
        frequency=frequency,
        angle=(angle * 180 / math.pi).round(decimals=6),
        first_half=first_half,
        across=across,
        down=down,
        clamped=leaves_grid(plot.grid, config, plot.head_dim).double().mean(1).view(plot.grid),
        scores=centre_scores(config, plot),
    )


def mixed_view(freqs: Tensor, plot: RopePlot) -> RopeView:
    """The view of learned frequencies [2, H, D/2] of one layer: all pairs of all its heads."""
    (x, y), (_, heads, pairs) = freqs.flatten(1), freqs.shape
    frequency = torch.hypot(x, y)
    angle = mixed_angles(freqs[:, None], plot.grid, plot.ropes[0], plot.pretrain_grid)[0]
    rows, columns = plot.grid
    scores = (angle - angle[rows // 2 * columns + columns // 2]).cos().mean((1, 2))
    return RopeView(
        config=plot.ropes[0],
        frequency=frequency,
        angle=torch.atan2(-y, x).rad2deg() % 180,
        first_half=torch.zeros_like(x, dtype=torch.bool),
        across=x / frequency,
        down=y / frequency,
        clamped=torch.zeros(plot.grid),
        scores=scores.view(plot.grid),
        head=torch.arange(heads).repeat_interleave(pairs),
    )


def centre_scores(config: RopeConfig, plot: RopePlot) -> Tensor:
    """[h, w] scores of a query in the centre with each key, for equal content.

    q and k are all ones: a score is the mean cosine of the phase differences, 1 without rotation.
    """
    embedding = SpiralRoPE(plot.head_dim, config, plot.pretrain_grid)
    rows, columns = plot.grid
    rotated = embedding(torch.ones(1, 1, rows * columns, plot.head_dim), plot.grid)[0, 0]
    scores = rotated @ rotated[rows // 2 * columns + columns // 2] / plot.head_dim
    return scores.view(plot.grid)


# --- Panels: each draws into its axis and returns the title.


def _draw_rose(axis: Axes, view: RopeView, plot: RopePlot, views: list[RopeView]) -> str:
    if view.head is not None:
        return _draw_heads(axis, view, view.frequency * view.across, view.frequency * view.down)
    counts = []
    for number, angle in enumerate(view.angles):
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        for first, style, face in ((True, "-", color), (False, "--", "white")):
            mine = (view.angle == angle) & (view.first_half == first)
            if not mine.any():
                continue
            counts.append(2 * int(mine.sum()))
            x, y = float(view.across[mine][0]), float(view.down[mine][0])
            axis.plot([-x, 0], [-y, 0], style, color=color, linewidth=0.8, alpha=0.4)
            axis.plot([0, x], [0, y], style, color=color, linewidth=2)
            axis.plot(x, y, marker, color=color, markersize=6, markerfacecolor=face)
            if angle in view.labelled:
                side = "left" if x > 0.3 else "center"
                degrees = round(math.degrees(math.atan2(-y, x)), 6) % 180  # from the columns' axis
                place = (1.1 * x, 1.14 * y, f"{degrees:.4g}°")
                axis.text(*place, ha=side, va="center", fontsize=SMALL)
    axis.set(xlim=(-1.45, 1.45), ylim=(1.45, -1.45), aspect="equal", xticks=[], yticks=[])
    axis.set_xlabel("columns →\nsolid: row half of a head, dashed: column half")
    axis.set_ylabel("← rows")
    axis.spines[:].set_color("0.8")
    channels = " to ".join(map(str, sorted({min(counts), max(counts)})))
    return f"{len(counts)} directions, {channels} channels each"


def _draw_heads(axis: Axes, view: RopeView, x: Tensor, y: Tensor) -> str:
    """The frequency vector of each pair, in the colour of its head."""
    for number in view.head.unique().tolist() if view.head is not None else ():
        mine, color = view.head == number, COLORS[number % len(COLORS)]
        axis.plot(x[mine], y[mine], MARKERS[number % len(MARKERS)], color=color, ms=4, alpha=0.8)
    most = 1.1 * float(torch.maximum(x.abs(), y.abs()).max())
    axis.set(xlim=(-most, most), ylim=(most, -most), aspect="equal")
    axis.set(xlabel="radians per column", ylabel="radians per row")
    axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axis.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    return "frequencies, a colour per head"


def _draw_frequencies(axis: Axes, view: RopeView, plot: RopePlot, views: list[RopeView]) -> str:
    if view.head is not None:
        return _draw_spectrum(axis, view, plot)
    rotated = view.frequency > 0
    # A logarithmic axis has no zero: channels without rotation are drawn below a line.
    below = float(view.frequency[rotated].min()) / 3
    height = torch.where(rotated, view.frequency, below)
    apart = 180 / view.config.num_directions
    for number, angle in enumerate(view.angles):
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        for first, shift, face in ((True, -0.15, color), (False, 0.15, "white")):
            mine = (view.angle == angle) & (view.first_half == first)
            place = angle + shift * apart
            dots, crosses = (height[mine & part].numpy() for part in (rotated, ~rotated))
            axis.plot([place] * len(dots), dots, marker, color=color, ms=5, markerfacecolor=face)
            axis.plot([place] * len(crosses), crosses, "x", color=color, ms=5)
    if not rotated.all():
        axis.axhline(below * 1.7, color="0.5", linewidth=0.8)
    axis.set_xlim(-apart / 2, 90 - apart / 2)
    axis.set_xticks(view.labelled, [f"{angle:.4g}°" for angle in view.labelled])
    zeros = "" if rotated.all() else "; ×: not rotated"
    halves = f"\nfilled: row half, open: column half{zeros}"
    _style_frequencies(axis, plot, "angle of the axes", halves)
    count = len(set(view.frequency[rotated].tolist()))
    return f"{count} frequencies up to {view.frequency.max():.3g}"


def _draw_spectrum(axis: Axes, view: RopeView, plot: RopePlot) -> str:
    """The frequencies of each head, from the highest."""
    for number in view.head.unique().tolist() if view.head is not None else ():
        falling = view.frequency[view.head == number].sort(descending=True).values
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        axis.plot(falling, marker, color=color, ms=4, alpha=0.8)
    _style_frequencies(axis, plot, "pair of a head")
    return f"{view.frequency.min():.2g} to {view.frequency.max():.3g}"


def _style_frequencies(axis: Axes, plot: RopePlot, xlabel: str, more: str = "") -> None:
    """A logarithmic axis of frequencies, and one of wavelengths on its right."""
    side = max(plot.pretrain_grid)
    axis.axhline(2 * math.pi / side, color="0.3", linestyle=":", linewidth=1.2, zorder=0)
    axis.set(yscale="log", ylabel="radians per patch")
    axis.set_box_aspect(1)
    style_lines(axis, "", f"{xlabel} (dotted: one period in {side} patches){more}")
    other = axis.secondary_yaxis("right", functions=(_wavelength, _wavelength))
    other.set_ylabel("wavelength (patches)")


def _wavelength(frequency: Any) -> Any:
    """Radians per patch -> patches per period, and the inverse."""
    import numpy as np

    with np.errstate(divide="ignore"):
        return 2 * math.pi / np.asarray(frequency, dtype=float)


def _draw_clamp(axis: Axes, view: RopeView, plot: RopePlot, views: list[RopeView]) -> str:
    highest = 100 * max(float(each.clamped.max()) for each in views)
    image = axis.imshow(100 * view.clamped.numpy(), cmap=COLOR_MAP, vmin=0, vmax=highest or 1)
    _add_color_bar(axis, image, "% of the channels")
    axis.set(xlabel="column", ylabel="row")
    if not view.clamped.any():
        middle: dict[str, Any] = {"transform": axis.transAxes, "ha": "center", "va": "center"}
        axis.text(0.5, 0.5, "no patch", color="white", **middle)
    exact = view.config.projection == "exact"
    return "positions outside the grid" if exact else "clamped positions"


def _draw_score(axis: Axes, view: RopeView, plot: RopePlot, views: list[RopeView]) -> str:
    lowest = min(float(each.scores.min()) for each in views)
    rows, columns = plot.grid
    top, left = -(rows // 2) - 0.5, -(columns // 2) - 0.5
    image = axis.imshow(
        view.scores.numpy(),
        cmap=COLOR_MAP,
        vmin=min(lowest, 0.99),
        vmax=1,
        extent=(left, left + columns, top + rows, top),
    )
    _add_color_bar(axis, image, "mean cosine")
    axis.plot(0, 0, "x", color="black", markersize=7)
    axis.set(xlabel="columns from the query", ylabel="rows from the query")
    return "score of a query in the centre"


def _add_color_bar(axis: Axes, image: Any, label: str) -> None:
    """A color bar as high as the map, and integer ticks on both axes."""
    from matplotlib.ticker import MaxNLocator

    axis.figure.colorbar(image, cax=axis.inset_axes((1.03, 0, 0.05, 1)), label=label)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator("auto", integer=True))


DRAW = {
    "rose": _draw_rose,
    "frequencies": _draw_frequencies,
    "clamp": _draw_clamp,
    "score": _draw_score,
}
