"""Draws docs/images/channels.svg, which channels rotate along which direction."""

from __future__ import annotations

import math
from pathlib import Path

from spiralrope_cli import RopeConfig
from spiralrope_cli.core.rope import pair_layout

FIGURE = Path(__file__).parent / "images" / "channels.svg"
ROTATES, HEAD_DIM = (1, 2, 4), 32
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""Okabe and Ito's, which colour-blind readers tell apart."""

CELL, TOP, LEFT, ROW = 21, 34, 96, 92


def draw(head_dim: int = HEAD_DIM, rotates: tuple[int, ...] = ROTATES) -> str:
    """SVG: one line of channels per value of `rotate`, a box for each pair of channels."""
    width, height = LEFT + head_dim * CELL + 12, TOP + len(rotates) * ROW + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(LEFT + head_dim * CELL / 4, 16, "first half: row formula"),
        _text(LEFT + head_dim * CELL * 3 / 4, 16, "second half: column formula"),
    ]
    for line, rotate in enumerate(rotates):
        parts += _line(TOP + line * ROW, rotate, head_dim)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _line(top: int, rotate: int, head_dim: int) -> list[str]:
    frequency, angle, in_first_half = pair_layout(RopeConfig(rotate=rotate), head_dim)
    rank = {value: place for place, value in enumerate(sorted(set(frequency.tolist()))[::-1])}
    parts = [_text(LEFT - 8, top + 34, f"rotate {rotate}", "end", 14)]
    for pair, (omega, phi) in enumerate(zip(frequency.tolist(), angle.tolist(), strict=True)):
        x, direction = LEFT + 2 * pair * CELL, round(phi / (math.pi / 2 / rotate))
        shift = 4 if not in_first_half[pair] else 0
        parts.append(
            f'<rect x="{x + shift}" y="{top}" width="{2 * CELL}" height="52" stroke="white" '
            f'fill="{COLOURS[direction]}" data-pair="{pair}" data-direction="{direction}" '
            f'data-frequency="{rank[omega]}"/>'
        )
        centre = x + shift + CELL
        parts.append(_arrow(centre, top + 17, phi if in_first_half[pair] else phi + math.pi / 2))
        parts.append(_text(centre, top + 44, f"ω{rank[omega]}", fill="white"))
        if pair % 2 == 0:
            parts.append(_text(x + shift + 2, top + 67, str(2 * pair), "start", 10))
    return parts


def _arrow(x: float, y: float, phi: float) -> str:
    """Where positions grow: down the rows, turned by phi towards the columns."""
    right, down = math.sin(phi) * 11, math.cos(phi) * 11
    side = (-down * 0.35, right * 0.35)
    tip = f"{x + right:.1f},{y + down:.1f}"
    base = [
        f"{x + right * 0.3 + sign * side[0]:.1f},{y + down * 0.3 + sign * side[1]:.1f}"
        for sign in (1, -1)
    ]
    return (
        f'<path d="M{x - right:.1f},{y - down:.1f}L{tip}" stroke="white" stroke-width="2"/>'
        f'<path d="M{tip}L{base[0]}L{base[1]}Z" fill="white"/>'
    )


def _text(
    x: float, y: float, words: str, anchor: str = "middle", size: int = 12, fill: str = "black"
) -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{fill}"'
    return f"<text {where}>{words}</text>"


if __name__ == "__main__":
    FIGURE.write_text(draw())
