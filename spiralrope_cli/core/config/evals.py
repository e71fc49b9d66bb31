"""Configs of `eval` and `predict`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from spiralrope_cli.core.config.datasets import DATA_NAMES, DATA_SETS, EvalProtocol
from spiralrope_cli.core.config.hub import ChosenWeights
from spiralrope_cli.core.config.models import SIZE, RopeConfig
from spiralrope_cli.core.config.option import FILE, PATH, SOURCE, check_fields, option
from spiralrope_cli.core.config.plots import FigureFile
from spiralrope_cli.core.config.runs import ModelConfig, check_divides
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.storage import check_writable

BOTH_CROP_RATIOS = (0.875, 1.0)
TOP_K = 5
SHEET_IMAGES = 64
"""Images of a contact sheet at most."""


@dataclass(frozen=True, kw_only=True)
class EvalOptions(ChosenWeights):
    """Options of `eval`; the rest is in the sources."""

    panel = "Data and augmentation"
    sources: tuple[str, ...] = option(
        "Run folders, checkpoint files, published names or hf:OWNER/NAME; "
        "by default the newest run.",
        metavar="SOURCE",
        complete="sources",
        argument=True,
        many=True,
        default=(),
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
        metavar="NAME|FOLDER",
        complete=DATA_SETS,
        default=None,
    )
    ignore_class_names: bool = option(
        "Go on if the data names its classes otherwise than the weights do.", default=False
    )
    real_labels: str = option(
        "Labels of ImageNet-ReaL for ImageNet's validation images: real.json, or timm for "
        "the copy that timm has.",
        metavar="FILE",
        default="",
    )
    crop_ratios: tuple[float, ...] = option(
        "Resize to image size / this, then centre crop; repeatable. Without a value: "
        "0.875 and 1.0.",
        flag="--crop-ratio",
        bare={"--crop-ratio": tuple(map(str, BOTH_CROP_RATIOS))},
        metavar="[R]",
        gt=0,
        le=1,
        many=True,
        default=(),
    )
    image_sizes: tuple[tuple[int, int], ...] = option(
        "Side, or height x width, in pixels; repeatable. By default as trained.",
        flag="--image-size",
        many=True,
        **SIZE,
        default=(),
    )
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
        if self.out:
            check_writable(self.out, folder=True)


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


@dataclass(frozen=True, kw_only=True)
class Prediction(ChosenWeights):
    """Options of `predict`."""

    panel = "Data and augmentation"
    source: str = option(SOURCE)
    images: tuple[str, ...] = option(
        "Image files, folders of images at any depth, or patterns such as 'photos/**/*.jpg'.",
        metavar="IMAGES",
        argument=True,
        required=True,
        many=True,
    )
    top_k: int | None = option(
        f"Classes per image; by default {TOP_K}, or all if fewer.", "Output", ge=1, default=None
    )
    json: bool = option("Print JSON on stdout.", "Output", default=False)
    out: str = option(
        f"Contact sheet of the first {SHEET_IMAGES} images as the network sees them, .png or .svg.",
        "Output",
        **FILE,
        default="",
    )
    crop_ratio: float | None = option(
        "Resize to image size / this, then centre crop; by default as eval does.",
        gt=0,
        le=1,
        default=None,
    )
    image_size: tuple[int, int] | None = option(
        "Side, or height x width, in pixels; by default as trained.", **SIZE, default=None
    )

    def __post_init__(self) -> None:
        check_fields(self)
        FigureFile(out=self.out)  # raises for another suffix
