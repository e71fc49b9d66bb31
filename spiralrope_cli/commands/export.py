from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from spiralrope_cli.commands.command import SETTINGS, command
from spiralrope_cli.core.config.hub import ExportRun
from spiralrope_cli.core.config.nested import build
from spiralrope_cli.core.config.rope import BY_WEIGHTS, RopeConfig, given_rope
from spiralrope_cli.core.errors import ConfigError

EXAMPLES = """
Examples:

  spiralrope export runs/pretrain-deit-s-digits-r2 --layout published

  spiralrope export runs/pretrain-deit-s-digits-r2 --layout safetensors --ema --best

  spiralrope export deit-b --layout safetensors --out weights/deit-b

  spiralrope export old.pth --layout published --rotate 4 --out with-options.pth
"""

app = typer.Typer(**SETTINGS)


@command(app, "export", ExportRun, RopeConfig, examples=EXAMPLES, defaults=BY_WEIGHTS)
def export(given: dict[str, Any]) -> None:
    """Write weights to hand on, in the published layout or as safetensors.

    That is a file as the published ones, or a folder with a model card.

    RoPE options come from the source; a bare state dict has none, and needs --rotate at least.

    Prints the path. What is there already is never written over.
    """
    from spiralrope_cli.core.hub.source import find_source

    rope = given_rope(given)
    config: ExportRun = build(ExportRun, given)
    found = find_source(config.source, best=config.best)
    if config.best and found.run != Path(config.source).expanduser():
        raise ConfigError(
            f"--best chooses among a run's checkpoints, and {config.source} is no run folder",
            "leave --best out",
        )
    from spiralrope_cli.core.jobs import export as job

    out = Path(config.out) if config.out else None
    job.export(found, config.layout, ema=config.ema, out=out, rope=rope)
