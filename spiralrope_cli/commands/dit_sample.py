from __future__ import annotations

from typing import Any

from spiralrope_cli.commands.command import command
from spiralrope_cli.core.config.models import BY_WEIGHTS, RopeConfig
from spiralrope_cli.core.config.samples import SampleRun
from spiralrope_cli.core.config.slurm import SlurmOptions
from spiralrope_cli.core.config.training import TrainOptions
from spiralrope_cli.core.runtime.slurm import Remaining


@command(
    SampleRun,
    RopeConfig,
    TrainOptions,
    SlurmOptions,
    leave_out=("config", "workers", "skip_bad", "grad_checkpointing", "shard", "resume", "tracker"),
    defaults=BY_WEIGHTS,
)
def dit_sample(given: dict[str, Any]) -> Remaining:
    """Sample images from a DiT: a run, a checkpoint file or published weights.

    Writes samples.npz (arr_0, uint8), which fid reads, and samples.png, a grid.

    After an interruption run the same command again: it samples the missing images.

    Examples:
      spiralrope dit-sample runs/dit-train-dit-ti2-digits-r0       your own run
      spiralrope dit-sample dit-xl2 --num-samples 50000 --nproc 8   as published
      spiralrope dit-sample dit-xl2 --num-samples 16 --cfg-scale 4 --classes 7,88
      spiralrope dit-sample dit-xl2 --sampler dpm++ --num-sampling-steps 20
      spiralrope dit-sample RUN --num-samples 1000 --dry-run       print the plan
    """
    from spiralrope_cli.core.jobs.sample import sample

    return sample(given)
