"""Options of model, data and recipe that training commands share."""

from __future__ import annotations

from typing import Annotated

from spiralrope_cli.commands import completion
from spiralrope_cli.commands.options import DATA, MODEL, RECIPE, choice, option, parse_size
from spiralrope_cli.core.config.optim import FREEZES, LR_RULES, SCHEDULES
from spiralrope_cli.core.config.runs import GEOMETRIES

# --- Model
Arch = Annotated[
    str | None,
    option(
        "--arch",
        panel=MODEL,
        text="deit-ti, deit-s, deit-b, deit-l, or by numbers: deit-WIDTHxDEPTHxHEADS.",
        metavar="NAME",
        autocompletion=completion.deit_archs,
    ),
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

# --- Data and augmentation
Data = Annotated[
    str | None,
    option(
        "--data",
        panel=DATA,
        text="digits, fashion-mnist, or a folder with train/ and val/ of class folders. "
        "Without it: $SPIRALROPE_DATA, else the bundled digits.",
        metavar="NAME|FOLDER",
        autocompletion=completion.data_sets,
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
        **choice("Random resized crop, or small shifts and rotations.", GEOMETRIES),
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
    option(
        "--skip-bad",
        panel=DATA,
        metavar=" ",
        text="Go on without unreadable images, and count them.",
    ),
]

# --- Recipe
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
        **choice("linear: times total batch / 512; none: as given.", LR_RULES),
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
        **choice("Per step, flat, or per epoch as the published code.", SCHEDULES),
    ),
]
Freeze = Annotated[
    str | None,
    option(
        "--freeze",
        panel=RECIPE,
        **choice("Train the attention and the head alone, or the head alone.", FREEZES),
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
