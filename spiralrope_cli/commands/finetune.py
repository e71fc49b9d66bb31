from __future__ import annotations

from typing import Any

from spiralrope_cli.commands.command import command
from spiralrope_cli.core.config.models import ARCH_OF_SOURCE
from spiralrope_cli.core.config.recipes import shown_defaults
from spiralrope_cli.core.config.runs import ClassifierRun
from spiralrope_cli.core.config.slurm import SlurmOptions
from spiralrope_cli.core.config.training import TrainOptions
from spiralrope_cli.core.runtime.slurm import Remaining


@command(
    ClassifierRun,
    TrainOptions,
    SlurmOptions,
    leave_out=("patch_size",),
    words={"arch": ARCH_OF_SOURCE.help},
    defaults=shown_defaults("finetune"),
)
def finetune(given: dict[str, Any]) -> Remaining:
    """Finetune a DeiT from a run, a checkpoint file or published weights.

    SOURCE is a run folder, a .pth, .pt or .safetensors file, a name of fetch --list,
    or hf:OWNER/NAME of the Hugging Face Hub.

    Starts from its EMA weights, with its sizes and RoPE options.

    For other classes the head is new; for another --image-size the position embedding is resampled.

    After an interruption run the same command again: it resumes.

    Examples:
      spiralrope finetune runs/pretrain-deit-ti-digits-r2     your own run
      spiralrope finetune deit-b --data ~/imagenet            published weights
      spiralrope finetune deit-b --data ~/birds --image-size 384
      spiralrope finetune checkpoint.pth --data ~/birds --freeze head-only
      spiralrope finetune deit-s --data ~/imagenet --dry-run
    """
    from spiralrope_cli.core.jobs.train import train

    return train("finetune", given)
