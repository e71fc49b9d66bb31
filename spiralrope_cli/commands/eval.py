from __future__ import annotations

import math
from typing import Any

from spiralrope_cli.commands.command import Command, command
from spiralrope_cli.core.config.evals import BOTH_CROP_RATIOS, EvalOptions
from spiralrope_cli.core.config.models import BY_WEIGHTS, RopeConfig
from spiralrope_cli.core.config.slurm import SlurmOptions
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.runtime.slurm import Remaining


class CropRatioCommand(Command):
    """A command whose `--crop-ratio` without a value means both ratios."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Inserts the two values where none is given."""
        return super().parse_args(ctx, with_both_ratios(args))


def with_both_ratios(words: list[str]) -> list[str]:
    """Replaces each `--crop-ratio` without a number by one option for each ratio."""
    filled: list[str] = []
    for place, word in enumerate(words):
        if word == "--":
            return filled + words[place:]
        following = words[place + 1] if place + 1 < len(words) else ""
        if word == "--crop-ratio" and not _is_number(following):
            filled += [f"{word}={ratio}" for ratio in BOTH_CROP_RATIOS]
        else:
            filled.append(word)
    return filled


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


@command(
    EvalOptions,
    RopeConfig,
    MachineConfig,
    SlurmOptions,
    leave_out=("grad_checkpointing", "shard", "resume", "tracker"),
    defaults=BY_WEIGHTS,
    cls=CropRatioCommand,
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
