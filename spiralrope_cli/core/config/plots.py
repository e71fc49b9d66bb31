"""What a picture is of. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spiralrope_cli.core.config.checks import at_least, one_of
from spiralrope_cli.core.config.models import deit_size, dit_size, is_dit
from spiralrope_cli.core.config.rope import RopeConfig
from spiralrope_cli.core.errors import ConfigError, DataError

FORMATS = ("png", "svg")
PLOTS_FOLDER = "plots"
OVER = ("step", "epoch")
ROPE_PANELS = ("rose", "frequencies", "clamp", "score")
PUBLISHED_GRID = {False: 14, True: 32}
"""Of a DeiT in patches (224 px of 16 px), and of a DiT in latents (256 px), before its patches."""
LARGEST_SIDE = 256
MOST_IMAGES = 1024


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


@dataclass(frozen=True, kw_only=True)
class AttentionPlot:
    """Where a token of a DeiT looks in one picture.

    Attributes:
        source: as the user named the weights.
        image: the picture's file.
        ema: averaged weights.
        rope: field name -> value, RoPE options that win over the source's.
        image_size: (height, width) in pixels, None for the weights' own.
        patch: (row, column) of the query, None for the class token.
        layers: numbers from 0, none for the last one.
        heads: numbers from 0, none for all.
    """

    source: str
    image: str
    ema: bool = False
    rope: dict[str, Any] = field(default_factory=dict)
    image_size: tuple[int, int] | None = None
    patch: tuple[int, int] | None = None
    layers: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, numbers in (("layer", self.layers), ("head", self.heads)):
            for number in numbers:
                at_least(name, number, 0)
        if not Path(self.image).is_file():
            raise DataError(f"IMAGE {self.image} is no file")

    def check_fits(self, depth: int, num_heads: int, grid: tuple[int, int]) -> None:
        """Refuses what a network of such sizes does not have.

        Raises:
            ConfigError: names the option and what there is.
        """
        layers = [("layer", number, depth) for number in self.layers]
        for name, number, count in (*layers, *(("head", n, num_heads) for n in self.heads)):
            if number >= count:
                raise ConfigError(f"--{name} {number}: {self.source} has {count}, 0 to {count - 1}")
        row, column = self.patch or (0, 0)
        if row >= grid[0] or column >= grid[1]:
            raise ConfigError(
                f"--patch {row},{column} is outside of the grid: rows 0 to {grid[0] - 1}, "
                f"columns 0 to {grid[1] - 1}"
            )


@dataclass(frozen=True, kw_only=True)
class SamplesPlot:
    """A grid of images.

    Attributes:
        source: an `.npz`, a folder of images, or the folder of a dit-sample run.
        num: how many, the first ones, at most.
        columns: per row; 0 for a square.
        labels: writes the class below each image where it is known.
    """

    source: str
    num: int = 64
    columns: int = 0
    labels: bool = True

    def __post_init__(self) -> None:
        at_least("num", self.num, 1)
        at_least("columns", self.columns, 0)
        if self.num > MOST_IMAGES:
            raise ConfigError(f"--num is {self.num}; a picture takes {MOST_IMAGES} at most")


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
        stem = re.sub(r"[^\w.-]+", "-", name)
        return Path(PLOTS_FOLDER) / f"{stem}.{form or FORMATS[0]}"
    path = Path(out).expanduser()
    suffix = path.suffix.lower().lstrip(".")
    if suffix not in FORMATS:
        raise ConfigError(f"--out {out} must end in {' or '.join('.' + word for word in FORMATS)}")
    if form not in (None, suffix):
        raise ConfigError(f"--format {form} contradicts --out {out}", "leave one of them out")
    return path
