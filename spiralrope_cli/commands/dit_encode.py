from __future__ import annotations

import os
from typing import Any

import typer

from spiralrope_cli.commands.command import SETTINGS, command
from spiralrope_cli.core.config.latents import EncodeRun, class_folder
from spiralrope_cli.core.config.nested import build
from spiralrope_cli.core.config.resolve import DATA_VARIABLE
from spiralrope_cli.core.config.training import TrainOptions
from spiralrope_cli.core.errors import DataError
from spiralrope_cli.core.runtime.launch import launch

EXACT = "fp32"
"""Latents are made once and used for a whole training, so that the exact ones are worth it."""

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
    from spiralrope_cli.core.hub.networks import local_vae

    dry_run = given.pop("dry_run", False)
    values = {"precision": EXACT, "data": os.environ.get(DATA_VARIABLE), **given}
    if not values["data"]:
        raise DataError(
            "--data is missing",
            f"name a folder with one folder of images per class, or set {DATA_VARIABLE}",
        )
    run: EncodeRun = build(EncodeRun, values)
    class_folder(run.data)
    local_vae(run.vae)
    from spiralrope_cli.core.jobs import encode as job  # from here on with torch

    job.plan(run, dry_run=dry_run)
    if not dry_run:
        launch("spiralrope_cli.core.jobs.encode:work", run)
