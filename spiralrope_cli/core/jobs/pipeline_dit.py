"""The diffusion transformer's pipeline: train, draw samples, measure them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from spiralrope_cli.core.config.fid import PRECISIONS, FidRun
from spiralrope_cli.core.config.pipelines import SAMPLE, DiTPipeline
from spiralrope_cli.core.config.runs import MachineConfig
from spiralrope_cli.core.config.samples import DEFAULTS, SampleRun, num_samples
from spiralrope_cli.core.data.sample_files import NPZ_FILE
from spiralrope_cli.core.errors import CheckpointError
from spiralrope_cli.core.hub.source import find_source
from spiralrope_cli.core.jobs import sample, score
from spiralrope_cli.core.jobs.pipeline import Stage, carry_out, say, training_stage
from spiralrope_cli.core.jobs.pipeline_plan import fetch_vaes, why_no_figures
from spiralrope_cli.core.runtime.launch import is_first_process, launch
from spiralrope_cli.core.runtime.run_folder import (
    FID_FILE,
    SAMPLES_FILE,
    first_step,
    is_finished,
)
from spiralrope_cli.core.weights import Weights

SAMPLE_JOB = "spiralrope_cli.core.jobs.sample:work"
SCORE_JOB = "spiralrope_cli.core.jobs.score:work"
OF_SAMPLING = ("nproc", "nnodes", "rdzv_endpoint", "device", "precision", "compile")
OF_FIGURES = ("nproc", "nnodes", "rdzv_endpoint", "device", "workers", "skip_bad")


def run_dit(pipeline: DiTPipeline, *, dry_run: bool) -> None:
    """Trains, draws and measures, or prints the plans of all that.

    Raises:
        SpiralRopeError: a stage failed; the next ones are left out.
    """
    without_figures = why_no_figures(pipeline)
    stages = [training_stage(pipeline.training), sample_stage(pipeline)]
    if not without_figures:
        stages.append(fid_stage(pipeline))
    if not dry_run and is_first_process():
        fetch_vaes(pipeline)
    carry_out(pipeline.folder, "run dit", stages, dry_run=dry_run)
    if without_figures:
        say(f"fid is left out: {without_figures}")


def sample_stage(pipeline: DiTPipeline) -> Stage:
    """Images from the averaged weights of the training."""
    train, out = pipeline.training.run, str(Path(pipeline.folder) / SAMPLE)

    @functools.cache
    def settled() -> tuple[SampleRun, Weights]:
        machine = machine_part(pipeline.machine, OF_SAMPLING)
        return sample.settle(find_source(train.out), {**pipeline.sampling, **machine, "out": out})

    def done() -> str:
        if not is_finished(train, first_step(train)):
            return ""
        run, weights = settled()
        try:
            there = sample.is_drawn(run, weights)
        except CheckpointError as error:
            hint = f"remove {out} to draw again, or draw others: spiralrope dit-sample {train.out}"
            raise CheckpointError(error.message, hint) from error
        return f"{out} is finished, {run.num} images" if there else ""

    def plan(dry_run: bool) -> None:
        if not is_finished(train, first_step(train)):
            chosen = {**DEFAULTS, "num": num_samples(train.data), **pipeline.sampling}
            told = ", ".join(f"{name} {value}" for name, value in chosen.items())
            say(f" {out} from the averaged (EMA) weights of {train.out}: {told}")
            return
        sample.plan(*settled())

    def show() -> None:
        say(f"samples: {Path(out) / NPZ_FILE}")
        say(f"grid: {Path(out) / SAMPLES_FILE}")

    return Stage(SAMPLE, done, plan, lambda: launch(SAMPLE_JOB, settled()[0]), show)


def fid_stage(pipeline: DiTPipeline) -> Stage:
    """Figures of the samples against the reference, also as `fid.json`."""
    folder = Path(pipeline.folder)
    samples, result = folder / SAMPLE / NPZ_FILE, folder / FID_FILE
    machine = machine_part(pipeline.machine, OF_FIGURES)
    run = FidRun(
        samples=str(samples),
        reference=pipeline.reference,
        weights=pipeline.weights,
        facts_file=str(result),
        machine=MachineConfig(**machine, precision=PRECISIONS[0]),
    )

    facts = functools.cache(functools.partial(score.already, run))

    def done() -> str:
        return f"{result} is there" if facts() else ""

    def plan(dry_run: bool) -> None:
        say(f" {samples} against {pipeline.reference}: {', '.join(run.select)}, into {result}")

    def show() -> None:
        if is_first_process():
            score.report(run, facts())

    return Stage("fid", done, plan, lambda: launch(SCORE_JOB, score.settle(run)), show)


def machine_part(machine: MachineConfig, names: tuple[str, ...]) -> dict[str, Any]:
    """The fields that a stage knows."""
    return {name: getattr(machine, name) for name in names}
