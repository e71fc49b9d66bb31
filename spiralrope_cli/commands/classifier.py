"""From the options of a classifier's training command to its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from spiralrope_cli.commands import options as o
from spiralrope_cli.core.config.resolve import StartingPoint, resolve_classifier
from spiralrope_cli.core.runtime.launch import is_first_process, launch, world_size
from spiralrope_cli.core.runtime.run_folder import CURVES_FILE, first_step
from spiralrope_cli.core.runtime.tracker import check_tracker

JOB = "spiralrope_cli.core.jobs.train_classifier:run"


def train(
    command: str, context: typer.Context, start: StartingPoint | None = None, notes: Any = ()
) -> None:
    """Resolves, checks, shows and launches a run, or says that it is finished.

    Args:
        command: `pretrain` or `finetune`.
        context: of the command, with what the user gave.
        start: the weights to start from.
        notes: what reading them brought up, one line each.
    """
    chosen = o.given(context)
    dry_run, config = chosen.pop("dry_run"), chosen.pop("config", None)
    chosen.pop("source", None)
    resolved = resolve_classifier(command, chosen, config, start)
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

        print_plan(resolved, first_step=step, every_value=dry_run, notes=notes)
    if not dry_run:
        launch(JOB, run)
