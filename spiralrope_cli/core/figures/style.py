"""How all figures look, and how they become files.

Colours are Okabe and Ito's, which colour-blind eyes tell apart. Nothing is told by colour alone:
lines differ in style or marker too, and maps grow brighter with their values.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spiralrope_cli.core.atomic import write_whole
from spiralrope_cli.core.config.plots import FORMATS
from spiralrope_cli.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
COLOR_MAP = "viridis"
TITLE, SMALL = 10, 9
"""Font sizes in points."""

DPI = 150


def render(figure: Figure, form: str) -> bytes:
    """The figure as the content of a `png` or `svg` file; equal figures give equal bytes."""
    import matplotlib

    sink = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "spiralrope"}):
        figure.savefig(sink, format=form, dpi=DPI, metadata=metadata)
    return sink.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Writes a figure in one piece.

    Args:
        figure: any.
        path: ends in .png or .svg; its folder is made.

    Raises:
        ConfigError: another suffix.
        DataError: it cannot be written.
    """
    form = path.suffix.lower().lstrip(".")
    if form not in FORMATS:
        raise ConfigError(f"{path} must end in {' or '.join('.' + name for name in FORMATS)}")
    content = render(figure, form)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error


def grid_of_axes(figure: Figure, count: int, columns: int) -> list[Axes]:
    """So many panels in rows, with some air between them; no empty one is left over."""
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    axes = list(figure.subplots(math.ceil(count / columns), columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    return axes[:count]


def finish(axis: Axes, title: str, xlabel: str, *, legend: bool = False) -> None:
    """Title, grid lines and legend of a panel of lines."""
    from matplotlib.ticker import MaxNLocator

    axis.set_title(title, fontsize=TITLE, loc="left")
    axis.set_xlabel(xlabel)
    if xlabel == "step":
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if legend:
        axis.legend(frameon=False, fontsize=SMALL)


def color_bar(axis: Axes, image: Any, label: str) -> None:
    """The scale of a map as high as the map; whole patches are counted at its sides."""
    from matplotlib.ticker import MaxNLocator

    axis.figure.colorbar(image, cax=axis.inset_axes((1.03, 0, 0.05, 1)), label=label)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator("auto", integer=True))
