from __future__ import annotations

from typing import Any

import typer

from spiralrope_cli.commands.command import command
from spiralrope_cli.core.config.training import Checkup


@command(
    Checkup,
    leave_out=(
        *("nnodes", "rdzv_endpoint", "max_restarts", "compile", "grad_checkpointing", "shard"),
        *("workers", "skip_bad", "resume", "tracker"),
    ),
)
def doctor(given: dict[str, Any]) -> None:
    """Check this machine, and what a run needs.

    Checks versions, devices, data, disk, Hub and cache.

    Exit code 0: no problem. 1: a problem that would make a run fail.

    If the Hub does not answer, this is reported, but is not a problem.

    Examples:
      spiralrope doctor                              this machine and the digits
      spiralrope doctor --data ~/imagenet --arch deit-b --nproc 8
      spiralrope doctor --arch dit-xl2 --data ~/imagenet --num-samples 50000
      spiralrope doctor --offline --json             for scripts
    """
    from spiralrope_cli.core.jobs.doctor import check_machine

    if not check_machine(given):
        raise typer.Exit(1)
