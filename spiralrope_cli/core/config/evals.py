"""What an evaluation is: the rows of its table, each with all that its figures depend on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from spiralrope_cli.core.config.checks import share
from spiralrope_cli.core.config.models import check_divides
from spiralrope_cli.core.config.rope import RopeConfig, check_given
from spiralrope_cli.core.config.runs import MachineConfig, ModelConfig
from spiralrope_cli.core.errors import ConfigError

BOTH_CROP_RATIOS = (0.875, 1.0)
FORMATS = ("table", "json", "csv")


@dataclass(frozen=True, kw_only=True)
class EvalProtocol:
    """Which images are looked at, and how they reach the network.

    Attributes:
        data: a built-in name or a folder.
        num_val: validation images.
        image_size: (height, width) in pixels.
        in_chans: channels that the network takes.
        crop_ratio: the shorter side is resized to image size / this, then the centre is cropped.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
    """

    data: str
    num_val: int
    image_size: tuple[int, int]
    in_chans: int
    crop_ratio: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == self.in_chans:
            raise ConfigError(
                f"--data {self.data} has {len(self.mean)} channel(s), the weights take "
                f"{self.in_chans}"
            )


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What the user asks for; the sources say the rest.

    Attributes:
        sources: run folders, files or published names.
        ema: averaged weights.
        best: the best checkpoint in place of the last.
        every: both checkpoints, both crop ratios, raw and averaged weights.
        crop_ratios: one row each; empty for the data set's own.
        image_sizes: one row each; empty for the weights' own.
        data: a built-in name or a folder, None for the run's own.
        rope: field name -> value, RoPE options that win over the source's.
        out: folder of `eval.json`, None for beside the checkpoint.
        output: `table`, `json` or `csv`.
    """

    sources: tuple[str, ...]
    ema: bool = False
    best: bool = False
    every: bool = False
    crop_ratios: tuple[float, ...] = ()
    image_sizes: tuple[tuple[int, int], ...] = ()
    data: str | None = None
    rope: dict[str, Any] = field(default_factory=dict)
    out: str | None = None
    output: str = "table"

    def __post_init__(self) -> None:
        for ratio in self.crop_ratios:
            share("crop_ratio", ratio)
        for size in self.image_sizes:
            check_divides(size, 1)
        check_given(self.rope)


@dataclass(frozen=True, kw_only=True)
class EvalRow:
    """One set of weights under one protocol.

    Attributes:
        source: as the user named it.
        file: the file that holds the weights.
        checkpoint: `best`, `last`, or nothing where there is no such choice.
        step: optimizer steps they were trained for, None where unknown.
        ema: whether they are averaged.
        arch: theirs.
        rope: the options in force.
        model: sizes as evaluated.
        trained_size: (height, width) in pixels that the positions refer to.
        protocol: the images.
        folder: where `eval.json` goes.
    """

    source: str
    file: str
    checkpoint: str
    step: int | None
    ema: bool
    arch: str
    rope: RopeConfig
    model: ModelConfig
    trained_size: tuple[int, int]
    protocol: EvalProtocol
    folder: str

    @property
    def weights(self) -> str:
        """`raw` or `EMA`."""
        return "EMA" if self.ema else "raw"

    @property
    def label(self) -> str:
        """The weights in words: `best, EMA`."""
        return ", ".join(part for part in (self.checkpoint, self.weights) if part)

    @property
    def network(self) -> tuple[str, bool, RopeConfig, ModelConfig]:
        """Equal for rows that the same forward passes answer."""
        return self.file, self.ema, self.rope, self.model


@dataclass(frozen=True, kw_only=True)
class EvalRun:
    """All rows of one evaluation, the same in every process.

    Attributes:
        rows: in the order of the table.
        output: `table`, `json` or `csv`.
        out: the folder of `eval.json`, or the first of several.
    """

    rows: tuple[EvalRow, ...]
    output: str
    out: str
    machine: MachineConfig
