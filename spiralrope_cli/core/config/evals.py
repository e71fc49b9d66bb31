"""Config of `eval`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from spiralrope_cli.core.config.datasets import DATA_NAMES, EvalProtocol
from spiralrope_cli.core.config.models import ARCH_OF_SOURCE, SIZE, RopeConfig
from spiralrope_cli.core.config.option import PATH, check_fields, option
from spiralrope_cli.core.config.runs import ModelConfig, check_divides
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.errors import ConfigError

BOTH_CROP_RATIOS = (0.875, 1.0)


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Options of `eval`; the rest is in the sources."""

    sources: tuple[str, ...] = option(
        "Run folders, checkpoint files, published names or hf:OWNER/NAME; "
        "by default the newest run.",
        metavar="SOURCE",
        complete="sources",
        argument=True,
        many=True,
        default=(),
    )
    ema: bool = option("Use EMA weights.", "Weights", flag="--ema/--no-ema", default=False)
    best: bool = option(
        "Use the checkpoint with the best raw acc@1, not the last.", "Weights", default=False
    )
    every: bool = option(
        "Eight rows: best and last, crop ratios 0.875 and 1.0, raw and EMA weights.",
        "Weights",
        flag="--all",
        default=False,
    )
    data: str | None = option(
        f"{DATA_NAMES}, or a folder: of classes, or with val/ "
        "in class folders, tar or parquet files. "
        "By default that of the run, else $SPIRALROPE_DATA, else digits.",
        "Data and augmentation",
        metavar="NAME|FOLDER",
        complete="data_sets",
        default=None,
    )
    ignore_class_names: bool = option(
        "Go on if the data names its classes otherwise than the weights do.",
        "Data and augmentation",
        default=False,
    )
    real_labels: str = option(
        "Labels of ImageNet-ReaL for ImageNet's validation images: real.json, or timm for "
        "the copy that timm has.",
        "Data and augmentation",
        metavar="FILE",
        default="",
    )
    crop_ratios: tuple[float, ...] = option(
        "Resize to image size / this, then centre crop; repeatable. Without a value: "
        "0.875 and 1.0.",
        "Data and augmentation",
        flag="--crop-ratio",
        metavar="[R]",
        gt=0,
        le=1,
        many=True,
        default=(),
    )
    image_sizes: tuple[tuple[int, int], ...] = option(
        "Side, or height x width, in pixels; repeatable. By default as trained.",
        "Data and augmentation",
        flag="--image-size",
        many=True,
        **SIZE,
        default=(),
    )
    arch: str = option(ARCH_OF_SOURCE, default="")
    rope: dict[str, Any] = field(default_factory=dict)  # options that override the source's
    json: bool = option("Print JSON on stdout.", "Output", default=False)
    csv: bool = option("Print CSV on stdout.", "Output", default=False)
    out: str | None = option(
        "Folder of eval.json; by default the folder of the run or file.",
        "Output",
        **PATH,
        default=None,
    )
    dry_run: bool = option("Print the plan and stop.", "Output", default=False)

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
