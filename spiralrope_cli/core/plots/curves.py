"""Training curves, accuracy over image size, and the style of all figures.

The colours (Okabe and Ito) are safe for colour-blind readers. Lines also differ in style or marker,
and the brightness of maps increases with the value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from spiralrope_cli.core.config.models import format_size
from spiralrope_cli.core.errors import DataError
from spiralrope_cli.core.runtime.progress import METRICS_FILE, read_metrics
from spiralrope_cli.core.runtime.run_folder import inner_runs
from spiralrope_cli.core.storage import CONFIG_FILE, atomic_write, own_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
COLOR_MAP = "viridis"
HEADING, TITLE, SMALL = 11, 10, 9
"""Font sizes in points: title of the figure, title of a panel, labels."""

DPI = 150

Line = dict[str, Any]


class Series(NamedTuple):
    """One line of a panel: key in the metrics, name in the legend, line style."""

    key: str
    label: str = ""
    style: str = "-"


CURVES = (
    ("Loss", (Series("loss", "training"), Series("val_loss", "validation", "--"))),
    (
        "Validation acc@1 (%)",
        (Series("acc1", "raw weights"), Series("ema_acc1", "EMA weights", "--")),
    ),
    ("FID (EMA weights)", (Series("fid"),)),
    ("Variational bound (bits per dimension)", (Series("vb"),)),
    ("Learning rate", (Series("lr"),)),
    ("Images per second", (Series("images_per_s"),)),
)
NUM_MARKERS = 8
"""Markers per line, to distinguish runs."""


def curves_figure(runs: Sequence[Path], over: str = "step") -> Figure:
    """Loss, accuracy or bound, learning rate and speed of runs, over `step` or `epoch`."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    logs = [read_metrics(folder) for folder in runs]
    for folder, lines in zip(runs, logs, strict=True):
        if not lines:
            message = f"{folder} has no metrics: {METRICS_FILE} is missing or empty"
            kind, takes = own_folder(folder)
            other = f"it is {kind}: {takes}" if kind and not (folder / CONFIG_FILE).exists() else ""
            raise DataError(message, inner_runs(folder) or other)
    logged = {key for lines in logs for line in lines for key in line}
    panels = [(title, [each for each in series if each.key in logged]) for title, series in CURVES]
    panels = [(title, series) for title, series in panels if series]
    columns = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(5 * columns, 6.5), layout="constrained")
    axes = grid_of_axes(figure, len(panels), columns)
    several = len(runs) > 1
    for axis, (title, series) in zip(axes, panels, strict=True):
        for number, lines in enumerate(logs):
            for place, each in enumerate(series):
                look = _look_of_run(number) if several else _look_of_series(place, each.label)
                _plot(axis, lines, each, over, look, shift=number / len(runs))
        style_lines(axis, title, over)
        if len(series) > 1:
            gray = [Line2D([], [], color="0.3", ls=each.style, label=each.label) for each in series]
            axis.legend(handles=gray if several else None, frameon=False, fontsize=SMALL)
        _set_scale(axis, from_zero=series[0].key == "images_per_s")
    names = [folder.name for folder in runs]
    for longer in ([f"{each.parent.name}/{each.name}" for each in runs], list(map(str, runs))):
        if len(set(names)) < len(names):
            names = longer
    if not several:
        figure.suptitle(names[0], fontsize=HEADING)
        return figure
    figure.legend(
        handles=[Line2D([], [], label=name, **_look_of_run(n)) for n, name in enumerate(names)],
        loc="outside lower center",
        ncols=max(1, 100 // (max(map(len, names)) + 8)),
        frameon=False,
        fontsize=TITLE,
    )
    return figure


def _plot(
    axis: Axes, lines: list[Line], series: Series, over: str, look: dict[str, Any], shift: float
) -> None:
    points = [(line[over], line[series.key]) for line in lines if {over, series.key} <= line.keys()]
    if not points:
        return
    if len(points) == 1:  # a line with one point is invisible
        look["marker"] = look["marker"] or "o"
    every = max(1, len(points) // NUM_MARKERS)
    markers = (int(shift * every), every)  # shifted, so that equal lines are both visible
    axis.plot(*zip(*points, strict=True), series.style, markevery=markers, **look)


def _set_scale(axis: Axes, *, from_zero: bool) -> None:
    """Axes that begin at zero where one point by itself has no scale, or where it is wanted."""
    import numpy as np

    if all(np.size(line.get_xdata()) == 1 for line in axis.lines):
        axis.set_xlim(left=0)
        axis.set_ylim(0, 1.1 * axis.dataLim.y1 or 1)
    elif from_zero:
        axis.set_ylim(bottom=0)


def _look_of_run(number: int) -> dict[str, Any]:
    color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
    return {"color": color, "marker": marker, "markersize": 4.5}


def _look_of_series(place: int, label: str) -> dict[str, Any]:
    marker = "o" if place else ""
    return {"color": COLORS[place], "marker": marker, "markersize": 3.5, "label": label}


def sizes_figure(rows: Sequence[Line]) -> Figure:
    """Accuracy over image size, from rows of `eval.json`."""
    from matplotlib.figure import Figure

    rows = [{**row, "scaling": row["rope"]["scaling"]} for row in rows]
    named = ("source", "checkpoint", "weights", "scaling", "crop_ratio", "data")
    # The legend has only what differs between the lines.
    telling = [name for name in named if len({row[name] for row in rows}) > 1] or ["weights"]
    lines: dict[str, list[Line]] = {}
    for row in rows:
        words = (
            f"crop ratio {row[name]:g}" if name == "crop_ratio" else str(row[name])
            for name in telling
        )
        lines.setdefault(", ".join(filter(None, words)), []).append(row)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for number, (label, points) in enumerate(lines.items()):
        points = sorted(points, key=lambda row: _side(row["image_size"]))
        axis.plot(
            [_side(row["image_size"]) for row in points],
            [row["acc1"] for row in points],
            label=label,
            color=COLORS[number % len(COLORS)],
            marker=MARKERS[number % len(MARKERS)],
        )
    for side in {_side(row["trained_size"]) for row in rows}:
        axis.axvline(side, color="0.5", linestyle=":", linewidth=1, zorder=0, label="trained at")
    ticks = {_side(row["image_size"]): row["image_size"] for row in rows}
    axis.set_xticks(list(ticks), list(map(format_size, ticks.values())))
    style_lines(axis, "Validation acc@1 (%)", "image size (px)")
    axis.legend(frameon=False, fontsize=SMALL)
    figure.suptitle(f"{rows[0]['arch']} on {Path(rows[0]['data']).name}", fontsize=HEADING)
    return figure


def _side(size: Sequence[int]) -> float:
    """Side of the square with the same number of pixels."""
    return float(math.prod(size) ** 0.5)


# --- Any figure


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a .png or .svg atomically, and creates its folder; equal figures give equal bytes."""
    import matplotlib

    form = path.suffix.lower().lstrip(".")
    metadata = {"Date": None} if form == "svg" else {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as beside, matplotlib.rc_context({"svg.hashsalt": "spiralrope"}):
            figure.savefig(beside, format=form, dpi=DPI, metadata=metadata)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error


def grid_of_axes(figure: Figure, count: int, columns: int) -> list[Axes]:
    """`count` panels in rows, without empty ones."""
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    axes = list(figure.subplots(math.ceil(count / columns), columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    return axes[:count]


def style_lines(axis: Axes, title: str, xlabel: str) -> None:
    """Title, labels and grid of a panel of lines."""
    from matplotlib.ticker import MaxNLocator

    axis.set_title(title, fontsize=TITLE, loc="left")
    axis.set_xlabel(xlabel)
    if xlabel == "step":
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
