"""Pieces of an HTML page that needs nothing beside itself. All text is escaped here."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Collection, Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST_PICTURE = 1_500_000
"""Bytes of a picture that goes in as it is; larger ones are made smaller."""
PICTURE_SIDE = 1600
JPEG_QUALITY = 85


def page(title: str, *body: str) -> str:
    """A whole document with its own style."""
    style = (resources.files("spiralrope_cli") / "data" / "report.css").read_text()
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def section(level: int, title: str, *content: str, anchor: str = "") -> str:
    """A heading with what belongs to it; nothing at all without content."""
    inside = "\n".join(piece for piece in content if piece)
    if not inside:
        return ""
    mark = f' id="{escape(anchor)}"' if anchor else ""
    return f"<section{mark}>\n<h{level}>{escape(title)}</h{level}>\n{inside}\n</section>"


def paragraph(text: str, kind: str = "") -> str:
    """One paragraph."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def code(text: str) -> str:
    """Lines to copy."""
    return f'<pre tabindex="0"><code>{escape(text)}</code></pre>'


def links(items: Iterable[tuple[str, str]], label: str) -> str:
    """A list of (words, address)."""
    inside = "".join(
        f'<li><a href="{escape(address)}">{escape(words)}</a></li>' for words, address in items
    )
    return f'<nav aria-label="{escape(label)}"><ul>{inside}</ul></nav>' if inside else ""


def tiles(figures: Iterable[tuple[str, str]]) -> str:
    """The few numbers that matter most, as (name, value)."""
    inside = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in figures
    )
    return f'<dl class="figures">{inside}</dl>' if inside else ""


def table(
    caption: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    words: Collection[str] = (),
) -> str:
    """A table that scrolls sideways where the window is too narrow for it.

    Args:
        caption: what it shows.
        columns: their names.
        rows: their cells; the first one says what the row is about.
        words: columns that hold no numbers, which stand at the left.
    """
    kinds = ["" if name in words else ' class="number"' for name in columns]
    head = "".join(
        f'<th scope="col"{kind}>{escape(name)}</th>'
        for name, kind in zip(columns, kinds, strict=True)
    )
    lines = []
    for first, *others in rows:
        cells = zip(others, kinds[1:], strict=True)
        lines.append(
            f'<tr><th scope="row">{escape(str(first))}</th>'
            + "".join(f"<td{kind}>{escape(str(cell))}</td>" for cell, kind in cells)
            + "</tr>"
        )
    inside = "\n".join(lines)
    return (
        f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0">'
        f'<table class="wide"><caption>{escape(caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{inside}\n</tbody></table></div>"
    )


def groups(tables: Iterable[tuple[str, Iterable[tuple[str, Any, str]]]]) -> str:
    """Tables of (name, value, where it came from) beside each other, as far as there is room."""
    made = []
    for caption, rows in tables:
        lines = "\n".join(
            f'<tr><th scope="row">{escape(name)}</th><td>{escape(str(value))}</td>'
            f'<td class="from">{escape(origin)}</td></tr>'
            for name, value, origin in rows
        )
        if lines:
            made.append(f"<table><caption>{escape(caption)}</caption>\n{lines}\n</table>")
    return f'<div class="groups">{"".join(made)}</div>' if made else ""


def picture(path: Path, alt: str) -> str:
    """A picture file inside the page; a large one is made smaller first."""
    kind, content = "png", path.read_bytes()
    if len(content) > LARGEST_PICTURE:
        with Image.open(path) as image:
            smaller = image.convert("RGB")
            smaller.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        sink = io.BytesIO()
        smaller.save(sink, "jpeg", quality=JPEG_QUALITY)
        kind, content = "jpeg", sink.getvalue()
    inside = base64.b64encode(content).decode()
    return f'<figure><img src="data:image/{kind};base64,{inside}" alt="{escape(alt)}"></figure>'


def drawing(figure: Figure, name: str) -> str:
    """The axes of a figure, each one a drawing of its own in the colour of the page's text.

    Side by side where there is room and below each other on a phone, so that their words stay
    large enough to read.

    Args:
        figure: as the functions that draw make it.
        name: different for each figure of a page.
    """
    import matplotlib

    name = name.encode().hex()  # what it holds may not be part of an element's name
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for words in figure.texts:
        words.set_visible(False)
    drawn = []
    for number, axis in enumerate(figure.axes):
        around = axis.get_tightbbox()
        box = around.padded(4).transformed(figure.dpi_scale_trans.inverted()) if around else None
        for other in figure.axes:
            other.set_visible(other is axis)
        sink = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
            figure.savefig(
                sink, format="svg", transparent=True, bbox_inches=box, metadata={"Date": None}
            )
        title = axis.get_title("left") or axis.get_title()
        label = " against ".join(word for word in (title, axis.get_xlabel()) if word)
        drawn.append(f"<figure>{_inline(sink.getvalue(), f'd{name}-{number}', label)}</figure>")
    for axis in figure.axes:
        axis.set_visible(True)
    return f'<div class="curves">{"".join(drawn)}</div>'


def _inline(svg: str, prefix: str, label: str) -> str:
    """An SVG file as an element of a page: no names in common with others, black is the ink."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", svg.replace("xlink:href", "href"))
    svg = svg.replace("stroke: #000000", "stroke: currentColor")
    size = re.search(r'viewBox="[^"]*"', svg)
    opening = f'<svg {size[0] if size else ""} role="img" aria-label="{escape(label)}">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1).strip()
