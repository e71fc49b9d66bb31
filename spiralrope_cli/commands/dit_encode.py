from __future__ import annotations

from typing import Any

from spiralrope_cli.commands.command import command
from spiralrope_cli.core.config.samples import EXACT, EncodeRun
from spiralrope_cli.core.config.slurm import SlurmOptions
from spiralrope_cli.core.config.training import TrainOptions
from spiralrope_cli.core.runtime.slurm import Remaining


@command(
    EncodeRun,
    TrainOptions,
    SlurmOptions,
    leave_out=("name", "config", "compile", "grad_checkpointing", "shard", "resume", "tracker"),
    words={"precision": "Precision of the VAE."},
    defaults={"precision": EXACT},
)
def dit_encode(given: dict[str, Any]) -> Remaining:
    """Encode images with a VAE once, to train a DiT from cached latents.

    Writes mean and standard deviation of the posterior, so that each epoch samples new latents.

    After an interruption run the same command again: it resumes, and encodes damaged shards again.

    Examples:
      spiralrope dit-encode --data ~/imagenet/train           writes to latents/
      spiralrope dit-encode --data ~/imagenet --nproc 8       one process per GPU
      spiralrope dit-encode --data photos --image-size 512 --out latents-512
      spiralrope dit-encode --data photos --vae ~/my-vae --skip-bad
      spiralrope dit-train --latents latents                  train from them
    """
    from spiralrope_cli.core.jobs.encode import encode

    return encode(given)
