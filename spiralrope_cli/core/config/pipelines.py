"""What a whole pipeline is: the runs of its stages, settled before the first one starts.

Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spiralrope_cli.core.config.dit_runs import DiTRun
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
