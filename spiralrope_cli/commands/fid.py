from __future__ import annotations

from typing import Any

import typer

from spiralrope_cli.commands.command import SETTINGS, command
from spiralrope_cli.core.config.evals import FidRun

EXAMPLES = """
Examples:

  spiralrope fid samples.npz imagenet256.npz        all six metrics

  spiralrope fid samples/ photos/ --select fid,is   two of them, from folders

  spiralrope fid photos/ --save-stats photos.npz    a reference for later

  spiralrope fid samples/ photos.npz --num-samples 50000 --nproc 8 --json
"""

app = typer.Typer(**SETTINGS)


@command(
    app,
    "fid",
    FidRun,
    examples=EXAMPLES,
    leave_out=("compile", "grad_checkpointing", "resume", "tracker"),
    words={
        "skip_bad": "Leave out images that are damaged.",
        "workers": "Threads that decode, per process.",
    },
    defaults={"select": "all", "workers": ""},
)
def fid(given: dict[str, Any]) -> None:
    """FID, sFID, Inception Score, KID, Precision and Recall of generated images.

    SAMPLES comes first, REFERENCE second (ADM's own script has it the other way round).

    An .npz holds arr_0 (N x H x W x 3 uint8), or statistics (mu, sigma, mu_s, sigma_s), or both.

    Statistics of a reference are kept and found again by its content.
    """
    from spiralrope_cli.core.jobs.score import score

    score(given)
