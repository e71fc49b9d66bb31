from __future__ import annotations

from typing import Any

from spiralrope_cli.commands.command import command
from spiralrope_cli.core.config.fid import FidRun
from spiralrope_cli.core.config.slurm import SlurmOptions
from spiralrope_cli.core.runtime.slurm import Remaining


@command(
    FidRun,
    SlurmOptions,
    leave_out=("compile", "grad_checkpointing", "shard", "resume", "tracker"),
    words={
        "skip_bad": "Skip and count damaged images instead of stopping.",
        "workers": "Decoding threads per process, beside a GPU processes; by default by the cores.",
    },
    defaults={"select": "all", "workers": ""},
)
def fid(given: dict[str, Any]) -> Remaining:
    """Compute FID, sFID, Inception Score, KID, Precision and Recall of images.

    SAMPLES is the first argument, REFERENCE the second (ADM's script has the opposite order).

    An .npz holds arr_0 (N x H x W x 3 uint8), or statistics (mu, sigma, mu_s, sigma_s), or both.

    Statistics of a REFERENCE are cached by the checksum of its content.

    Examples:
      spiralrope fid samples.npz imagenet256.npz        all six metrics
      spiralrope fid samples/ photos/ --select fid,is   two metrics, from folders
      spiralrope fid photos/ --save-stats photos.npz    save statistics for later
      spiralrope fid samples/ photos.npz --num-samples 50000 --nproc 8 --json
    """
    from spiralrope_cli.core.jobs.score import score

    return score(given)
