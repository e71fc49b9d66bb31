from __future__ import annotations

from typing import Any

import typer

from spiralrope_cli.commands.command import SETTINGS, command
from spiralrope_cli.core.config.hub import ExportRun
from spiralrope_cli.core.config.models import BY_WEIGHTS, RopeConfig

app = typer.Typer(**SETTINGS)


@command(app, "export", ExportRun, RopeConfig, defaults=BY_WEIGHTS)
def export(given: dict[str, Any]) -> None:
    """Export weights to share, in the published layout or as safetensors.

    The published layout is one .pth or .pt file; safetensors is a folder with a model card.

    RoPE options are those of SOURCE. A plain state dict has none, so give at least --rotate.

    Prints the path. Existing files are not overwritten.

    Examples:
      spiralrope export runs/pretrain-deit-s-digits-r2 --layout published
      spiralrope export runs/pretrain-deit-s-digits-r2 --layout safetensors --ema
      spiralrope export deit-b --layout safetensors --out weights/deit-b
      spiralrope export old.pth --layout published --rotate 4 --out new.pth
    """
    from spiralrope_cli.core.jobs import export as job

    job.export(given)
