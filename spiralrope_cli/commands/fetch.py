from __future__ import annotations

from typing import Any

from spiralrope_cli.commands.command import command
from spiralrope_cli.core.config.hub import FetchRun


@command(FetchRun)
def fetch(given: dict[str, Any]) -> None:
    """Download published weights, VAEs, Inception weights, reference batches or CIFAR-100.

    Prints the path of each. Files in the cache are checked, not downloaded again.

    The variables HF_ENDPOINT, HF_TOKEN and HF_HOME have an effect, as in huggingface_hub.

    Examples:
      spiralrope fetch --list                      all names, with state
      spiralrope fetch dit-xl2                     DiT-XL/2 after 7M steps
      spiralrope fetch deit-s vae-mse inception    several at once
      spiralrope fetch deit-b --out weights        also copy it to weights/
      spiralrope fetch hf:me/vit@v1                weights shared on the Hub
      spiralrope fetch dit-s2 --offline            only from the cache
      HF_ENDPOINT=https://mirror.example spiralrope fetch deit-s
    """
    from spiralrope_cli.core.jobs import fetch as job

    job.fetch(given)
