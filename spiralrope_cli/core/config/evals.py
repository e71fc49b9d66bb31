"""Config of `eval` and `fid`. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from spiralrope_cli.core.config.datasets import DATA_NAMES
from spiralrope_cli.core.config.models import ARCH_OF_SOURCE, SIZE, RopeConfig, check_divides
from spiralrope_cli.core.config.option import (
    DATA,
    IMAGES,
    MACHINE,
    METRICS,
    OUTPUT,
    PATH,
    WEIGHTS,
    Opt,
    check_fields,
    idle_lines,
)
from spiralrope_cli.core.config.runs import ModelConfig
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.storage import cache_folder

BOTH_CROP_RATIOS = (0.875, 1.0)

PLAN_ONLY = Opt("Print the plan and stop.", OUTPUT)

Reading = Literal["as-pil", "as-trained"]
"""How image files are read: by PIL's `convert("RGB")`, as other FID tools do, or as in training."""


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
    dry_run: Annotated[bool, PLAN_ONLY] = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.json and self.csv:
            raise ConfigError("--json and --csv exclude each other", "leave one of them out")
        for size in self.image_sizes:
            check_divides(size, 1)


@dataclass(frozen=True, kw_only=True)
class EvalProtocol:
    """Validation images and their preprocessing."""

    data: str  # a built-in name or a folder
    num_val: int
    image_size: tuple[int, int]  # (height, width) in pixels
    in_chans: int
    crop_ratio: float  # resized to image size / this, then cropped at the centre
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]
    real_labels: str = ""  # as `EvalOptions`; empty: the labels of the data set

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == self.in_chans:
            raise ConfigError(
                f"--data {self.data} has {len(self.mean)} channel(s), but the weights take "
                f"{self.in_chans}"
            )


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


FID_METRICS = {
    "fid": ("FID", "lower is better", 4),
    "sfid": ("sFID", "lower is better", 4),
    "is": ("Inception Score", "higher is better", 4),
    "kid": ("KID", "lower is better", 6),
    "precision": ("Precision", "higher is better", 4),
    "recall": ("Recall", "higher is better", 4),
}
"""Metric -> name, which direction is better, number of decimals."""
EXTRACTOR = "inception-v3-compat 2015-12-05"


def words(text: str) -> tuple[str, ...]:
    """`fid, IS` -> ("fid", "is"); `all` -> all metrics."""
    names = tuple(dict.fromkeys(word.strip().lower() for word in text.split(",")))
    return tuple(FID_METRICS) if names == ("all",) else names


@dataclass(frozen=True, kw_only=True)
class FeatureMachine(MachineConfig):
    """As `MachineConfig`, but fp32 by default, so that metrics are comparable."""

    precision: Annotated[
        Literal["fp32", "tf32", "bf16"],
        Opt("Precision of the Inception features; papers use fp32.", MACHINE),
    ] = "fp32"


@dataclass(frozen=True, kw_only=True)
class FidRun:
    """The config of `fid`."""

    samples: Annotated[
        str, Opt("Generated images: a folder or an .npz.", metavar="SAMPLES", argument=True)
    ]
    reference: Annotated[
        str,
        Opt(
            "Real images or their statistics: a folder or an .npz.",
            metavar="REFERENCE",
            argument=True,
        ),
    ] = ""
    num_samples: Annotated[
        int,
        Opt(
            "Use the first N images of SAMPLES; fewer are an error. 0: all.",
            IMAGES,
            ge=0,
            was="--num",
        ),
    ] = 0
    weights: Annotated[
        str, Opt("Inception weights; by default those of fetch inception.", IMAGES, metavar="FILE")
    ] = ""
    images: Annotated[
        Reading,
        Opt(
            "Read transparency and 16-bit grey by PIL's convert('RGB'), as other FID tools do, "
            "or as in training.",
            IMAGES,
        ),
    ] = "as-pil"
    select: Annotated[
        tuple[str, ...],
        Opt(
            f"Metrics: some of {','.join(FID_METRICS)}.",
            METRICS,
            metavar="NAMES",
            read=words,
            expects="names",
        ),
    ] = tuple(FID_METRICS)
    kid_subsets: Annotated[int, Opt("Number of KID subsets.", METRICS, ge=1)] = 100
    kid_subset_size: Annotated[int, Opt("Images per KID subset.", METRICS, ge=2)] = 1000
    bootstrap: Annotated[
        int, Opt("Bootstrap samples for the standard deviation of the FID; 0: none.", METRICS, ge=0)
    ] = 0
    seed: Annotated[int, Opt("Seed of KID subsets and bootstrap.", METRICS, ge=0, lt=2**32)] = 2020
    as_json: Annotated[bool, Opt("Print JSON on stdout.", OUTPUT, flag="--json")] = False
    save_stats: Annotated[
        str,
        Opt(
            "Save the statistics of SAMPLES (.npz), to use as a REFERENCE later.",
            OUTPUT,
            metavar="FILE",
        ),
    ] = ""
    dry_run: Annotated[bool, PLAN_ONLY] = False
    result_file: str = ""  # the JSON is also written to this file
    batch_size: Annotated[int, Opt("Images per batch and process.", MACHINE, ge=1)] = 32
    machine: FeatureMachine = field(default_factory=FeatureMachine)

    def __post_init__(self) -> None:
        check_fields(self)
        unknown = [name for name in self.select if name not in FID_METRICS]
        if unknown or not self.select:
            raise ConfigError(
                f"--select {','.join(self.select)}: unknown metric "
                f"{unknown[0] if unknown else ''!r}",
                f"known: {', '.join(FID_METRICS)}",
            )
        if self.bootstrap == 1:
            raise ConfigError("--bootstrap is 1; a standard deviation needs 2 or more")
        if self.bootstrap and "fid" not in self.select:
            raise ConfigError("--bootstrap needs fid in --select")
        if not self.reference and not self.save_stats and self.select != ("is",):
            raise ConfigError(
                "REFERENCE is missing: give SAMPLES first, REFERENCE second",
                "only --select is, or --save-stats, work without it",
            )
        if not self.save_stats:
            return
        target = Path(self.save_stats)
        if target.suffix != ".npz":
            raise ConfigError(f"--save-stats {target} must end in .npz")
        if target.exists():
            raise ConfigError(f"--save-stats {target} exists", "remove it, or choose another name")
        if not os.access(target.absolute().parent, os.W_OK):
            raise ConfigError(
                f"--save-stats {target}: {target.absolute().parent} is not a writable folder"
            )

    def protocol(self, weights_digest: str) -> str:
        """What statistics depend on besides the images; equal ones are comparable."""
        reading = "" if self.images == "as-pil" else f", images {self.images}"
        return f"{EXTRACTOR}, weights sha256 {weights_digest}, {self.machine.precision}{reading}"

    @property
    def out(self) -> str:
        """Folder that it writes to: the cached statistics of references."""
        return str(statistics_folder())


def fid_notes(run: FidRun, given: Collection[str]) -> list[str]:
    """One line for each given option that has no effect."""
    kid = () if "kid" in run.select else ("kid_subsets", "kid_subset_size")
    reasons = dict.fromkeys(kid, "--select lacks kid")
    if "kid" not in run.select and not run.bootstrap:
        reasons["seed"] = "nothing is random without kid or --bootstrap"
    return idle_lines(FidRun, reasons.items(), given)


def statistics_folder() -> Path:
    """Folder of cached statistics."""
    return cache_folder() / "statistics"
