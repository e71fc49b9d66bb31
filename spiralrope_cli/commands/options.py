"""Options that more than one command takes. An option that was not given is None."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from spiralrope_cli.commands import completion
from spiralrope_cli.core.config.rope import (
    FREQS_FOR,
    PROJECTIONS,
    SCALINGS,
    RopeConfig,
    check_given,
)
from spiralrope_cli.core.config.runs import (
    DEVICES,
    PRECISIONS,
    RESUME_MODES,
    TRACKERS,
)

MODEL, ROPE, DATA, RECIPE, RUN, MACHINE = (
    "Model",
    "Spiral RoPE",
    "Data and augmentation",
    "Recipe",
    "Run",
    "Machine",
)

ROPE_FIELDS = tuple(RopeConfig.__dataclass_fields__)


def option(*names: str, panel: str, text: str, metavar: str | None = None, **more: Any) -> Any:
    """A typer option without a default of its own: the recipe and the data set know it."""
    more = {"autocompletion": completion.paths, **more}
    if "--out" in names:
        more = {"callback": expanded, **more}
    return typer.Option(
        *names, rich_help_panel=panel, help=text, metavar=metavar, show_default=False, **more
    )


def expanded(path: str | Path | None) -> str | Path | None:
    """A path without `~`, which no shell expands in `--out=~/runs`.

    Raises:
        typer.BadParameter: an empty word, as an unset variable leaves it.
    """
    if path is None:
        return None
    if not str(path).strip():
        raise typer.BadParameter("it is empty")
    return type(path)(Path(path).expanduser())


def choice(text: str, allowed: tuple[str, ...]) -> dict[str, Any]:
    """Text, placeholder and completion of an option that takes one of a few words."""
    return {
        "text": f"{text} ({', '.join(allowed)})",
        "metavar": "WORD",
        "autocompletion": completion.words(*allowed),
    }


def parse_size(text: str | tuple[int, int] | None) -> tuple[int, int] | None:
    """`224` or `224x448` (height x width) as (height, width).

    Raises:
        typer.BadParameter: neither.
    """
    if text is None or isinstance(text, tuple):
        return text
    found = re.fullmatch(r"(\d+)(?:[xX](\d+))?", text.strip())
    if not found:
        raise typer.BadParameter(f"{text!r} is neither a side, as 224, nor HxW, as 224x448")
    return int(found[1]), int(found[2] or found[1])


def pair_parser(words: str) -> Callable[[Any], tuple[int, int] | None]:
    """A callback that reads two numbers, `0,600` as (0, 600).

    Args:
        words: how they are written, for the message.
    """

    def parse(text: str | tuple[int, int] | None) -> tuple[int, int] | None:
        if text is None or isinstance(text, tuple):
            return text
        found = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
        if not found:
            raise typer.BadParameter(f"{text!r} is not {words}")
        return int(found[1]), int(found[2])

    return parse


def given(context: typer.Context) -> dict[str, Any]:
    """The options that the user gave, by the name of the config field they set."""
    options = {name: value for name, value in context.params.items() if value is not None}
    if "rope" in options:
        options["enabled"] = options.pop("rope")
    return options


SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Run folder, checkpoint file, or published name.",
        show_default=False,
        autocompletion=completion.sources,
    ),
]


def given_rope(context: typer.Context) -> dict[str, Any]:
    """The RoPE options that the user gave, refused where no weights could have them.

    Raises:
        ConfigError: names the option and what is allowed.
    """
    chosen = {name: value for name, value in given(context).items() if name in ROPE_FIELDS}
    check_given(chosen)
    return chosen


# --- Spiral RoPE
Rope = Annotated[
    bool | None,
    option(
        "--rope/--no-rope",
        panel=ROPE,
        metavar=" ",
        text="Rotary embedding, or the baseline without.",
    ),
]
Rotate = Annotated[
    int | None,
    option(
        "--rotate",
        panel=ROPE,
        text="Half the number of directions; 0 and 1 are plain axial RoPE.",
    ),
]
Theta = Annotated[
    float | None,
    option("--theta", panel=ROPE, text="Ratio that spans the frequencies (lang)."),
]
FreqsFor = Annotated[
    str | None,
    option(
        "--freqs-for",
        panel=ROPE,
        **choice("Geometric or linear series of frequencies.", FREQS_FOR),
    ),
]
MaxFreq = Annotated[
    float | None, option("--max-freq", panel=ROPE, text="Highest frequency (pixel).")
]
TruncatePercentage = Annotated[
    float | None,
    option(
        "--truncate-percentage",
        panel=ROPE,
        text="Share of the lowest frequencies set to 0, in [0, 1).",
    ),
]
MaxFreqLang = Annotated[
    float | None,
    option("--max-freq-lang", panel=ROPE, text="Highest frequency in radians per patch (lang)."),
]
MinFreqLang = Annotated[
    float | None,
    option("--min-freq-lang", panel=ROPE, text="Lowest frequency (lang); 0 takes it from theta."),
]
SameTheta = Annotated[
    bool | None,
    option(
        "--same-theta/--no-same-theta",
        metavar=" ",
        panel=ROPE,
        text="All directions share one short series of frequencies.",
    ),
]
Projection = Annotated[
    str | None,
    option(
        "--projection",
        panel=ROPE,
        **choice("Positions cut off at the grid's border, or the paper's formula.", PROJECTIONS),
    ),
]
Scaling = Annotated[
    str | None,
    option(
        "--scaling",
        panel=ROPE,
        **choice("Positions on grids other than the trained one.", SCALINGS),
    ),
]

# --- Run
Epochs = Annotated[int | None, option("--epochs", panel=RUN, text="Length in epochs.")]
Out = Annotated[
    str | None,
    option(
        "--out",
        panel=RUN,
        text="Run folder; by default runs/COMMAND-ARCH-DATA-rROTATE[-NAME].",
        metavar="FOLDER",
    ),
]
Name = Annotated[
    str | None, option("--name", panel=RUN, text="Word at the end of the run folder's name.")
]
Seed = Annotated[
    int | None,
    option("--seed", panel=RUN, text="Of initial weights, data order and augmentation."),
]
BatchSize = Annotated[
    int | None, option("--batch-size", panel=RUN, text="Images per optimizer step, in all.")
]
MicroBatchSize = Annotated[
    int | None,
    option("--micro-batch-size", panel=RUN, text="Images at a time per process, at most."),
]
Resume = Annotated[
    str | None,
    option(
        "--resume",
        panel=RUN,
        **choice(
            "Go on from the newest checkpoint if there is one, insist on it, or never.",
            RESUME_MODES,
        ),
    ),
]
Config = Annotated[
    Path | None,
    option("--config", panel=RUN, text="config.yaml of a run to repeat; options win over it."),
]
Tracker = Annotated[
    str | None,
    option("--tracker", panel=RUN, **choice("Log to this one too.", TRACKERS)),
]
LogEvery = Annotated[int | None, option("--log-every", panel=RUN, text="Steps between log points.")]
ValidateEvery = Annotated[
    int | None, option("--validate-every", panel=RUN, text="Epochs between validations.")
]
SaveEvery = Annotated[
    int | None, option("--save-every", panel=RUN, text="Epochs between checkpoints.")
]
KeepLast = Annotated[
    int | None, option("--keep-last", panel=RUN, text="Newest checkpoints kept beside the best.")
]
KeepEvery = Annotated[
    int | None,
    option("--keep-every", panel=RUN, text="Steps whose multiples are kept for good; 0: none."),
]
DryRun = Annotated[
    bool, option("--dry-run", panel=RUN, metavar=" ", text="Print the resolved plan and stop.")
]

# --- Machine
Nproc = Annotated[
    int | None,
    option("--nproc", panel=MACHINE, text="Processes here; by default one per GPU, one on CPU."),
]
Nnodes = Annotated[int | None, option("--nnodes", panel=MACHINE, text="Machines.")]
RdzvEndpoint = Annotated[
    str | None,
    option(
        "--rdzv-endpoint",
        panel=MACHINE,
        text="Where several machines meet.",
        metavar="HOST:PORT",
    ),
]
Device = Annotated[
    str | None,
    option("--device", panel=MACHINE, **choice("By default a GPU, else the CPU.", DEVICES)),
]
Precision = Annotated[
    str | None,
    option(
        "--precision",
        panel=MACHINE,
        **choice("auto: bf16 where the device computes it.", PRECISIONS),
    ),
]
Compile = Annotated[
    bool | None,
    option("--compile/--no-compile", panel=MACHINE, metavar=" ", text="Through torch.compile."),
]
GradCheckpointing = Annotated[
    bool | None,
    option(
        "--grad-checkpointing",
        metavar=" ",
        panel=MACHINE,
        text="Less memory: compute activations twice.",
    ),
]
Workers = Annotated[
    int | None,
    option("--workers", panel=MACHINE, text="Loader processes per process, for image folders."),
]
