"""Pictures of what happened. Colours are Okabe and Ito's, which colour-blind eyes tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spiralrope_cli.core.runtime.report import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def draw_curves(runs: list[Path], target: Path) -> None:
    """The curves of training runs as a .png or .svg file."""
    curves(runs).savefig(target, dpi=150)


def curves(runs: list[Path]) -> Figure:
    """Loss, accuracy or bound, learning rate and speed of training runs against the step.

    Args:
        runs: run folders, one colour each where there are several.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots(2, 2)
    (loss, quality), (rate, speed) = axes
    title = "Held-out acc@1 (%)"
    for number, folder in enumerate(runs):
        lines = read_metrics(folder)
        logged = [line for line in lines if "loss" in line]
        validated = [line for line in lines if "acc1" in line]
        several = len(runs) > 1
        first, second = (COLORS[number % len(COLORS)],) * 2 if several else COLORS[:2]
        prefix = f"{folder.name} " if several else ""
        _plot(loss, logged, "loss", first, prefix + "training")
        _plot(loss, validated, "val_loss", second, prefix + "held out", "--", "o")
        if logged and "vb" in logged[0]:  # diffusion, which validates nothing
            _plot(quality, logged, "vb", first, prefix + "training")
            title = "Variational bound (bits per dimension)"
        _plot(quality, validated, "acc1", first, prefix + "weights", "-", "o")
        _plot(quality, validated, "ema_acc1", second, prefix + "EMA weights", "--", "s")
        _plot(rate, logged, "lr", first, prefix)
        _plot(speed, logged, "images_per_s", first, prefix)
    _finish(loss, "Loss" if "bound" in title else "Loss (nats)", legend=True)
    _finish(quality, title, legend=True)
    _finish(rate, "Learning rate")
    _finish(speed, "Images per second")
    speed.set_ylim(bottom=0)
    figure.suptitle(", ".join(folder.name for folder in runs), fontsize=11)
    return figure


def _plot(
    axis: Any,
    lines: list[dict[str, Any]],
    key: str,
    color: str,
    label: str,
    style: str = "-",
    marker: str = "",
) -> None:
    steps, values = [line["step"] for line in lines], [line[key] for line in lines]
    axis.plot(steps, values, style, color=color, label=label, marker=marker, markersize=3.5)


def _finish(axis: Any, title: str, legend: bool = False) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("step")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if legend:
        axis.legend(frameon=False, fontsize=9)


def draw_sizes(records: list[dict[str, Any]], target: Path) -> None:
    """Accuracy of sets of weights against the image size that they are evaluated at.

    Args:
        records: rows of `eval.json`.
        target: a .png or .svg file.
    """
    from matplotlib.figure import Figure

    named = ("source", "checkpoint", "weights", "scaling", "crop_ratio", "data")
    rows = [{**each, "scaling": each["rope"]["scaling"]} for each in records]
    # What all lines have in common says nothing about one of them.
    telling = [name for name in named if len({row[name] for row in rows}) > 1] or ["weights"]
    lines: dict[str, list[dict[str, Any]]] = {}
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
    _finish(axis, "Held-out acc@1 (%)", legend=True)
    axis.set_xlabel("image size (px)")
    figure.suptitle(f"{rows[0]['arch']} on {Path(rows[0]['data']).name}", fontsize=11)
    figure.savefig(target, dpi=150)


def _side(row: dict[str, Any]) -> float:
    height, width = row["image_size"]
    return float((height * width) ** 0.5)


def _size_words(size: list[int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
