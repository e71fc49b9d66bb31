"""Whole pipelines: stages one after the other, in this process, each by its own job.

What is there is the state: a stage looks at its folder, is skipped when that is complete, and goes
on where it stopped when it is not. `pipeline.json` records what finished when.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from spiralrope_cli.core.config.dit_runs import TrainingRun
from spiralrope_cli.core.config.evals import BOTH_CROP_RATIOS, EvalOptions, EvalRun
from spiralrope_cli.core.config.pipelines import EVALUATE, DeiTPipeline
from spiralrope_cli.core.config.resolve import Resolved
from spiralrope_cli.core.hub.source import find_source
from spiralrope_cli.core.jobs import evaluate, train
from spiralrope_cli.core.report.page import leave_report
from spiralrope_cli.core.runtime import console
from spiralrope_cli.core.runtime.launch import is_first_process, launch
from spiralrope_cli.core.runtime.run_folder import (
    PIPELINE_FILE,
    REPORT_FILE,
    first_step,
    is_finished,
    prepare,
    read_json,
    steps_on_disk,
    write_json,
)
from spiralrope_cli.version import __version__

TRAIN_JOB = "spiralrope_cli.core.jobs.train:work"
EVAL_JOB = "spiralrope_cli.core.jobs.evaluate:run"


@dataclass(frozen=True)
class Stage:
    """One part of a pipeline.

    Attributes:
        name: for the heading and the record.
        done: what is there already in words, empty while something is missing.
        plan: prints what it is going to do; told whether that is all that is wanted.
        work: does it.
        show: prints the results of work that was done before.
    """

    name: str
    done: Callable[[], str]
    plan: Callable[[bool], None]
    work: Callable[[], None]
    show: Callable[[], None] = lambda: None


def run_deit(pipeline: DeiTPipeline, *, dry_run: bool, show_again: bool = True) -> None:
    """Pretrains, finetunes and measures eight times, or prints the plans of all that.

    Args:
        pipeline: settled.
        dry_run: plans alone.
        show_again: prints figures of stages that were done before.

    Raises:
        SpiralRopeError: a stage failed; the next ones are left out.
    """
    stages = [training_stage(resolved) for resolved in pipeline.trainings]
    stages.append(eval_stage(pipeline))
    if not show_again:
        stages = [replace(stage, show=lambda: None) for stage in stages]
    carry_out(pipeline.folder, "run deit", stages, dry_run=dry_run)


def carry_out(folder: str, command: str, stages: Sequence[Stage], *, dry_run: bool) -> None:
    """Stages in order, without those that are done; then the page of them all."""
    for number, stage in enumerate(stages, 1):
        done = stage.done()
        say(f"[{number}/{len(stages)}] {stage.name}" + (f": {done}" if done else ""))
        if not done or dry_run:
            stage.plan(dry_run)
        if dry_run:
            continue
        start = time.monotonic()
        (stage.show if done else stage.work)()
        if is_first_process():
            record(Path(folder), command, stage.name, None if done else time.monotonic() - start)
    if not dry_run and is_first_process():
        leave_report(Path(folder))
        say(f"report: {Path(folder) / REPORT_FILE}")


def training_stage(resolved: Resolved[Any]) -> Stage:
    """A training, which resumes by itself."""
    run: TrainingRun = resolved.run

    def done() -> str:
        finished = is_finished(run, first_step(run))
        return f"{run.out} is finished, {run.total_steps} steps" if finished else ""

    def plan(every_value: bool) -> None:
        if not is_first_process():
            return
        # The weights to start from may not be there yet, and come from this very pipeline.
        notes = [f"starts from the averaged (EMA) weights of {run.source}"] if run.source else []
        here = Resolved(replace(run, source=""), resolved.sources, resolved.warnings)
        train.plan(here, first_step(run), every_value=every_value, notes=notes)

    def work() -> None:
        if is_first_process():
            prepare(run, resolved.sources)
        launch(TRAIN_JOB, run)

    return Stage(run.command, done, plan, work)


def eval_stage(pipeline: DeiTPipeline) -> Stage:
    """The eight evaluations of the last training: best and last, both crops, raw and EMA."""

    @functools.cache  # asked for the first time when the last training is done
    def planned() -> tuple[EvalRun, list[str]]:
        options = EvalOptions(sources=(pipeline.evaluated,), every=True)
        source = find_source(pipeline.evaluated)
        return evaluate.settle(options, [source], None, pipeline.machine, set())

    def done() -> str:
        there = steps_on_disk(Path(pipeline.evaluated)) and evaluate.is_measured(planned()[0])
        return f"{pipeline.evaluated} is measured, {len(planned()[0].rows)} rows" if there else ""

    def plan(dry_run: bool) -> None:
        if dry_run:
            say(
                f" best and last checkpoint of {pipeline.evaluated}, crop ratios "
                f"{' and '.join(map(str, BOTH_CROP_RATIOS))}, raw and EMA weights"
            )
            return
        evaluate.plan(planned()[1])

    def show() -> None:
        evaluate.is_measured(planned()[0], show=True)

    return Stage(EVALUATE, done, plan, lambda: launch(EVAL_JOB, planned()[0]), show)


def record(folder: Path, command: str, stage: str, seconds: float | None) -> None:
    """Notes in `pipeline.json`, in one piece, that a stage is done.

    Args:
        folder: of the pipeline.
        command: that the pipeline is of.
        stage: its name.
        seconds: that this command spent on it, None where it was done before.
    """
    stages = read_json(folder / PIPELINE_FILE).get("stages", {})
    if seconds is None and stage in stages:
        return
    stages[stage] = {
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": None if seconds is None else round(seconds, 1),
    }
    content = {"command": command, "spiralrope": __version__, "stages": stages}
    write_json(folder / PIPELINE_FILE, content)


def say(line: str) -> None:
    """One line on stderr, from the process that speaks for all."""
    if is_first_process():
        console.say(line)
