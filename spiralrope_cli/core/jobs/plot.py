"""Pictures of what happened. Colours are Okabe and Ito's, which colour-blind eyes tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spiralrope_cli.core.runtime.report import read_metrics

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def draw_curves(runs: list[Path], target: Path) -> None:
    """Loss, accuracy or bound, learning rate and speed of training runs against the step.

    Args:
        runs: run folders, one colour each where there are several.
        target: a .png or .svg file.
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
    figure.savefig(target, dpi=150)


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
