from __future__ import annotations

from typing import Any

from spiralrope_cli.commands.command import command
from spiralrope_cli.core.config.dit_runs import DIT_WORDS, DiTRun
from spiralrope_cli.core.config.recipes import shown_defaults
from spiralrope_cli.core.config.slurm import SlurmOptions
from spiralrope_cli.core.config.training import TrainOptions
from spiralrope_cli.core.runtime.slurm import Remaining


@command(
    DiTRun,
    TrainOptions,
    SlurmOptions,
    leave_out=("lr_rule", "freeze"),
    words=DIT_WORDS,
    defaults=shown_defaults("dit-train"),
)
def dit_train(given: dict[str, Any]) -> Remaining:
    """Train a class-conditional DiT (diffusion transformer) with Spiral RoPE.

    Without options: DiT-Ti/2 on the pixels of the bundled digits, in minutes on two CPU cores.

    Its RoPE is axial unless --rotate is given, as in the published runs: --rotate 0.

    Other defaults are from --config, the data set and the published recipe.

    After an interruption run the same command again: it resumes.

    Examples:
      spiralrope dit-train                                   DiT-Ti/2 on digits
      spiralrope dit-train --rotate 2 --name four            four directions
      spiralrope dit-train --data ~/imagenet --arch dit-b4   the published recipe
      spiralrope dit-train --arch dit-b4 --latents latents   from cached latents
      spiralrope dit-train --init-from dit-xl2 --data flowers
      spiralrope dit-train --fid-every 5000 --fid-reference imagenet256.npz
      spiralrope dit-train --dry-run                         print the plan
    """
    from spiralrope_cli.core.jobs.train import train

    return train("dit-train", given)
