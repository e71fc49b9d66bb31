from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from spiralrope_cli.commands.command import SETTINGS, command
from spiralrope_cli.core.config.nested import build
from spiralrope_cli.core.config.rope import BY_WEIGHTS, RopeConfig, given_rope
from spiralrope_cli.core.config.samples import GuidanceConfig, SampleRun, check_chain
from spiralrope_cli.core.config.training import MachineConfig, TrainOptions
from spiralrope_cli.core.runtime.launch import is_first_process, launch

JOB = "spiralrope_cli.core.jobs.sample:work"
EXAMPLES = """
Examples:

  spiralrope dit-sample runs/dit-train-dit-ti2-digits-r0       a run of yours

  spiralrope dit-sample dit-xl2 --num 50000 --nproc 8          as published

  spiralrope dit-sample dit-xl2 --num 16 --cfg-scale 4 --classes 207,88

  spiralrope dit-sample dit-xl2 --num 64 --sampler dpm++ --steps 20

  spiralrope dit-sample RUN --num 1000 --png --dry-run         what it would do
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
    from spiralrope_cli.core.hub.source import find_source

    dry_run = given.pop("dry_run", False)
    source = given.pop("source")
    given_rope(given)
    check_words(given)
    found = find_source(source)

    from spiralrope_cli.core.jobs import sample

    run, weights = sample.settle(found, given, download=not dry_run)
    if sample.is_drawn(run, weights) and not dry_run:
        if is_first_process():
            typer.echo(f"{run.out} is finished: {run.num} images", err=True)
            typer.echo(str(Path(run.out) / "samples.npz"))
        return
    sample.plan(run, weights)
    if not dry_run:
        launch(JOB, run)


def check_words(given: dict[str, Any]) -> None:
    """Refuses what no weights could have, before anything heavy is loaded.

    Raises:
        ConfigError: names the option and what is allowed.
    """
    build(GuidanceConfig, given)
    build(MachineConfig, given)
    check_chain(given.get("sampler", SampleRun.sampler), given.get("steps", SampleRun.steps))
