"""Images and drawings inside a page, which loads nothing from elsewhere."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST_IMAGE = 1_500_000
"""Bytes of an image that goes in as it is; a larger one is made smaller."""
IMAGE_SIDE = 1600
JPEG_QUALITY = 85


def data_url(path: Path) -> str:
    """An address that holds an image; a large one is made smaller first."""
    kind, content = "png", path.read_bytes()
    if len(content) > LARGEST_IMAGE:
        from PIL import Image

        with Image.open(path) as image:
            smaller = image.convert("RGB")
            smaller.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
        sink = io.BytesIO()
        smaller.save(sink, "jpeg", quality=JPEG_QUALITY)
        kind, content = "jpeg", sink.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


class Drawing(NamedTuple):
    """One panel of a figure, as the attributes and the content of an `<svg>` element."""

    view_box: str
    label: str
    inside: str


def drawings(figure: Figure, name: str) -> list[Drawing]:
    """The panels of a figure, each one by itself: the words of a whole one are small on a phone.

    Args:
        figure: of no use afterwards.
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
        svg = re.sub(r"<metadata>.*?</metadata>", "", sink.getvalue(), flags=re.DOTALL)
        [(view_box, svg)] = re.findall(r'<svg[^>]* viewBox="(.*?)"[^>]*>(.*)</svg>', svg, re.DOTALL)
        # Elements of two drawings may not share a name, and black is the colour of the text around.
        svg = svg.replace("xlink:href", "href").replace("stroke: #000000", "stroke: currentColor")
        svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>d{name}-{number}-", svg)
        title = axis.get_title("left") or axis.get_title()
        label = " against ".join(filter(None, (title, axis.get_xlabel())))
        drawn.append(Drawing(view_box, label, svg.strip()))
    return drawn
