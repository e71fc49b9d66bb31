"""Config of `plot`. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spiralrope_cli.core.config.hub import ChosenWeights
from spiralrope_cli.core.config.models import SIZE, RopeConfig, pair
from spiralrope_cli.core.config.option import FILE, SOURCE, check_fields, leaves, one_of, option
from spiralrope_cli.core.errors import ConfigError, DataError
from spiralrope_cli.core.storage import check_writable

FORMATS = ("png", "svg")
PLOTS_FOLDER = "plots"
ROPE_PANELS = ("rose", "frequencies", "clamp", "score")
DEIT_GRID, DIT_LATENT = 14, 32
"""Published sizes: grid of a DeiT in patches (224 / 16), side of a DiT's latents (256 / 8)."""
LARGEST_SIDE = 256
MOST_IMAGES = 1024


@dataclass(frozen=True, kw_only=True)
class FigureFile:
    """Where a figure is written."""

    out: str = option(
        "Output file, .png or .svg; by default in plots/.", "Figure", **FILE, default=""
    )
    format: Literal["png", "svg"] | None = option(
        "File format; by default that of --out, or png.", "Figure", default=None
    )

    def __post_init__(self) -> None:
        check_fields(self)
        suffix = Path(self.out).suffix.lower().lstrip(".")
        if self.out and suffix not in FORMATS:
            raise ConfigError(f"--out {self.out} must end in {one_of('.' + f for f in FORMATS)}")
        if self.out and self.format not in (None, suffix):
            raise ConfigError(
                f"--format {self.format} contradicts --out {self.out}", "leave one of them out"
            )
        if self.out:
            check_writable(self.out)

    def named(self, name: str) -> Path:
        """The file of --out, or one in plots/ with this name."""
        stem = re.sub(r"[^\w.-]+", "-", name)
        return Path(self.out or f"{PLOTS_FOLDER}/{stem}.{self.format or FORMATS[0]}")


@dataclass(frozen=True, kw_only=True)
class RunPlot(FigureFile):
    panel = "Figure"
    runs: tuple[str, ...] = option(
        "Run folders, or names below runs/.",
        metavar="RUN",
        complete="training_runs",
        argument=True,
        many=True,
    )
    over: Literal["step", "epoch"] = option("X axis.", default="step")


@dataclass(frozen=True, kw_only=True)
class RopePlot(FigureFile):
    source: str = option(
        "Run folder, checkpoint file or published name, whose RoPE is drawn.",
        metavar="SOURCE",
        complete="sources",
        argument=True,
        default="",
    )
    rotates: tuple[int, ...] = option(
        "Half the number of directions; repeatable, to compare.",
        "Spiral RoPE",
        flag="--rotate",
        metavar="N",
        ge=0,
        expects="a whole number, 0 or more; it is half the number of directions",
        many=True,
        default=(RopeConfig.rotate,),
    )
    arch: str = option(
        "Architecture that gives --head-dim and --grid.",
        "Model",
        metavar="NAME",
        complete="archs",
        default="deit-s",
    )
    head_dim: int = option("Channels per head; by default those of --arch.", "Model")
    grid: tuple[int, int] = option(
        "Grid of patches: side, or rows x columns; by default that of --arch.", "Model", **SIZE
    )
    pretrain_grid: tuple[int, int] = option(
        "Grid of patches in training; by default --grid.", "Model", **SIZE
    )
    panels: tuple[Literal["rose", "frequencies", "clamp", "score"], ...] = option(
        "Panel; repeatable. By default all.",
        "Figure",
        flag="--show",
        many=True,
        default=ROPE_PANELS,
    )
    layer: int = option("Layer of --rope-kind mixed, counted from 0.", "Figure", ge=0, default=0)
    ropes: tuple[RopeConfig, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("grid", "pretrain_grid"):
            rows, columns = getattr(self, name)
            if not 1 <= min(rows, columns) <= max(rows, columns) <= LARGEST_SIDE:
                word = leaves(RopePlot)[name].called
                raise ConfigError(f"{word} {rows}x{columns}: sides must be in [1, {LARGEST_SIDE}]")
        for rope in self.ropes:
            rope.check_head_dim(self.head_dim)


@dataclass(frozen=True, kw_only=True)
class AttentionPlot(FigureFile, ChosenWeights):
    panel = "Attention"
    source: str = option(SOURCE)
    image: str = option("Image file.", metavar="IMAGE", argument=True)
    patch: tuple[int, int] | None = option(
        "Query patch, counted from 0,0; by default the class token.",
        metavar="ROW,COL",
        read=pair,
        expects="ROW,COL, as 7,3",
        default=None,
    )
    layers: tuple[int, ...] = option(
        "Layer, counted from 0; repeatable. By default the last.",
        flag="--layer",
        ge=0,
        many=True,
        default=(),
    )
    heads: tuple[int, ...] = option(
        "Head, counted from 0; repeatable. By default all.",
        flag="--head",
        ge=0,
        many=True,
        default=(),
    )
    image_size: tuple[int, int] | None = option(
        "Side, or height x width, in pixels; by default as trained.", **SIZE, default=None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not Path(self.image).is_file():
            raise DataError(f"IMAGE {self.image} does not exist")

    def check_fits(self, depth: int, num_heads: int, grid: tuple[int, int]) -> None:
        """Raises if the network has no such layer, head or patch."""
        layers = [("layer", number, depth) for number in self.layers]
        for name, number, count in (*layers, *(("head", n, num_heads) for n in self.heads)):
            if number >= count:
                raise ConfigError(f"--{name} {number}: {self.source} has {name}s 0 to {count - 1}")
        row, column = self.patch or (0, 0)
        if row >= grid[0] or column >= grid[1]:
            raise ConfigError(
                f"--patch {row},{column} is outside the grid: rows 0 to {grid[0] - 1}, "
                f"columns 0 to {grid[1] - 1}"
            )


@dataclass(frozen=True, kw_only=True)
class SamplesPlot(FigureFile):
    panel = "Figure"
    source: str = option(
        "Output folder of dit-sample, .npz of images, or folder of images.",
        metavar="SOURCE",
        argument=True,
    )
    num_samples: int = option("Number of images.", ge=1, le=MOST_IMAGES, was="--num", default=64)
    columns: int = option("Images per row; 0: a square grid.", ge=0, default=0)
    labels: bool = option(
        "Print class labels below the images, if known.", flag="--labels/--no-labels", default=True
    )
