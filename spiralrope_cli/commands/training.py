"""From the options of a training command to its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from spiralrope_cli.core.config.dit_runs import DiTRun
from spiralrope_cli.core.config.latents import VAE_NAMES
from spiralrope_cli.core.config.resolve import StartingPoint, resolve
from spiralrope_cli.core.config.rope import given_rope
from spiralrope_cli.core.hub.source import find_source
from spiralrope_cli.core.runtime.launch import is_first_process, launch, world_size
from spiralrope_cli.core.runtime.run_folder import first_step, is_finished, prepare

JOB = "spiralrope_cli.core.jobs.train:work"


def train(command: str, given: dict[str, Any]) -> None:
    """Resolves, checks, shows and launches a run, or says that it is finished.

    Args:
        command: `pretrain`, `finetune` or `dit-train`.
        given: field name -> value of the options that the user gave.
    """
    dry_run, config = given.pop("dry_run", False), given.pop("config", "")
    source = given.pop("source", "")
    start: StartingPoint | None = None
    notes: tuple[str, ...] = ()
    if source:
        rope, found = given_rope(given), find_source(source)
        from spiralrope_cli.core.jobs.start import starting_point

        start, notes = starting_point(found, rope, dit=command == "dit-train")
    resolved = resolve(command, given, config, start)
    run = resolved.run
    from spiralrope_cli.core.runtime.report import check_tracker, print_results

    check_tracker(run.machine.tracker)
    step = first_step(run)
    if is_finished(run, step) and not dry_run:
        if is_first_process():
            typer.echo(f"{run.out} is finished: {step} steps", err=True)
            print_results(Path(run.out))
        return
    run.split_batch(world_size(run.machine))
    if is_first_process():
        from spiralrope_cli.core.jobs.train import plan

        plan(resolved, first_step=step, every_value=dry_run, notes=notes)
    if isinstance(run, DiTRun):
        check_vae(run, dry_run=dry_run)
    if not dry_run:
        if is_first_process():
            prepare(run, resolved.sources)
        launch(JOB, run)


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
