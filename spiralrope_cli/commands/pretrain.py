from __future__ import annotations

from typing import Any

from spiralrope_cli.commands.command import command
from spiralrope_cli.core.config.recipes import shown_defaults
from spiralrope_cli.core.config.runs import ClassifierRun
from spiralrope_cli.core.config.slurm import SlurmOptions
from spiralrope_cli.core.config.training import TrainOptions
from spiralrope_cli.core.runtime.slurm import Remaining


@command(
    ClassifierRun,
    TrainOptions,
    SlurmOptions,
    leave_out=("source", "ema", "freeze"),
    defaults=shown_defaults("pretrain"),
)
def pretrain(given: dict[str, Any]) -> Remaining:
    """Train a DeiT with Spiral RoPE from scratch.

    Without options: DeiT-Ti on the bundled digits, in minutes on two CPU cores.

    Other defaults are from --config, the data set and the published recipe.

    After an interruption run the same command again: it resumes.

    Examples:
      spiralrope pretrain                                DeiT-Ti on digits
      spiralrope pretrain --arch deit-s --rotate 2       four directions
      spiralrope pretrain --no-rope --name baseline      no rotary embedding
      spiralrope pretrain --data ~/imagenet --nproc 8    the published recipe
      spiralrope pretrain --dry-run                      print the plan
      spiralrope pretrain --config runs/x/config.yaml --seed 1 --name seed1
    """
    from spiralrope_cli.core.jobs.train import train

    return train("pretrain", given)
