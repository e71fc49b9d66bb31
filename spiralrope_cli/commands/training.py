"""From the options of a training command to its run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from spiralrope_cli.commands import options as o
from spiralrope_cli.core.config.dit_runs import DiTRun
from spiralrope_cli.core.config.latents import VAE_NAMES
from spiralrope_cli.core.config.resolve import Resolved, StartingPoint, resolve_classifier
from spiralrope_cli.core.config.resolve_dit import resolve_dit
from spiralrope_cli.core.runtime.launch import is_first_process, launch, world_size
from spiralrope_cli.core.runtime.run_folder import first_step, is_finished, prepare
from spiralrope_cli.core.runtime.tracker import check_tracker

CLASSIFIER_JOB = "spiralrope_cli.core.jobs.train_classifier:run"
DIT_JOB = "spiralrope_cli.core.jobs.train_dit:run"


def train(
    command: str,
    context: typer.Context,
    start: StartingPoint | None = None,
    notes: Iterable[str] = (),
) -> None:
    """Resolves, checks, shows and launches a run, or says that it is finished.

    Args:
        command: `pretrain`, `finetune` or `dit-train`.
        context: of the command, with what the user gave.
        start: the weights to start from.
        notes: what reading them brought up, one line each.
    """
    chosen = o.given(context)
    dry_run, config = chosen.pop("dry_run"), chosen.pop("config", None)
    for of_start in ("source", "init"):
        chosen.pop(of_start, None)
    resolved: Resolved[Any]
    if command == "dit-train":
        job, resolved = DIT_JOB, resolve_dit(chosen, config, start)
    else:
        job, resolved = CLASSIFIER_JOB, resolve_classifier(command, chosen, config, start)
    run = resolved.run
    check_tracker(run.machine.tracker)
    step = first_step(run)
    if is_finished(run, step) and not dry_run:
        if is_first_process():
            from spiralrope_cli.core.runtime.report import print_results

            typer.echo(f"{run.out} is finished: {step} steps", err=True)
            print_results(Path(run.out))
        return
    run.split_batch(world_size(run.machine))
    if is_first_process():
        from spiralrope_cli.core.jobs.plan import print_plan

        print_plan(resolved, first_step=step, every_value=dry_run, notes=notes)
    if isinstance(run, DiTRun):
        check_vae(run, dry_run=dry_run)
    if not dry_run:
        if is_first_process():
            prepare(run, resolved.sources)
        launch(job, run)


def check_vae(run: DiTRun, *, dry_run: bool) -> None:
    """Refuses a VAE that no worker could use; one that is published is fetched, if it is to run.

    Raises:
        ConfigError, CheckpointError, FetchError: no such VAE, or none that fits.
    """
    given = run.pictures.vae
    needed = run.pictures.in_latents and not run.pictures.latents and is_first_process()
    if needed and not (dry_run and given in VAE_NAMES):
        from spiralrope_cli.core.hub.vae import find_vae

        find_vae(given)
