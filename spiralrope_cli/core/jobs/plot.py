"""Pictures of runs, of evaluations, and of what a Spiral RoPE does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spiralrope_cli.core.config.plots import RopePlot
from spiralrope_cli.core.figures.curves import curves, sizes
from spiralrope_cli.core.figures.style import save


def draw_curves(runs: Sequence[Path], target: Path, over: str = "step") -> None:
    """Loss, accuracy or bound, learning rate and speed of training runs, as a .png or .svg."""
    save(curves(runs, over), target)


def draw_sizes(records: list[dict[str, Any]], target: Path) -> None:
    """Accuracy against the image size, from rows of `eval.json`, as a .png or .svg."""
    save(sizes(records), target)


def draw_rope(plot: RopePlot, target: Path) -> None:
    """Directions, frequencies, the clamp's reach and centre scores, as a .png or .svg."""
    from spiralrope_cli.core.figures.rope import rope  # curves come without torch

    save(rope(plot), target)
