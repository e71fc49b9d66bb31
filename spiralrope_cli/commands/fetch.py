from __future__ import annotations

from typing import Any

import typer

from spiralrope_cli.commands.command import SETTINGS, command
from spiralrope_cli.core.config.hub import FetchRun

EXAMPLES = """
Examples:

  spiralrope fetch --list                      what there is, and what is here

  spiralrope fetch dit-xl2                     DiT-XL/2 after 7M steps

  spiralrope fetch deit-s vae-mse inception    several at once

  spiralrope fetch deit-b --out weights        with a copy in weights/

  spiralrope fetch dit-s2 --offline            only if it is here

  HF_ENDPOINT=https://mirror.example spiralrope fetch deit-s
"""

app = typer.Typer(**SETTINGS)


@command(app, "fetch", FetchRun, examples=EXAMPLES)
def fetch(given: dict[str, Any]) -> None:
    """Fetch published weights, the VAEs, Inception's weights or reference batches.

    Prints the path of each. What is here is not fetched again, but checked.

    HF_ENDPOINT, HF_TOKEN and HF_HOME are those of huggingface_hub.
    """
    from spiralrope_cli.core.jobs import fetch as job

    job.fetch(given)
