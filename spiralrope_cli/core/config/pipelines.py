"""What a whole pipeline is: the runs of its stages, settled before the first one starts.

Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from spiralrope_cli.core.config.diffusion import Sampler
from spiralrope_cli.core.config.dit_runs import DiTRun
from spiralrope_cli.core.config.option import (
    PATH,
    RECIPE,
    RUN,
    SAMPLES,
    STAGES,
    Opt,
    check_fields,
    numbers,
)
from spiralrope_cli.core.config.resolve import Resolved
from spiralrope_cli.core.config.runs import ClassifierRun, MachineConfig
from spiralrope_cli.core.errors import ConfigError

PRETRAIN, FINETUNE, EVALUATE = "pretrain", "finetune", "eval"
TRAIN, SAMPLE = "dit-train", "dit-sample"
MACHINE_FIELDS = frozenset(MachineConfig.__dataclass_fields__)
OF_BOTH_TRAININGS = MACHINE_FIELDS | {
    *("data", "seed", "micro_batch_size"),
    *("log_every", "validate_every", "save_every", "keep_last"),
}
"""Options that hold for pretraining and for finetuning; of the others, those of finetuning begin
with `finetune_`, or come with the weights."""


FROM_LEGACY = Opt(
    "Print the command for the words of an old run_all.sh line, and stop.", STAGES, metavar="WORDS"
)
DRY_RUN = Opt("Print the plans of all stages and stop.", STAGES)
FOLDER = Opt("Folder of all stages; by default runs/run-...-ARCH-DATA-rROTATE[-NAME].", RUN, **PATH)


@dataclass(frozen=True, kw_only=True)
class DeiTStages:
    """What `run deit` takes beside the options of its pretraining."""

    eval_only: Annotated[bool, Opt("Measure what is there, train nothing.", STAGES)] = False
    skip_training: Annotated[bool, Opt("Finetune and measure what was pretrained.", STAGES)] = False
    with_finetune: Annotated[
        bool,
        Opt(
            "With the second training, or measure the first one.",
            STAGES,
            flag="--finetune/--no-finetune",
        ),
    ] = True
    dry_run: Annotated[bool, DRY_RUN] = False
    from_legacy: Annotated[str | None, FROM_LEGACY] = None
    sweep: Annotated[
        tuple[str, ...],
        Opt(
            "rotate=none,0,2, lr=1e-3,2e-3, ...: one pipeline for each value; repeated, the grid.",
            STAGES,
            metavar="NAME=V,V",
            many=True,
        ),
    ] = ()
    seeds: Annotated[
        tuple[int, ...],
        Opt(
            "0,1,2: each configuration with each of these, the data order included.",
            STAGES,
            metavar="N,N",
            read=numbers,
            expects="a list of numbers, such as 0,1,2",
        ),
    ] = ()
    finetune_epochs: Annotated[int | None, Opt("Length of finetuning.", RUN, ge=1)] = None
    finetune_steps: Annotated[
        int | None, Opt("Finetuning in steps, in place of epochs.", RECIPE, ge=0)
    ] = None
    finetune_lr: Annotated[float | None, Opt("Base learning rate of finetuning.", RECIPE, ge=0)] = (
        None
    )
    finetune_warmup_epochs: Annotated[int | None, Opt("Warm-up of finetuning.", RECIPE, ge=0)] = (
        None
    )
    finetune_batch_size: Annotated[int | None, Opt("Images per step of finetuning.", RUN, ge=1)] = (
        None
    )
    out: Annotated[str, FOLDER] = ""

    def __post_init__(self) -> None:
        check_fields(self)
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"--seeds {','.join(map(str, self.seeds))} holds a number twice")


@dataclass(frozen=True, kw_only=True)
class DiTStages:
    """What `run dit` takes beside the options of its training."""

    dry_run: Annotated[bool, DRY_RUN] = False
    from_legacy: Annotated[str | None, FROM_LEGACY] = None
    num: Annotated[
        int | None, Opt("Images to draw; 50000, or 200 for a built-in set.", SAMPLES, ge=1)
    ] = None
    sampler: Annotated[Sampler, Opt("As dit-sample --sampler.", SAMPLES)] = "ddpm"
    sampling_steps: Annotated[str, Opt("250, or ddim25, ..., as dit-sample --steps.", SAMPLES)] = (
        "250"
    )
    cfg_scale: Annotated[float, Opt("Guidance; 1 is none.", SAMPLES, ge=1)] = 1.0
    sampling_seed: Annotated[int, Opt("Of the samples, whatever --seed is.", SAMPLES, ge=0)] = 100
    reference: Annotated[
        str,
        Opt(
            "Real images or their statistics, a folder or an .npz: measure FID against them.",
            SAMPLES,
            metavar="FILE",
        ),
    ] = ""
    weights: Annotated[str, Opt("Inception's, if not those fetched.", SAMPLES, metavar="FILE")] = ""
    out: Annotated[str, FOLDER] = ""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class DeiTPipeline:
    """Pretrain, finetune, the eight evaluations.

    Attributes:
        folder: of the pipeline, with a folder for each training.
        trainings: those that are wanted, in order.
        evaluated: folder of the training whose checkpoints are measured.
        machine: where the evaluations run.
    """

    folder: str
    trainings: tuple[Resolved[ClassifierRun], ...]
    evaluated: str
    machine: MachineConfig


@dataclass(frozen=True, kw_only=True)
class DiTPipeline:
    """Train, draw samples, measure them.

    Attributes:
        folder: of the pipeline, with a folder for the training and one for the samples.
        training: the first stage.
        sampling: field name -> value, given options of `dit-sample` alone.
        reference: what the samples are measured against, empty for no figures.
        weights: file with Inception's weights, empty for those that were fetched.
        machine: where samples are drawn and measured.
    """

    folder: str
    training: Resolved[DiTRun]
    sampling: dict[str, Any]
    reference: str
    weights: str
    machine: MachineConfig


def deit_stages(*, eval_only: bool, skip_training: bool, finetune: bool) -> tuple[str, ...]:
    """The stages that the flags leave.

    Raises:
        ConfigError: flags that exclude each other.
    """
    if eval_only and skip_training:
        raise ConfigError(
            "--eval-only and --skip-training exclude each other",
            "--eval-only measures what is there, --skip-training finetunes it first",
        )
    if skip_training and not finetune:
        raise ConfigError(
            "--skip-training and --no-finetune leave nothing to train",
            "use --eval-only --no-finetune",
        )
    if eval_only:
        return (EVALUATE,)
    trainings = [] if skip_training else [PRETRAIN]
    return (*trainings, *([FINETUNE] if finetune else []), EVALUATE)
