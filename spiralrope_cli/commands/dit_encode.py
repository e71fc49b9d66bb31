from __future__ import annotations

from typing import Any

import typer

from spiralrope_cli.commands.command import SETTINGS, command
from spiralrope_cli.core.config.latents import EXACT, EncodeRun
from spiralrope_cli.core.config.training import TrainOptions

EXAMPLES = """
Examples:

  spiralrope dit-encode --data ~/imagenet/train           into latents/

  spiralrope dit-encode --data ~/imagenet --nproc 8       one process per GPU

  spiralrope dit-encode --data photos --image-size 512 --out latents-512

  spiralrope dit-encode --data photos --vae ~/my-vae --skip-bad

  spiralrope dit-train --latents latents                  what they are for
"""

app = typer.Typer(**SETTINGS)


@command(
    app,
    "dit-encode",
    EncodeRun,
    TrainOptions,
    examples=EXAMPLES,
    leave_out=("name", "config", "compile", "grad_checkpointing", "resume", "tracker"),
    words={"precision": "Of the VAE."},
    defaults={"precision": EXACT},
)
def dit_encode(given: dict[str, Any]) -> None:
    """Encode images by a VAE once, so that DiT trains from cached latents.

    It holds the posterior's mean and deviation: every epoch draws anew, mirrored or not.

    The same command again goes on, and encodes anew what is damaged.
    """
    from spiralrope_cli.core.jobs.encode import encode

    encode(given)
