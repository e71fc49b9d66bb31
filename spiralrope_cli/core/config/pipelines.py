"""Options of `run deit` and `run dit`, besides those of training. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from spiralrope_cli.core.config.option import (
    PATH,
    RECIPE,
    RUN,
    SAMPLES,
    STAGES,
    Opt,
    check_fields,
    leaves,
    numbers,
)
from spiralrope_cli.core.config.samples import (
    NUM_SAMPLES,
    GuidanceConfig,
    SamplerName,
    SampleRun,
    check_chain,
)
from spiralrope_cli.core.config.training import MachineConfig, OptimConfig
from spiralrope_cli.core.errors import ConfigError

PRETRAIN, FINETUNE, EVALUATE = "pretrain", "finetune", "eval"
TRAIN, SAMPLE = "dit-train", "dit-sample"
MACHINE_FIELDS = frozenset(MachineConfig.__dataclass_fields__)
OF_BOTH_TRAININGS = MACHINE_FIELDS | {
    *("data", "seed", "micro_batch_size"),
    *("log_every", "validate_every", "save_every", "keep_last"),
}
"""Options for both pretraining and finetuning. Other options of finetuning begin with `finetune_`,
or come from the weights."""
OF_PRETRAINING = OptimConfig.__dataclass_fields__.keys() | {"drop_path"}
"""Options with other values in finetuning."""

FROM_LEGACY = Opt(
    "Print the command for the arguments of an original run_all.sh line, and stop.",
    STAGES,
    metavar="WORDS",
    may_be_empty=True,
)
DRY_RUN = Opt("Print the plans of all stages and stop.", STAGES)
FOLDER = Opt("Folder of all stages; by default runs/run-...-ARCH-DATA-rROTATE[-NAME].", RUN, **PATH)


@dataclass(frozen=True, kw_only=True)
class DeiTStages:
    """Options of `run deit`, besides those of pretraining."""

    eval_only: Annotated[bool, Opt("Only evaluate; no training.", STAGES)] = False
    skip_training: Annotated[bool, Opt("Finetune the saved pretraining run.", STAGES)] = False
    with_finetune: Annotated[
        bool,
        Opt(
            "Finetune after pretraining; else evaluate the pretrained model.",
            STAGES,
            flag="--finetune/--no-finetune",
        ),
    ] = True
    dry_run: Annotated[bool, DRY_RUN] = False
    from_legacy: Annotated[str | None, FROM_LEGACY] = None
    sweep: Annotated[
        tuple[str, ...],
        Opt(
            "One pipeline per value: rotate=none,axial,2, lr=1e-3,2e-3; repeatable, for a grid.",
            STAGES,
            metavar="NAME=V,V",
            many=True,
        ),
    ] = ()
    seeds: Annotated[
        tuple[int, ...],
        Opt(
            "Repeat each configuration with these seeds (weights, data order, augmentation).",
            STAGES,
            metavar="N,N",
            read=numbers,
            expects="a list of numbers, such as 0,1,2",
        ),
    ] = ()
    finetune_epochs: Annotated[int | None, Opt("Number of epochs of finetuning.", RUN, ge=1)] = None
    finetune_max_steps: Annotated[
        int | None,
        Opt(
            "Number of steps of finetuning, in place of epochs.",
            RECIPE,
            ge=0,
            was="--finetune-steps",
        ),
    ] = None
    finetune_lr: Annotated[float | None, Opt("Learning rate of finetuning.", RECIPE, ge=0)] = None
    finetune_warmup_epochs: Annotated[
        int | None, Opt("Warm-up epochs of finetuning.", RECIPE, ge=0)
    ] = None
    finetune_batch_size: Annotated[int | None, Opt("Batch size of finetuning.", RUN, ge=1)] = None
    out: Annotated[str, FOLDER] = ""

    def __post_init__(self) -> None:
        check_fields(self)
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"--seeds {','.join(map(str, self.seeds))} has a number twice")
        if self.eval_only and self.skip_training:
            raise ConfigError(
                "--eval-only and --skip-training exclude each other",
                "--eval-only evaluates the existing run, --skip-training finetunes it first",
            )
        if self.skip_training and not self.with_finetune:
            raise ConfigError(
                "--skip-training and --no-finetune leave nothing to train",
                "use --eval-only --no-finetune",
            )
        for name, value in vars(self).items():
            if name.startswith("finetune_") and value is not None and not self.with_finetune:
                raise ConfigError(
                    f"{leaves(DeiTStages)[name].called} has no effect with --no-finetune",
                    "leave one of them out",
                )


@dataclass(frozen=True, kw_only=True)
class DiTStages:
    """Options of `run dit`, besides those of training."""

    dry_run: Annotated[bool, DRY_RUN] = False
    from_legacy: Annotated[str | None, FROM_LEGACY] = None
    num_samples: Annotated[int | None, replace(NUM_SAMPLES, panel=SAMPLES)] = None
    sampler: Annotated[SamplerName, Opt("Sampler.", SAMPLES)] = SampleRun.sampler
    num_sampling_steps: Annotated[
        str, Opt("Number of sampling steps, or ddim25.", SAMPLES, was="--sampling-steps")
    ] = SampleRun.num_sampling_steps
    cfg_scale: Annotated[float, Opt("Guidance scale; 1: no guidance.", SAMPLES, ge=1)] = (
        GuidanceConfig.cfg_scale
    )
    sampling_seed: Annotated[int, Opt("Seed of sampling.", SAMPLES, ge=0)] = SampleRun.seed
    reference: Annotated[
        str,
        Opt(
            "Real images or their statistics, for the FID: a folder or an .npz.",
            SAMPLES,
            metavar="FILE",
        ),
    ] = ""
    weights: Annotated[
        str, Opt("Inception weights; by default those of fetch inception.", SAMPLES, metavar="FILE")
    ] = ""
    out: Annotated[str, FOLDER] = ""

    def __post_init__(self) -> None:
        check_fields(self)
        check_chain(self.sampler, self.num_sampling_steps)
