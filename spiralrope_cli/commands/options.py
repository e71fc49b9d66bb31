"""Options that more than one command takes. An option that was not given is None."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from spiralrope_cli.core.config.rope import FREQS_FOR, PROJECTIONS, SCALINGS
from spiralrope_cli.core.config.runs import (
    LR_RULES,
    PRECISIONS,
    RESUME_MODES,
    SCHEDULES,
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


def option(*names: str, panel: str, text: str, metavar: str | None = None, **more: Any) -> Any:
    """A typer option without a default of its own: the recipe and the data set know it."""
    return typer.Option(
        *names, rich_help_panel=panel, help=text, metavar=metavar, show_default=False, **more
    )


def choice(allowed: tuple[str, ...]) -> str:
    """How an option with a few words shows them."""
    return "|".join(allowed)


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


def given(context: typer.Context) -> dict[str, Any]:
    """The options that the user gave, by the name of the config field they set."""
    options = {name: value for name, value in context.params.items() if value is not None}
    if "rope" in options:
        options["enabled"] = options.pop("rope")
    return options


# --- Model
Arch = Annotated[
    str | None,
    option("--arch", panel=MODEL, text="deit-ti, deit-s, deit-b or deit-l.", metavar="NAME"),
]
ImageSize = Annotated[
    str | None,
    option(
        "--image-size",
        panel=MODEL,
        text="Side, or height x width, in pixels.",
        metavar="N|HxW",
        callback=parse_size,
    ),
]
PatchSize = Annotated[
    int | None, option("--patch-size", panel=MODEL, text="Side of a patch in pixels.")
]
DropPath = Annotated[
    float | None, option("--drop-path", panel=MODEL, text="Stochastic depth rate in [0, 1).")
]

# --- Spiral RoPE
Rope = Annotated[
    bool | None,
    option("--rope/--no-rope", panel=ROPE, text="Rotary embedding, or the baseline without."),
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
        text="Geometric or linear series of frequencies.",
        metavar=choice(FREQS_FOR),
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
        panel=ROPE,
        text="All directions share one short series of frequencies.",
    ),
]
Projection = Annotated[
    str | None,
    option(
        "--projection",
        panel=ROPE,
        text="Positions cut off at the grid's border, or the paper's formula.",
        metavar=choice(PROJECTIONS),
    ),
]
Scaling = Annotated[
    str | None,
    option(
        "--scaling",
        panel=ROPE,
        text="Positions on grids other than the trained one.",
        metavar=choice(SCALINGS),
    ),
]

# --- Data and augmentation
Data = Annotated[
    str | None,
    option(
        "--data",
        panel=DATA,
        text="digits, fashion-mnist, or a folder with train/ and val/ of class folders. "
        "Without it: $SPIRALROPE_DATA, else the bundled digits.",
        metavar="NAME|FOLDER",
    ),
]
CropRatio = Annotated[
    float | None,
    option(
        "--crop-ratio",
        panel=DATA,
        text="Validation resizes to image size / this, then crops the centre.",
    ),
]
Geometry = Annotated[
    str | None,
    option(
        "--geometry",
        panel=DATA,
        text="Random resized crop, or small shifts and rotations.",
        metavar="crop|shift",
    ),
]
CropScale = Annotated[
    float | None,
    option("--crop-scale", panel=DATA, text="Smallest share of the area that crop keeps."),
]
MaxShift = Annotated[
    float | None, option("--max-shift", panel=DATA, text="Pixels that shift moves by, at most.")
]
MaxRotation = Annotated[
    float | None, option("--max-rotation", panel=DATA, text="Degrees that shift turns by, at most.")
]
Hflip = Annotated[float | None, option("--hflip", panel=DATA, text="Probability of mirroring.")]
AutoAugment = Annotated[
    str | None,
    option(
        "--auto-augment",
        panel=DATA,
        text="timm's name: 3a (3-Augment), rand-m9-mstd0.5-inc1 (RandAugment), ...; or none.",
        metavar="NAME",
    ),
]
ColorJitter = Annotated[
    float | None, option("--color-jitter", panel=DATA, text="Strength, 0 for none.")
]
RandomErasing = Annotated[
    float | None, option("--random-erasing", panel=DATA, text="Probability, 0 for none.")
]
RepeatedAug = Annotated[
    int | None,
    option("--repeated-aug", panel=DATA, text="Times each picture stands in a row; 1 is off."),
]
Mixup = Annotated[float | None, option("--mixup", panel=DATA, text="Alpha, 0 for none.")]
Cutmix = Annotated[float | None, option("--cutmix", panel=DATA, text="Alpha, 0 for none.")]
Smoothing = Annotated[
    float | None, option("--smoothing", panel=DATA, text="Label smoothing in [0, 1).")
]
SkipBad = Annotated[
    bool | None,
    option("--skip-bad", panel=DATA, text="Go on without unreadable images, and count them."),
]

# --- Recipe
Epochs = Annotated[int | None, option("--epochs", panel=RUN, text="Length in epochs.")]
Steps = Annotated[
    int | None,
    option("--steps", panel=RECIPE, text="Length in optimizer steps, in place of epochs."),
]
Lr = Annotated[
    float | None, option("--lr", panel=RECIPE, text="Base learning rate, before the rule.")
]
LrRule = Annotated[
    str | None,
    option(
        "--lr-rule",
        panel=RECIPE,
        text="linear: times total batch / 512; none: as given.",
        metavar=choice(LR_RULES),
    ),
]
MinLr = Annotated[float | None, option("--min-lr", panel=RECIPE, text="Where the cosine ends.")]
WarmupEpochs = Annotated[
    int | None, option("--warmup-epochs", panel=RECIPE, text="Length of the linear warm-up.")
]
Schedule = Annotated[
    str | None,
    option(
        "--schedule",
        panel=RECIPE,
        text="Cosine per step, constant, or the published code's steps per epoch.",
        metavar=choice(SCHEDULES),
    ),
]
WeightDecay = Annotated[
    float | None, option("--weight-decay", panel=RECIPE, text="Of AdamW, on matrices alone.")
]
ClipGrad = Annotated[
    float | None, option("--clip-grad", panel=RECIPE, text="Largest gradient norm, 0 for none.")
]
EmaDecay = Annotated[
    float | None, option("--ema-decay", panel=RECIPE, text="Of the averaged weights, per step.")
]

# --- Run
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
        text="Go on from the newest checkpoint: if there is one, only if, or not.",
        metavar=choice(RESUME_MODES),
    ),
]
Config = Annotated[
    Path | None,
    option("--config", panel=RUN, text="config.yaml of a run to repeat; options win over it."),
]
Tracker = Annotated[
    str | None,
    option("--tracker", panel=RUN, text="Log there too.", metavar=choice(TRACKERS)),
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
DryRun = Annotated[bool, option("--dry-run", panel=RUN, text="Print the resolved plan and stop.")]

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
    option("--device", panel=MACHINE, text="By default the GPU.", metavar="auto|cpu|cuda|mps"),
]
Precision = Annotated[
    str | None,
    option(
        "--precision",
        panel=MACHINE,
        text="auto: bf16 where the device computes it.",
        metavar=choice(PRECISIONS),
    ),
]
Compile = Annotated[
    bool | None, option("--compile/--no-compile", panel=MACHINE, text="Through torch.compile.")
]
GradCheckpointing = Annotated[
    bool | None,
    option(
        "--grad-checkpointing/--no-grad-checkpointing",
        panel=MACHINE,
        text="Less memory: compute activations twice.",
    ),
]
Workers = Annotated[
    int | None,
    option("--workers", panel=MACHINE, text="Loader processes per process, for image folders."),
]
