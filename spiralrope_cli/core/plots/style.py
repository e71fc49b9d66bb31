"""How all figures look, and how they become files or drawings inside a page.

Colours are Okabe and Ito's, which colour-blind eyes tell apart. Nothing is told by colour alone:
lines differ in style or marker too, and maps grow brighter with their values.
"""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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


class Drawing(NamedTuple):
    """One axis of a figure, to be an `<svg>` element of a page.

    Attributes:
        view_box: of the element.
        label: what it shows, in words.
        inside: what stands in the element, as SVG; its lines and words have the colour of the text
            around it.
    """

    view_box: str
    label: str
    inside: str


def drawings(figure: Figure, name: str) -> list[Drawing]:
    """The axes of a figure, each one a drawing of its own.

    Side by side where there is room and below each other on a phone, so that their words stay
    large enough to read.

    Args:
        figure: as the functions that draw make it; it is of no use afterwards.
        name: different for each figure of a page.
    """
    import matplotlib

    name = name.encode().hex()  # what it holds may not be part of an element's name
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for of_all in (*figure.texts, *figure.legends):
        of_all.set_visible(False)
    drawn = []
    for number, axis in enumerate(figure.axes):
        for other in figure.axes:
            other.set_visible(other is axis)
        around = axis.get_tightbbox()  # of what is visible
        box = around.padded(4).transformed(figure.dpi_scale_trans.inverted()) if around else None
        sink = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
            figure.savefig(
                sink, format="svg", transparent=True, bbox_inches=box, metadata={"Date": None}
            )
        title = axis.get_title("left") or axis.get_title()
        label = " against ".join(word for word in (title, axis.get_xlabel()) if word)
        view_box, inside = _inside(sink.getvalue(), f"d{name}-{number}")
        drawn.append(Drawing(view_box, label, inside))
    return drawn


def _inside(svg: str, prefix: str) -> tuple[str, str]:
    """View box and content of an SVG file: no names in common with others, black is the ink."""
    [(view_box, svg)] = re.findall(r'<svg[^>]* viewBox="([^"]*)"[^>]*>(.*)</svg>', svg, re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", svg.replace("xlink:href", "href"))
    return view_box, svg.replace("stroke: #000000", "stroke: currentColor").strip()


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
