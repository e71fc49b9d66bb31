"""`run deit` and `run dit`: a list of stages, each a job with its config.

All stages are checked before the first one starts. Each job skips finished work and resumes.
`pipeline.json` records when each stage finished. No torch at module level, so that usage errors,
also of the last stage, are fast.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from spiralrope_cli import __version__
from spiralrope_cli.core.config.dit_runs import NO_VAE, DiTRun, TrainingRun
from spiralrope_cli.core.config.evals import BOTH_CROP_RATIOS, EvalOptions
from spiralrope_cli.core.config.fid import FeatureMachine, FidRun
from spiralrope_cli.core.config.option import build, leaves
from spiralrope_cli.core.config.pipelines import (
    MACHINE_FIELDS,
    OF_BOTH_TRAININGS,
    OF_PRETRAINING,
    DeiTStages,
    DiTStages,
    options_of_fid,
)
from spiralrope_cli.core.config.runs import ClassifierRun
from spiralrope_cli.core.config.samples import decoder_of, default_num_samples
from spiralrope_cli.core.config.training import MachineConfig, TrainOptions
from spiralrope_cli.core.data.image_sets import inspect_side
from spiralrope_cli.core.errors import CheckpointError, ConfigError, FetchError
from spiralrope_cli.core.hub.source import find_inception, find_vae, local_vae
from spiralrope_cli.core.jobs import evaluate, sample, score, train
from spiralrope_cli.core.resolve import Resolved, StartingPoint, as_begun, resolve
from spiralrope_cli.core.runtime.launch import check_not_joined, launch, say_notes
from spiralrope_cli.core.runtime.progress import say
from spiralrope_cli.core.runtime.run_folder import (
    first_step,
    is_finished,
    read_json,
    repeated_run,
    steps_on_disk,
    write_json,
)
from spiralrope_cli.core.runtime.slurm import WHOLE, Remaining
from spiralrope_cli.core.runtime.trackers import check_tracker
from spiralrope_cli.core.storage import FID_FILE, NPZ_FILE, PIPELINE_FILE, REPORT_FILE

FINETUNE_PREFIX = "finetune_"


@dataclass(frozen=True)
class Stage:
    """One stage; `job(config, dry_run=)` returns whether it was already finished."""

    name: str
    folder: str
    config: Any
    job: Callable[..., bool]
    line: str = ""  # description, for stages whose plan needs the result of an earlier stage


@dataclass(frozen=True)
class Pipeline:
    """Stages in order, in one folder; `note` says which stage is skipped, and why."""

    command: str
    folder: str
    stages: tuple[Stage, ...]
    note: str = ""


# ---- settle
def settle_deit(given: dict[str, Any], *, show_measured: bool = True) -> Pipeline:
    """Pretrain, finetune and eight evaluations.

    A stage that is not trained now must exist; options must be equal to those of its run.
    `show_measured`: whether to print rows of an earlier run.
    """
    check_not_joined()
    own: DeiTStages = build(DeiTStages, given)
    build(TrainOptions, given).check_folder(own.out, "the folder of a pipeline")
    options = training_options(given, DeiTStages)
    finetuning = {
        name.removeprefix(FINETUNE_PREFIX): value
        for name, value in given.items()
        if name.startswith(FINETUNE_PREFIX)
    }
    first = resolve("pretrain", options, name=given.get("name", ""))
    folder = pipeline_folder("run-deit", own.out, first.run)
    before, after = folder / "pretrain", folder / "finetune"
    stages: list[Stage] = []
    if not (own.eval_only or own.skip_training):
        stages.append(train_stage(first, before))
    if own.with_finetune and not own.eval_only:
        run = stages[0].config.run if stages else saved_run(before, "--skip-training", options)
        shared = {name: value for name, value in options.items() if name in OF_BOTH_TRAININGS}
        start = StartingPoint(
            run.out, run.arch, run.rope, run.model, run.data, class_names=run.class_names
        )
        with refused_by("finetune"):
            second = resolve("finetune", finetuning | shared, start=start)
        stages.append(train_stage(second, after))
    evaluated = after if own.with_finetune else before
    if not stages:
        idle = OF_PRETRAINING if own.with_finetune else set()
        repeated = {name: value for name, value in options.items() if name not in idle}
        saved_run(evaluated, "--eval-only", repeated | finetuning)
    check_trainings([stage.config.run for stage in stages])
    line = (
        f" best and last checkpoint of {evaluated}, crop ratios "
        f"{' and '.join(map(str, BOTH_CROP_RATIOS))}, raw and EMA weights"
    )
    config = {
        "options": EvalOptions(sources=(str(evaluated),), every=True),
        "machine": build(MachineConfig, given),
        "show": show_measured,
    }
    stages.append(Stage("eval", str(evaluated), config, evaluate_all, line))
    return Pipeline("run deit", str(folder), tuple(stages))


def settle_dit(given: dict[str, Any]) -> Pipeline:
    """Train, sample and score; `given` is field name -> value."""
    check_not_joined()
    own: DiTStages = build(DiTStages, given)
    build(TrainOptions, given).check_folder(own.out, "the folder of a pipeline")
    options = training_options(given, DiTStages)
    resolved = resolve("dit-train", options, name=given.get("name", ""))
    folder = pipeline_folder("run-dit", own.out, resolved.run)
    training = train_stage(resolved, folder / "dit-train")
    run: DiTRun = training.config.run
    if own.reference:
        inspect_side(own.reference, "REFERENCE")
    check_trainings([run])
    drawn = folder / "dit-sample"
    if drawn.exists() and not is_finished(run, first_step(run)):
        raise CheckpointError(
            f"{drawn} holds samples of other weights: {run.out} is not finished",
            f"remove {drawn}, or give this pipeline another --name or --out",
        )
    note = why_no_fid(own)
    for vae in (run.vae_in_loop, decoder_of(run.images.vae)):
        if vae not in ("", NO_VAE):
            local_vae(vae) if own.dry_run else find_vae(vae)
    machine = {name: value for name, value in given.items() if name in MACHINE_FIELDS}
    sampling = {
        **machine,
        "source": run.out,
        "out": str(drawn),
        "num_samples": own.num_samples or default_num_samples(run.data),
        "num_sampling_steps": own.num_sampling_steps,
        "sampler": own.sampler,
        "cfg_scale": own.cfg_scale,
        "seed": own.sampling_seed,
    }
    line = (
        f" {sampling['num_samples']} images from the EMA weights of {run.out}: "
        f"{own.sampler}, {own.num_sampling_steps} steps, guidance {own.cfg_scale:g}, "
        f"seed {own.sampling_seed}"
    )
    stages = [training, Stage("dit-sample", str(drawn), sampling, draw_samples, line)]
    if not note:
        fid = FidRun(
            samples=str(drawn / NPZ_FILE),
            reference=own.reference,
            weights=own.weights,
            result_file=str(folder / FID_FILE),
            # fp32 features, independent of --precision of training and sampling.
            machine=build(FeatureMachine, {**machine, "precision": FeatureMachine.precision}),
        )
        line = f" {fid.samples} against {fid.reference}: {', '.join(fid.select)}"
        stages.append(
            Stage("fid", str(folder), fid, score_samples, f"{line}, into {fid.result_file}")
        )
    return Pipeline("run dit", str(folder), tuple(stages), note)


SETTLE: dict[str, Callable[..., Pipeline]] = {"deit": settle_deit, "dit": settle_dit}


def training_options(given: dict[str, Any], own: type) -> dict[str, Any]:
    """The given options, without those of the pipeline."""
    not_of_run = leaves(own).keys() | leaves(TrainOptions)
    options = {name: value for name, value in given.items() if name not in not_of_run}
    return options | options_of_fid(given)


@contextlib.contextmanager
def refused_by(stage: str) -> Iterator[None]:
    """Adds the stage to errors, and replaces options by those of `run`."""
    here = leaves(DeiTStages)
    spelled = {
        opt.called: here[FINETUNE_PREFIX + name].called
        for name, opt in leaves(ClassifierRun).items()
        if stage == "finetune" and FINETUNE_PREFIX + name in here
    }
    try:
        yield
    except (ConfigError, CheckpointError) as error:
        message, hint = (
            " ".join(spelled.get(word, word) for word in text.split(" "))
            for text in (error.message, error.hint)
        )
        raise type(error)(f"{stage}: {message}", hint) from error


def pipeline_folder(command: str, out: str, run: TrainingRun) -> Path:
    """The folder of the pipeline: `out`, or the name of the training run with another prefix."""
    usual = Path(run.out)
    folder = Path(out) if out else usual.with_name(command + usual.name.removeprefix(run.command))
    there = read_json(folder / PIPELINE_FILE).get("command", "")
    if there and there.replace(" ", "-") != command:
        raise CheckpointError(f"--out {folder} is the folder of spiralrope {there}", "name another")
    return folder


def train_stage(resolved: Resolved, folder: Path) -> Stage:
    run = replace(resolved.run, out=str(folder))
    resolved = as_begun(replace(resolved, run=run))
    return Stage(run.command, run.out, resolved, train.carry_out)


def saved_run(folder: Path, option: str, given: dict[str, Any]) -> TrainingRun:
    """The existing run for `option`; given options must be equal to those of the run."""
    if not steps_on_disk(folder):
        other = folder.with_name("pretrain")
        raise CheckpointError(
            f"{option}: {folder} holds no checkpoint",
            f"--no-finetune uses those of {other}"
            if folder.name == "finetune" and steps_on_disk(other)
            else f"leave {option} out, or give the same options as before, or --out",
        )
    return repeated_run(ClassifierRun, folder, given)


def check_trainings(runs: Sequence[TrainingRun]) -> None:
    """Checks all trainings before the first one starts."""
    unfinished = ""
    for run in runs:
        check_tracker(run.machine.tracker)
        with refused_by(run.command):
            train.with_checked_batch(run)
            step = first_step(run)
        if step and unfinished:
            raise CheckpointError(
                f"{run.out} was trained from other weights: {unfinished} is not finished",
                f"remove {run.out}, or give this pipeline another --name or --out",
            )
        unfinished = "" if is_finished(run, step) else run.out


def why_no_fid(own: DiTStages) -> str:
    """Why the FID is skipped; empty if it is computed. Raises if the weights are damaged."""
    if not own.reference:
        return "fid is skipped: there is no --reference"
    try:
        find_inception(own.weights)
    except FetchError as error:
        return f"fid is skipped: {error.message}; {error.hint}"
    return ""


# ---- plan and work
def run_stages(pipeline: Pipeline, *, dry_run: bool) -> Remaining:
    """Runs the unfinished stages, then writes the report; or only prints all plans."""
    folder, waiting = Path(pipeline.folder), False
    for number, stage in enumerate(pipeline.stages, 1):
        say(f"[{number}/{len(pipeline.stages)}] {stage.name}")
        if stage.line:
            say(stage.line)
            if waiting:
                continue
        start = time.monotonic()
        done = stage.job(stage.config, dry_run=dry_run)
        if not dry_run:
            record(pipeline, stage, None if done else time.monotonic() - start)
        elif done:
            say(f" {stage.name} is finished")
        else:
            waiting = True
    if not dry_run:
        from spiralrope_cli.core.report.page import leave_report

        leave_report(folder)
        say(f"report: {folder / REPORT_FILE}")
    if pipeline.note:
        say(pipeline.note)
    return Remaining(pipeline.folder, WHOLE if waiting else ())


def evaluate_all(config: dict[str, Any], *, dry_run: bool) -> bool:
    """Eight rows: best and last checkpoint, both crop ratios, raw and EMA weights."""
    options = config["options"]
    run, notes = evaluate.settle(options, config["machine"], set())
    rows = evaluate.measured_rows(run)
    if rows and not dry_run:
        say(f"{options.sources[0]} is already evaluated: {len(rows)} rows")
        if config["show"]:
            from spiralrope_cli.core.report.results import print_evaluation

            print_evaluation(rows)
    elif not dry_run:
        say_notes(notes)
        launch(evaluate.work, run)
    return bool(rows)


def draw_samples(given: dict[str, Any], *, dry_run: bool) -> bool:
    """Samples images from the EMA weights; `given` are options of `dit-sample`."""
    run, weights = sample.settle(given, download=not dry_run)
    return sample.carry_out(run, weights, dry_run=dry_run)


def score_samples(run: FidRun, *, dry_run: bool) -> bool:
    """Computes the metrics of the samples."""
    result = score.earlier_result(run)
    if result and not dry_run:
        say(f"{run.result_file} is finished")
        score.report(run, result)
    elif not dry_run:
        plan = score.settle(run)
        launch(score.work, plan.run, plan)
    return bool(result)


# ---- report
def record(pipeline: Pipeline, stage: Stage, seconds: float | None) -> None:
    """Adds a stage to `pipeline.json`, with its seconds; None if it was finished before."""
    path = Path(pipeline.folder) / PIPELINE_FILE
    stages = read_json(path).get("stages", {})
    if seconds is None and stage.name in stages:
        return
    stages[stage.name] = {
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": None if seconds is None else round(seconds, 1),
    }
    write_json(path, {"command": pipeline.command, "spiralrope": __version__, "stages": stages})
