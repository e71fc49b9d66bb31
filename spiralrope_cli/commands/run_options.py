"""Options of `run` alone, and those whose words differ from the single commands'."""

from __future__ import annotations

from typing import Annotated

from spiralrope_cli.commands.options import RECIPE, RUN, choice, option
from spiralrope_cli.core.config.diffusion import SAMPLERS

STAGES, SAMPLING = "Stages", "Samples and figures"

# --- Stages
EvalOnly = Annotated[
    bool,
    option("--eval-only", panel=STAGES, metavar=" ", text="Measure what is there, train nothing."),
]
SkipTraining = Annotated[
    bool,
    option(
        "--skip-training",
        panel=STAGES,
        metavar=" ",
        text="Finetune and measure what was pretrained.",
    ),
]
Finetune = Annotated[
    bool,
    option(
        "--finetune/--no-finetune",
        panel=STAGES,
        metavar=" ",
        text="With the second training, or measure the first one.",
    ),
]
FromLegacy = Annotated[
    str | None,
    option(
        "--from-legacy",
        panel=STAGES,
        text="Print the command for the words of an old run_all.sh line, and stop.",
        metavar="WORDS",
    ),
]
DryRun = Annotated[
    bool,
    option("--dry-run", panel=STAGES, metavar=" ", text="Print the plans of all stages and stop."),
]
Sweep = Annotated[
    list[str] | None,
    option(
        "--sweep",
        panel=STAGES,
        text="rotate=none,0,2, lr=1e-3,2e-3, ...: one pipeline for each value; repeated, the grid.",
        metavar="NAME=V,V",
    ),
]
Seeds = Annotated[
    str | None,
    option(
        "--seeds",
        panel=STAGES,
        text="0,1,2: each configuration with each of these, the data order included.",
        metavar="N,N",
    ),
]

# --- The second training of `run deit`
FinetuneEpochs = Annotated[
    int | None, option("--finetune-epochs", panel=RUN, text="Length of finetuning.")
]
FinetuneSteps = Annotated[
    int | None,
    option("--finetune-steps", panel=RECIPE, text="Finetuning in steps, in place of epochs."),
]
FinetuneLr = Annotated[
    float | None, option("--finetune-lr", panel=RECIPE, text="Base learning rate of finetuning.")
]
FinetuneWarmupEpochs = Annotated[
    int | None, option("--finetune-warmup-epochs", panel=RECIPE, text="Warm-up of finetuning.")
]
FinetuneBatchSize = Annotated[
    int | None,
    option("--finetune-batch-size", panel=RUN, text="Images per step of finetuning."),
]

# --- Run
Out = Annotated[
    str | None,
    option(
        "--out",
        panel=RUN,
        text="Folder of all stages; by default runs/run-...-ARCH-DATA-rROTATE[-NAME].",
        metavar="FOLDER",
    ),
]

# --- Samples and figures of `run dit`
Num = Annotated[
    int | None,
    option("--num", panel=SAMPLING, text="Images to draw; 50000, or 200 for a built-in set."),
]
Sampler = Annotated[
    str | None,
    option("--sampler", panel=SAMPLING, **choice("As dit-sample --sampler; ddpm.", SAMPLERS)),
]
SamplingSteps = Annotated[
    str | None,
    option("--sampling-steps", panel=SAMPLING, text="250, or ddim25, ..., as dit-sample --steps."),
]
CfgScale = Annotated[
    float | None, option("--cfg-scale", panel=SAMPLING, text="Guidance; 1 is none.")
]
SamplingSeed = Annotated[
    int | None,
    option("--sampling-seed", panel=SAMPLING, text="Of the samples; 100 whatever --seed is."),
]
Reference = Annotated[
    str | None,
    option(
        "--reference",
        panel=SAMPLING,
        text="Real images or their statistics, a folder or an .npz: measure FID against them.",
        metavar="FILE",
    ),
]
Weights = Annotated[
    str | None,
    option("--weights", panel=SAMPLING, text="Inception's, if not those fetched.", metavar="FILE"),
]
