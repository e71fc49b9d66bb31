from __future__ import annotations

from typing import Any

from spiralrope_cli.commands.command import command
from spiralrope_cli.core.config.hub import ExportRun
from spiralrope_cli.core.config.models import BY_WEIGHTS, RopeConfig


@command(ExportRun, RopeConfig, defaults=BY_WEIGHTS)
def export(given: dict[str, Any]) -> None:
    """Export weights to share: as a folder, as one file, or onto the Hugging Face Hub.

    safetensors is a folder with config and model card, which timm reads too; published is one .pth
    or .pt file; diffusers is a folder with a pipeline, of a DiT.

    --push uploads the folder. The token is that of hf auth login, or HF_TOKEN.

    RoPE options are those of SOURCE. A plain state dict has none, so give at least --rotate.

    Prints the path, or the URL of what was uploaded. Existing files are not overwritten.

    Examples:
      spiralrope export runs/pretrain-deit-s-digits-r2 --layout published
      spiralrope export runs/pretrain-deit-s-digits-r2 --ema
      spiralrope export runs/my-run --ema --push me/vit --license mit
      spiralrope export deit-b --out weights/deit-b
      spiralrope export dit-xl2 --ema --layout diffusers
      spiralrope export old.pth --layout published --rotate 4 --out new.pth
    """
    from spiralrope_cli.core.jobs import export as job

    job.export(given)
