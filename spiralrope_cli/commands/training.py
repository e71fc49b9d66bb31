"""What every training command does once it knows its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from spiralrope_cli.core.config.resolve import Resolved
from spiralrope_cli.core.runtime.launch import is_first_process, launch, world_size
from spiralrope_cli.core.runtime.run_folder import CURVES_FILE, first_step
from spiralrope_cli.core.runtime.tracker import check_tracker


def start_training(job: str, resolved: Resolved[Any], *, dry_run: bool) -> None:
    """Checks, says what will happen, and launches; a finished run is only shown.

    Args:
        job: `module:function` for the workers.
        resolved: the run and where its values came from.
        dry_run: stops before the launch.
    """
    run = resolved.run
    check_tracker(run.machine.tracker)
    step = first_step(run)
    curves = Path(run.out) / CURVES_FILE
    if step == run.total_steps and curves.exists() and not dry_run:
        if is_first_process():
            from spiralrope_cli.core.runtime.report import print_results

            typer.echo(f"{run.out} is finished: {step} steps", err=True)
            print_results(Path(run.out))
        return
    run.split_batch(world_size(run.machine))
    if is_first_process():
        from spiralrope_cli.core.jobs.plan import print_plan

        print_plan(resolved, first_step=step, every_value=dry_run)
    if not dry_run:
        launch(job, run)
