"""What an evaluation is: the rows of its table, each with all that its figures depend on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from spiralrope_cli.core.config.models import SIZE, check_divides
from spiralrope_cli.core.config.option import DATA, OUTPUT, PATH, WHICH, Opt, check_fields
from spiralrope_cli.core.config.rope import RopeConfig
from spiralrope_cli.core.config.runs import EvalProtocol, ModelConfig
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.errors import ConfigError

BOTH_CROP_RATIOS = (0.875, 1.0)


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What the user asks for; the sources say the rest."""

    sources: Annotated[
        tuple[str, ...],
        Opt(
            "Run folders, checkpoint files or published names; by default the newest run.",
            metavar="SOURCE",
            complete="sources",
            argument=True,
            many=True,
        ),
    ] = ()
    ema: Annotated[bool, Opt("Averaged weights, not the raw.", WHICH, flag="--ema/--no-ema")] = (
        False
    )
    best: Annotated[bool, Opt("A run's best checkpoint, not its last.", WHICH)] = False
    every: Annotated[
        bool,
        Opt(
            "Eight rows: best and last, crop ratios 0.875 and 1.0, raw and EMA weights.",
            WHICH,
            flag="--all",
        ),
    ] = False
    data: Annotated[
        str | None,
        Opt(
            "digits, fashion-mnist, or a folder with train/ and val/ of class folders. "
            "Without it: the run's own, else $SPIRALROPE_DATA, else digits.",
            DATA,
            metavar="NAME|FOLDER",
            complete="data_sets",
        ),
    ] = None
    crop_ratios: Annotated[
        tuple[float, ...],
        Opt(
            "Resize to image size / this, then crop the centre; repeatable. Without a value: "
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
            "Side, or height x width, in pixels; repeatable. By default the weights' own.",
            DATA,
            flag="--image-size",
            many=True,
            **SIZE,
        ),
    ] = ()
    rope: dict[str, Any] = field(default_factory=dict)  # options that win over the source's
    json: Annotated[bool, Opt("JSON on stdout.", OUTPUT)] = False
    csv: Annotated[bool, Opt("CSV on stdout.", OUTPUT)] = False
    out: Annotated[
        str | None, Opt("Folder of eval.json; by default the run's or the file's.", OUTPUT, **PATH)
    ] = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.json and self.csv:
            raise ConfigError("--json and --csv exclude each other", "leave one of them out")
        for size in self.image_sizes:
            check_divides(size, 1)

    @property
    def output(self) -> str:
        """`table`, `json` or `csv`."""
        return "json" if self.json else "csv" if self.csv else "table"


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
