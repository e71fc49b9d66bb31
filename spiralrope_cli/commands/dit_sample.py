from __future__ import annotations

from typing import Any

import typer

from spiralrope_cli.commands.command import SETTINGS, command
from spiralrope_cli.core.config.models import BY_WEIGHTS, RopeConfig
from spiralrope_cli.core.config.samples import SampleRun
from spiralrope_cli.core.config.training import TrainOptions

EXAMPLES = """
Examples:

  spiralrope dit-sample runs/dit-train-dit-ti2-digits-r0       a run of yours

  spiralrope dit-sample dit-xl2 --num-samples 50000 --nproc 8   as published

  spiralrope dit-sample dit-xl2 --num-samples 16 --cfg-scale 4 --classes 7,88

  spiralrope dit-sample dit-xl2 --sampler dpm++ --num-sampling-steps 20

  spiralrope dit-sample RUN --num-samples 1000 --dry-run       the plan
"""

app = typer.Typer(**SETTINGS)


@command(
    app,
    "dit-sample",
    SampleRun,
    RopeConfig,
    TrainOptions,
    examples=EXAMPLES,
    leave_out=("config", "workers", "skip_bad", "grad_checkpointing", "resume", "tracker"),
    defaults=BY_WEIGHTS,
)
def dit_sample(given: dict[str, Any]) -> None:
    """Draw images with a DiT: a run, a checkpoint file or published weights.

    They go into samples.npz (arr_0, uint8), which fid reads, and a grid to look at.

    An interrupted command goes on with the missing images when it is given again.
    """
    from spiralrope_cli.core.jobs.sample import sample

    sample(given)
