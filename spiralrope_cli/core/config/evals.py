"""Config of `eval`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from spiralrope_cli.core.config.datasets import DATA_NAMES, EvalProtocol
from spiralrope_cli.core.config.models import ARCH_OF_SOURCE, SIZE, RopeConfig
from spiralrope_cli.core.config.option import (
    DATA,
    OUTPUT,
    PATH,
    WEIGHTS,
    Opt,
    check_fields,
)
from spiralrope_cli.core.config.runs import ModelConfig, check_divides
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.errors import ConfigError

BOTH_CROP_RATIOS = (0.875, 1.0)


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Options of `eval`; the rest is in the sources."""

    sources: Annotated[
        tuple[str, ...],
        Opt(
            "Run folders, checkpoint files, published names or hf:OWNER/NAME; "
            "by default the newest run.",
            metavar="SOURCE",
            complete="sources",
            argument=True,
            many=True,
        ),
    ] = ()
    ema: Annotated[bool, Opt("Use EMA weights.", WEIGHTS, flag="--ema/--no-ema")] = False
    best: Annotated[
        bool, Opt("Use the checkpoint with the best raw acc@1, not the last.", WEIGHTS)
    ] = False
    every: Annotated[
        bool,
        Opt(
            "Eight rows: best and last, crop ratios 0.875 and 1.0, raw and EMA weights.",
            WEIGHTS,
            flag="--all",
        ),
    ] = False
    data: Annotated[
        str | None,
        Opt(
            f"{DATA_NAMES}, or a folder: of classes, or with val/ "
            "in class folders, tar or parquet files. "
            "By default that of the run, else $SPIRALROPE_DATA, else digits.",
            DATA,
            metavar="NAME|FOLDER",
            complete="data_sets",
        ),
    ] = None
    ignore_class_names: Annotated[
        bool, Opt("Go on if the data names its classes otherwise than the weights do.", DATA)
    ] = False
    real_labels: Annotated[
        str,
        Opt(
            "Labels of ImageNet-ReaL for ImageNet's validation images: real.json, or timm for "
            "the copy that timm has.",
            DATA,
            metavar="FILE",
        ),
    ] = ""
    crop_ratios: Annotated[
        tuple[float, ...],
        Opt(
            "Resize to image size / this, then centre crop; repeatable. Without a value: "
            "0.875 and 1.0.",
            DATA,
            flag="--crop-ratio",
            metavar="[R]",
            gt=0,
            le=1,
            many=True,
        ),
    ] = ()
    image_sizes: Annotated[
        tuple[tuple[int, int], ...],
        Opt(
            "Side, or height x width, in pixels; repeatable. By default as trained.",
            DATA,
            flag="--image-size",
            many=True,
            **SIZE,
        ),
    ] = ()
    arch: Annotated[str, ARCH_OF_SOURCE] = ""
    rope: dict[str, Any] = field(default_factory=dict)  # options that override the source's
    json: Annotated[bool, Opt("Print JSON on stdout.", OUTPUT)] = False
    csv: Annotated[bool, Opt("Print CSV on stdout.", OUTPUT)] = False
    out: Annotated[
        str | None,
        Opt("Folder of eval.json; by default the folder of the run or file.", OUTPUT, **PATH),
    ] = None
    dry_run: Annotated[bool, Opt("Print the plan and stop.", OUTPUT)] = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.json and self.csv:
            raise ConfigError("--json and --csv exclude each other", "leave one of them out")
        for size in self.image_sizes:
            check_divides(size, 1)


@dataclass(frozen=True, kw_only=True)
class EvalRow:
    """One set of weights with one protocol."""

    source: str  # as the user named it
    file: str  # file of the weights
    checkpoint: str  # `best` or `last`; empty if there is no choice
    step: int | None  # optimizer steps of training; None if unknown
    ema: bool
    arch: str
    rope: RopeConfig
    model: ModelConfig  # sizes as evaluated
    protocol: EvalProtocol
    classes: tuple[int, ...]  # of the weights, by class number of the data; empty: the same
    folder: str  # of `eval.json`

    @property
    def weights(self) -> str:
        """`raw` or `EMA`."""
        return "EMA" if self.ema else "raw"

    @property
    def network_key(self) -> tuple[str, bool, RopeConfig, ModelConfig]:
        """Rows with equal networks share their forward passes."""
        return self.file, self.ema, self.rope, self.model


@dataclass(frozen=True, kw_only=True)
class EvalRun:
    """All rows of one evaluation."""

    rows: tuple[EvalRow, ...]  # in the order of the table
    output: str  # `table`, `json` or `csv`
    out: str  # folder of `eval.json`, or the first of several
    machine: MachineConfig
