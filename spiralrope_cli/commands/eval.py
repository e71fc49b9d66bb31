from __future__ import annotations

from typing import Any

from spiralrope_cli.commands.command import command
from spiralrope_cli.core.config.evals import EvalOptions
from spiralrope_cli.core.config.models import BY_WEIGHTS, RopeConfig
from spiralrope_cli.core.config.slurm import SlurmOptions
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.runtime.slurm import Remaining


@command(
    EvalOptions,
    RopeConfig,
    MachineConfig,
    SlurmOptions,
    leave_out=("grad_checkpointing", "shard", "resume", "tracker"),
    defaults=BY_WEIGHTS,
)
def eval(given: dict[str, Any]) -> Remaining:
    """Evaluate acc@1, acc@5 and loss on the validation images.

    Without options: the last raw weights of the newest classifier run, at the crop ratio of its
    data set. Sizes and RoPE options are those of SOURCE; options override them, with a warning.

    Prints a table, and adds the rows with all settings to eval.json in the run folder.

    Examples:
      spiralrope eval                              last weights of the newest run
      spiralrope eval --ema --crop-ratio           its EMA weights, both ratios
      spiralrope eval runs/x --all                 all eight rows
      spiralrope eval deit-b --data ~/imagenet     published weights
      spiralrope eval deit-b --image-size 224 --image-size 384
      spiralrope eval deit-b --data ~/imagenet-r   200 classes; also -V2, -Sketch
      spiralrope eval runs/x runs/y --json         several at once, for scripts
    """
    from spiralrope_cli.core.jobs import evaluate as job

    return job.evaluate(given)
