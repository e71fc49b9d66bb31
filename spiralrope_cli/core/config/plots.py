"""What a picture is of. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from spiralrope_cli.core.config.checks import one_of
from spiralrope_cli.core.config.models import deit_size, dit_size, is_dit
from spiralrope_cli.core.config.rope import RopeConfig
from spiralrope_cli.core.errors import ConfigError

FORMATS = ("png", "svg")
PLOTS_FOLDER = "plots"
OVER = ("step", "epoch")
ROPE_PANELS = ("rose", "frequencies", "clamp", "score")
PUBLISHED_GRID = {False: 14, True: 32}
"""Of a DeiT in patches (224 px of 16 px), and of a DiT in latents (256 px), before its patches."""
LARGEST_SIDE = 256


@dataclass(frozen=True, kw_only=True)
class RopePlot:
    """What a Spiral RoPE does, drawn for one or several sets of options.

    Attributes:
        ropes: the options; several are drawn beside each other.
        head_dim: channels per head.
        grid: patches as (rows, columns).
        pretrain_grid: patches that the model was trained at.
        panels: some of `ROPE_PANELS`.
    """

    ropes: tuple[RopeConfig, ...]
    head_dim: int
    grid: tuple[int, int]
    pretrain_grid: tuple[int, int]
    panels: tuple[str, ...] = ROPE_PANELS

    def __post_init__(self) -> None:
        for word in self.panels:
            one_of("show", word, ROPE_PANELS)
        for name in ("grid", "pretrain_grid"):
            rows, columns = getattr(self, name)
            if not 1 <= min(rows, columns) <= max(rows, columns) <= LARGEST_SIDE:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {rows}x{columns}: sides are 1 to {LARGEST_SIDE}"
                )
        for rope in self.ropes:
            rope.check_head_dim(self.head_dim)


def published_sizes(arch: str) -> tuple[int, int]:
    """Channels per head of an architecture, and the side of the grid it was published with.

    Raises:
        ConfigError: no such architecture.
    """
    if is_dit(arch):
        size = dit_size(arch)
        return size.head_dim, max(1, PUBLISHED_GRID[True] // size.patch_size)
    return deit_size(arch).head_dim, PUBLISHED_GRID[False]


def notes(plot: RopePlot, given: set[str]) -> list[str]:
    """One line for each of the `given` field names that changes nothing in any row."""
    inert = [dict(rope.inert_options(given)) for rope in plot.ropes]
    told = {name: why for name, why in inert[0].items() if all(name in row for row in inert)}
    if "scaling" in given and plot.grid == plot.pretrain_grid:
        told["scaling"] = "--grid is that of --pretrain-grid"
    return [f"--{name.replace('_', '-')} has no effect: {why}" for name, why in told.items()]


def target(out: str | None, form: str | None, name: str) -> Path:
    """Where a picture goes.

    Args:
        out: the file that the user named.
        form: the format that the user named.
        name: of the file without its suffix, where the user named none.

    Raises:
        ConfigError: an unknown format, or one that contradicts the suffix of the file.
    """
    if form is not None:
        one_of("format", form, FORMATS)
    if out is None:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
        return Path(PLOTS_FOLDER) / f"{stem}.{form or FORMATS[0]}"
    path = Path(out).expanduser()
    suffix = path.suffix.lower().lstrip(".")
    if suffix not in FORMATS:
        raise ConfigError(f"--out {out} must end in {' or '.join('.' + word for word in FORMATS)}")
    if form not in (None, suffix):
        raise ConfigError(f"--format {form} contradicts --out {out}", "leave one of them out")
    return path
