"""Options of `dit-train` alone, and those whose words differ from a classifier's."""

from __future__ import annotations

from typing import Annotated

from spiralrope_cli.commands import completion
from spiralrope_cli.commands.options import DATA, MODEL, RECIPE, ROPE, RUN, choice, option
from spiralrope_cli.core.config.dit_runs import DIT_SCHEDULES, NO_VAE
from spiralrope_cli.core.config.latents import VAE_NAMES

# --- Model
Arch = Annotated[
    str | None,
    option(
        "--arch",
        panel=MODEL,
        text="dit-ti2 to dit-xl8 (the digit is the patch side), DiT-XL/2, "
        "or by numbers: dit-WIDTHxDEPTHxHEADS-PATCH.",
        metavar="NAME",
        autocompletion=completion.dit_archs,
    ),
]
QkNorm = Annotated[
    bool | None,
    option("--qk-norm", panel=MODEL, metavar=" ", text="Normalise queries and keys."),
]
Init = Annotated[
    str | None,
    option(
        "--init",
        panel=MODEL,
        text="Start from the EMA weights of a run, a file or a published name.",
        metavar="SOURCE",
        autocompletion=completion.sources,
    ),
]
Rotate = Annotated[
    int | None,
    option(
        "--rotate",
        panel=ROPE,
        text="Half the number of directions; by default 0, as published: plain axial RoPE.",
    ),
]

# --- Data
Data = Annotated[
    str | None,
    option(
        "--data",
        panel=DATA,
        text="digits, fashion-mnist, or a folder of class folders, or one with train/. "
        "Without it: $SPIRALROPE_DATA, else the bundled digits.",
        metavar="NAME|FOLDER",
        autocompletion=completion.data_sets,
    ),
]
Vae = Annotated[
    str | None,
    option(
        "--vae",
        panel=DATA,
        text="ema, mse, a folder in diffusers' layout, or none: pixels.",
        metavar="NAME|FOLDER",
        autocompletion=completion.words(*VAE_NAMES, NO_VAE),
    ),
]
Latents = Annotated[
    str | None,
    option(
        "--latents",
        panel=DATA,
        text="Train from a folder of dit-encode, in place of --data.",
        metavar="FOLDER",
    ),
]

# --- Recipe
Lr = Annotated[float | None, option("--lr", panel=RECIPE, text="Learning rate.")]
Schedule = Annotated[
    str | None,
    option("--schedule", panel=RECIPE, **choice("Per step, or flat.", DIT_SCHEDULES)),
]
LabelDropout = Annotated[
    float | None,
    option("--label-dropout", panel=RECIPE, text="Share of labels made null, for guidance."),
]

# --- Run
Seed = Annotated[
    int | None,
    option("--seed", panel=RUN, text="Of initial weights, data order, timesteps and noise."),
]
SampleEvery = Annotated[
    int | None,
    option("--sample-every", panel=RUN, text="Steps between sample grids; 0: at the end alone."),
]
SaveEvery = Annotated[
    int | None, option("--save-every", panel=RUN, text="Steps between checkpoints.")
]
KeepLast = Annotated[int | None, option("--keep-last", panel=RUN, text="Newest checkpoints kept.")]
