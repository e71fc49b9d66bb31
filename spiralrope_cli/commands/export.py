from __future__ import annotations

from typing import Any

import typer

from spiralrope_cli.commands.command import SETTINGS, command
from spiralrope_cli.core.config.hub import ExportRun
from spiralrope_cli.core.config.models import BY_WEIGHTS, RopeConfig

EXAMPLES = """
Examples:

  spiralrope export runs/pretrain-deit-s-digits-r2 --layout published

  spiralrope export runs/pretrain-deit-s-digits-r2 --layout safetensors --ema

  spiralrope export deit-b --layout safetensors --out weights/deit-b

  spiralrope export old.pth --layout published --rotate 4 --out new.pth
"""

app = typer.Typer(**SETTINGS)


@command(app, "export", ExportRun, RopeConfig, examples=EXAMPLES, defaults=BY_WEIGHTS)
def export(given: dict[str, Any]) -> None:
    """Write weights to share, in the published layout or as safetensors.

    That is a file as the published ones, or a folder with a model card.

    RoPE options come from the source; a bare state dict has none, and needs --rotate at least.

    Prints the path. What is there already is never written over.
    """
    from spiralrope_cli.core.jobs import export as job

    job.export(given)
