"""What happened in training runs, and accuracy against the image size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from spiralrope_cli.core.errors import DataError
from spiralrope_cli.core.plots.style import (
    COLORS,
    MARKERS,
    SMALL,
    TITLE,
    finish,
    grid_of_axes,
    save,
)
from spiralrope_cli.core.runtime.progress import METRICS_FILE, read_metrics
from spiralrope_cli.core.runtime.run_folder import inner_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Line = dict[str, Any]


class Series(NamedTuple):
    """One figure of a run: its key in the metrics, what it is of, and its line style."""

    key: str
    label: str = ""
    style: str = "-"


PANELS = (
    ("Loss", (Series("loss", "training"), Series("val_loss", "held out", "--"))),
    (
        "Held-out acc@1 (%)",
        (Series("acc1", "weights"), Series("ema_acc1", "EMA weights", "--")),
    ),
    ("Variational bound (bits per dimension)", (Series("vb"),)),
    ("Learning rate", (Series("lr"),)),
    ("Images per second", (Series("images_per_s"),)),
)
NUM_MARKERS = 8
"""On one line, where markers tell the runs apart."""


def draw_curves(runs: Sequence[Path], target: Path, over: str = "step") -> None:
    """Loss, accuracy or bound, learning rate and speed of training runs, as a .png or .svg."""
    save(curves(runs, over), target)


def curves(runs: Sequence[Path], over: str = "step") -> Figure:
    """Loss, accuracy or bound, learning rate and speed of training runs.

    Args:
        runs: run folders; several share the panels, and have a legend.
        over: `step` or `epoch`, the horizontal axis.

    Raises:
        DataError: a run that has logged nothing.
    """
    from matplotlib.figure import Figure

    logs = {folder: read_metrics(folder) for folder in runs}
    for folder, lines in logs.items():
        if not lines:
            raise DataError(
                f"{folder} has logged nothing: {METRICS_FILE} is missing or empty",
                inner_runs(folder),
            )
    logged = {key for lines in logs.values() for line in lines for key in line}
    panels = [(title, [s for s in all_of if s.key in logged]) for title, all_of in PANELS]
    panels = [(title, series) for title, series in panels if series]
    columns = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(5 * columns, 6.5), layout="constrained")
    axes = grid_of_axes(figure, len(panels), columns)
    for axis, (title, series) in zip(axes, panels, strict=True):
        for number, lines in enumerate(logs.values()):
            for place, each in enumerate(series):
                looks = _looks(number, place, several=len(logs) > 1)
                _plot(axis, lines, each, over, looks, shift=number / len(logs))
        finish(axis, title, over)
        if len(series) > 1:
            _legend_of_series(axis, series, several=len(logs) > 1)
        if series[0].key == "images_per_s":
            axis.set_ylim(bottom=0)
    _name_runs(figure, list(logs))
    return figure


def _looks(number: int, place: int, *, several: bool) -> dict[str, Any]:
    """Colour and marker: by run where there are several, else by series."""
    if several:
        marker = MARKERS[number % len(MARKERS)]
        return {"color": COLORS[number % len(COLORS)], "marker": marker, "markersize": 4.5}
    return {"color": COLORS[place], "marker": "o" if place else "", "markersize": 3.5}


def _plot(
    axis: Axes,
    lines: list[Line],
    series: Series,
    over: str,
    looks: dict[str, Any],
    shift: float,
) -> None:
    points = [(line[over], line[series.key]) for line in lines if {over, series.key} <= line.keys()]
    if not points:
        return
    if len(points) == 1:  # a line of one point would not be seen
        looks = {**looks, "marker": looks["marker"] or "o"}
    every = max(1, len(points) // NUM_MARKERS)
    marked = (int(shift * every), every)  # side by side where lines lie upon each other
    axis.plot(*zip(*points, strict=True), series.style, markevery=marked, **looks)


def _legend_of_series(axis: Axes, series: list[Series], *, several: bool) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for place, each in enumerate(series):
        looks = {"color": "0.3"} if several else _looks(0, place, several=False)
        looks.update(linestyle=each.style, label=each.label)
        handles.append(Line2D([], [], **looks))
    axis.legend(handles=handles, frameon=False, fontsize=SMALL)


def _name_runs(figure: Figure, runs: list[Path]) -> None:
    from matplotlib.lines import Line2D

    names = [folder.name for folder in runs]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in runs]
    if len(runs) == 1:
        figure.suptitle(names[0], fontsize=11)
        return
    handles = [
        Line2D([], [], label=name, **_looks(number, 0, several=True))
        for number, name in enumerate(names)
    ]
    columns = max(1, 100 // (max(map(len, names)) + 8))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=TITLE
    )


def sizes(records: list[Line]) -> Figure:
    """Accuracy of sets of weights against the image size that they are evaluated at.

    Args:
        records: rows of `eval.json`.
    """
    from matplotlib.figure import Figure

    named = ("source", "checkpoint", "weights", "scaling", "crop_ratio", "data")
    rows = [{**each, "scaling": each["rope"]["scaling"]} for each in records]
    # What all lines have in common says nothing about one of them.
    telling = [name for name in named if len({row[name] for row in rows}) > 1] or ["weights"]
    lines: dict[str, list[Line]] = {}
    for row in rows:
        words = (
            f"crop ratio {row[name]:g}" if name == "crop_ratio" else str(row[name])
            for name in telling
        )
        lines.setdefault(", ".join(word for word in words if word), []).append(row)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for number, (label, points) in enumerate(lines.items()):
        points = sorted(points, key=_side)
        axis.plot(
            [_side(row) for row in points],
            [row["acc1"] for row in points],
            label=label,
            color=COLORS[number % len(COLORS)],
            marker=MARKERS[number % len(MARKERS)],
        )
    for side in {_side({"image_size": row["trained_size"]}) for row in rows}:
        axis.axvline(side, color="0.5", linestyle=":", linewidth=1, zorder=0, label="trained at")
    ticks = {_side(row): row["image_size"] for row in rows}
    axis.set_xticks(list(ticks), [_size_words(size) for size in ticks.values()])
    finish(axis, "Held-out acc@1 (%)", "image size (px)", legend=True)
    figure.suptitle(f"{rows[0]['arch']} on {Path(rows[0]['data']).name}", fontsize=11)
    return figure


def _side(row: Line) -> float:
    height, width = row["image_size"]
    return float((height * width) ** 0.5)


def _size_words(size: list[int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
