"""Style of all figures, and saving.

The colours (Okabe and Ito) are safe for colour-blind readers. Lines also differ in style or marker,
and the brightness of maps increases with the value.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from spiralrope_cli.core.config.plots import FORMATS
from spiralrope_cli.core.errors import ConfigError, DataError
from spiralrope_cli.core.storage import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
COLOR_MAP = "viridis"
HEADING, TITLE, SMALL = 11, 10, 9
"""Font sizes in points: title of the figure, title of a panel, labels."""

DPI = 150


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a .png or .svg atomically, and creates its folder; equal figures give equal bytes."""
    import matplotlib

    form = path.suffix.lower().lstrip(".")
    if form not in FORMATS:
        raise ConfigError(f"{path} must end in {' or '.join('.' + name for name in FORMATS)}")
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
