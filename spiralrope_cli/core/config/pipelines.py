"""Options of `run deit` and `run dit` beside those of their trainings. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
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
from spiralrope_cli.core.config.samples import GuidanceConfig, SamplerName, SampleRun, check_chain
from spiralrope_cli.core.config.training import MachineConfig, OptimConfig
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
OF_PRETRAINING = OptimConfig.__dataclass_fields__.keys() | {"drop_path"}
"""Those that finetuning has values of its own for."""

FROM_LEGACY = Opt(
    "Print the command for the words of an old run_all.sh line, and stop.", STAGES, metavar="WORDS"
)
DRY_RUN = Opt("Print the plans of all stages and stop.", STAGES)
FOLDER = Opt("Folder of all stages; by default runs/run-...-ARCH-DATA-rROTATE[-NAME].", RUN, **PATH)


@dataclass(frozen=True, kw_only=True)
class DeiTStages:
    """What `run deit` takes beside the options of its pretraining."""

    eval_only: Annotated[bool, Opt("Evaluate only; train nothing.", STAGES)] = False
    skip_training: Annotated[bool, Opt("Finetune the saved pretraining run.", STAGES)] = False
    with_finetune: Annotated[
        bool,
        Opt(
            "Finetune after pretraining, or evaluate the pretrained model.",
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
            "0,1,2: repeat every configuration with each seed (weights, data order, augmentation).",
            STAGES,
            metavar="N,N",
            read=numbers,
            expects="a list of numbers, such as 0,1,2",
        ),
    ] = ()
    finetune_epochs: Annotated[int | None, Opt("Number of epochs of finetuning.", RUN, ge=1)] = None
    finetune_max_steps: Annotated[
        int | None,
        Opt("Steps of finetuning, in place of epochs.", RECIPE, ge=0, was="--finetune-steps"),
    ] = None
    finetune_lr: Annotated[float | None, Opt("Learning rate of finetuning.", RECIPE, ge=0)] = None
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
        if self.eval_only and self.skip_training:
            raise ConfigError(
                "--eval-only and --skip-training exclude each other",
                "--eval-only measures what is there, --skip-training finetunes it first",
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

    @property
    def pretrains(self) -> bool:
        """Whether the first training is wanted now."""
        return not (self.eval_only or self.skip_training)

    @property
    def finetunes(self) -> bool:
        """Whether the second training is wanted now."""
        return self.with_finetune and not self.eval_only


@dataclass(frozen=True, kw_only=True)
class DiTStages:
    """What `run dit` takes beside the options of its training."""

    dry_run: Annotated[bool, DRY_RUN] = False
    from_legacy: Annotated[str | None, FROM_LEGACY] = None
    num_samples: Annotated[
        int | None,
        Opt("Number of images; 50000, or 200 of a built-in set.", SAMPLES, ge=1, was="--num"),
    ] = None
    sampler: Annotated[SamplerName, Opt("As dit-sample --sampler.", SAMPLES)] = SampleRun.sampler
    num_sampling_steps: Annotated[
        str,
        Opt("Sampling steps: 250, or ddim25.", SAMPLES, was="--sampling-steps"),
    ] = SampleRun.num_sampling_steps
    cfg_scale: Annotated[float, Opt("Guidance scale; 1: none.", SAMPLES, ge=1)] = (
        GuidanceConfig.cfg_scale
    )
    sampling_seed: Annotated[int, Opt("Seed of sampling; not --seed.", SAMPLES, ge=0)] = (
        SampleRun.seed
    )
    reference: Annotated[
        str,
        Opt(
            "Real images or their statistics, a folder or an .npz, for the FID.",
            SAMPLES,
            metavar="FILE",
        ),
    ] = ""
    weights: Annotated[str, Opt("Inception weights, if not fetched.", SAMPLES, metavar="FILE")] = ""
    out: Annotated[str, FOLDER] = ""

    def __post_init__(self) -> None:
        check_fields(self)
        check_chain(self.sampler, self.num_sampling_steps)
