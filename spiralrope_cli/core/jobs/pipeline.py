"""Whole pipelines, `run deit` and `run dit`: stages in order, each by its own job.

What every stage is, is settled and checked before the first one starts. Then each looks at its
folder: what is done is skipped, what was stopped goes on. `pipeline.json` says what finished when.
No torch at module level, so that a wrong option of the last stage is told at once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from spiralrope_cli import __version__
from spiralrope_cli.core.config.dit_runs import NO_VAE, DiTRun, TrainingRun
from spiralrope_cli.core.config.evals import BOTH_CROP_RATIOS, EvalOptions, FeatureMachine, FidRun
from spiralrope_cli.core.config.nested import build
from spiralrope_cli.core.config.pipelines import (
    EVALUATE,
    FINETUNE,
    MACHINE_FIELDS,
    OF_BOTH_TRAININGS,
    OF_PRETRAINING,
    PRETRAIN,
    SAMPLE,
    TRAIN,
    DeiTStages,
    DiTStages,
    Pipeline,
    Stage,
    of_finetuning,
    of_training,
    refusals_of,
)
from spiralrope_cli.core.config.resolve import Resolved, StartingPoint, resolve
from spiralrope_cli.core.config.runs import ClassifierRun
from spiralrope_cli.core.config.samples import check_chain, decoder_of, num_samples
from spiralrope_cli.core.config.training import MachineConfig, TrainOptions
from spiralrope_cli.core.data.image_sets import look_at
from spiralrope_cli.core.errors import CheckpointError, FetchError
from spiralrope_cli.core.hub.networks import find_inception, find_vae, local_vae
from spiralrope_cli.core.jobs import evaluate, sample, score, train
from spiralrope_cli.core.runtime.launch import check_not_joined, launch, say_notes, world_size
from spiralrope_cli.core.runtime.progress import check_tracker, say
from spiralrope_cli.core.runtime.run_folder import (
    FID_FILE,
    NPZ_FILE,
    PIPELINE_FILE,
    REPORT_FILE,
    first_step,
    is_finished,
    read_json,
    refuse_run,
    repeated_run,
    steps_on_disk,
    write_json,
)


# ---- settle
def settle_deit(given: dict[str, Any]) -> Pipeline:
    """Pretrain, finetune and eight evaluations, from the options that the user gave.

    What is not trained now is taken as its folder says; options may repeat that, not change it.

    Raises:
        ConfigError: a value that cannot work.
        CheckpointError: a folder that holds another run, or none where one is needed.
        DataError: no such data set.
    """
    check_not_joined()
    own: DeiTStages = build(DeiTStages, given)
    build(TrainOptions, given).check_folder(own.out)
    options, finetuning = of_training(given, DeiTStages), of_finetuning(given)
    first = resolve(PRETRAIN, options, name=given.get("name", ""))
    folder = folder_of(own.out, first.run, "run-deit")
    before, after = folder / PRETRAIN, folder / FINETUNE
    stages: list[Stage] = []
    if own.pretrains:
        stages.append(train_stage_of(first, before))
    if own.finetunes:
        run = stages[0].config.run if stages else saved_run(before, "--skip-training", options)
        shared = {name: value for name, value in options.items() if name in OF_BOTH_TRAININGS}
        start = StartingPoint(run.out, run.arch, run.rope, run.model, run.data)
        with refusals_of(FINETUNE):
            second = resolve(FINETUNE, finetuning | shared, start=start)
        stages.append(train_stage_of(second, after))
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
    stages.append(Stage(EVALUATE, str(evaluated), build(MachineConfig, given), eval_stage, line))
    return Pipeline("run deit", str(folder), tuple(stages))


def settle_dit(given: dict[str, Any]) -> Pipeline:
    """Train, draw and measure, from the options that the user gave.

    Raises:
        ConfigError: a value that cannot work.
        CheckpointError: a folder that holds another run, or a damaged VAE or Inception.
        DataError: no such data set or reference.
        FetchError: a VAE that cannot be had; a dry run asks for none.
    """
    check_not_joined()
    own: DiTStages = build(DiTStages, given)
    build(TrainOptions, given).check_folder(own.out)
    with refusals_of(SAMPLE):
        check_chain(own.sampler, own.sampling_steps)
    options, name = of_training(given, DiTStages), given.get("name", "")
    resolved = resolve("dit-train", options, name=name)
    folder = folder_of(own.out, resolved.run, "run-dit")
    training = train_stage_of(resolved, folder / TRAIN)
    run: DiTRun = training.config.run
    if own.reference:
        look_at(Path(own.reference).expanduser(), "REFERENCE")
    check_trainings([run])
    drawn = folder / SAMPLE
    if drawn.exists() and not is_finished(run, first_step(run)):
        raise CheckpointError(
            f"{drawn} was drawn from weights that {run.out} does not hold yet",
            f"remove {drawn}, or give this pipeline another --name or --out",
        )
    note = why_no_figures(own)
    for vae in (run.vae_in_loop, decoder_of(run.pictures.vae)):
        if vae not in ("", NO_VAE):
            local_vae(vae) if own.dry_run else find_vae(vae)
    chosen = {"steps": own.sampling_steps, "sampler": own.sampler, "seed": own.sampling_seed}
    chosen["num"] = own.num or num_samples(run.data)
    if own.cfg_scale != 1:
        chosen["cfg_scale"] = own.cfg_scale
    told = ", ".join(f"{name} {value}" for name, value in chosen.items())
    line = f" {drawn} from the averaged (EMA) weights of {run.out}: {told}"
    machine = {name: value for name, value in given.items() if name in MACHINE_FIELDS}
    sampling = {**machine, **chosen, "source": run.out, "out": str(drawn)}
    stages = [training, Stage(SAMPLE, str(drawn), sampling, sample_stage, line)]
    if not note:
        stages.append(score_stage_of(own, folder, machine))
    return Pipeline("run dit", str(folder), tuple(stages), note)


def score_stage_of(own: DiTStages, folder: Path, machine: dict[str, Any]) -> Stage:
    """Figures of the samples, on the machine that is given but in full precision."""
    run = FidRun(
        samples=str(folder / SAMPLE / NPZ_FILE),
        reference=own.reference,
        weights=own.weights,
        result_file=str(folder / FID_FILE),
        machine=build(FeatureMachine, {**machine, "precision": FeatureMachine.precision}),
    )
    line = (
        f" {run.samples} against {run.reference}: {', '.join(run.select)}, into {run.result_file}"
    )
    return Stage("fid", str(folder), run, score_stage, line)


def folder_of(out: str, run: TrainingRun, pipeline: str) -> Path:
    """The pipeline's folder: as given, or named as its training's but for the command."""
    usual = Path(run.out)
    folder = Path(out) if out else usual.with_name(pipeline + usual.name.removeprefix(run.command))
    refuse_run(folder)
    return folder


def train_stage_of(resolved: Resolved[Any], folder: Path) -> Stage:
    """A training, in the folder that it has in the pipeline."""
    run = replace(resolved.run, out=str(folder))
    return Stage(run.command, run.out, replace(resolved, run=run), train_stage)


def saved_run(folder: Path, option: str, given: dict[str, Any]) -> TrainingRun:
    """The run in a folder, which an option wants as it is.

    Raises:
        CheckpointError: it has no checkpoint, or was made with other options than those given.
    """
    if not steps_on_disk(folder):
        other = folder.with_name(PRETRAIN)
        raise CheckpointError(
            f"{option}: {folder} holds no checkpoint",
            f"--no-finetune takes those of {other}"
            if folder.name == FINETUNE and steps_on_disk(other)
            else f"leave {option} out, or name the pipeline by the options that it was started "
            "with, or by --out",
        )
    return repeated_run(ClassifierRun, folder, given)


def check_trainings(runs: Sequence[TrainingRun]) -> None:
    """Refuses what could not end well, before anything is computed.

    Raises:
        CheckpointError: a folder holds another run, or one from weights that are gone.
        ConfigError: a batch that does not split over the processes, or no such tracker.
    """
    unfinished = ""
    for run in runs:
        check_tracker(run.machine.tracker)
        with refusals_of(run.command):
            run.split_batch(world_size(run.machine))
            step = first_step(run)
        if step and unfinished:
            raise CheckpointError(
                f"{run.out} was trained from weights that {unfinished} does not hold yet",
                f"remove {run.out}, or give this pipeline another --name or --out",
            )
        unfinished = "" if is_finished(run, step) else run.out


def why_no_figures(own: DiTStages) -> str:
    """Why samples will not be measured, empty where they will; refuses weights that are damaged."""
    if not own.reference:
        return "fid is left out: there is no --reference to measure against"
    try:
        find_inception(own.weights)
    except FetchError as error:
        return f"fid is left out: {error.message}; {error.hint}"
    return ""


# ---- plan and work
def carry_out(pipeline: Pipeline, *, dry_run: bool, show: bool = True) -> None:
    """Stages in order, without those that are done, then the page of them all; or plans alone.

    Raises:
        SpiralRopeError: a stage failed; the next ones are left out.
    """
    folder, waiting = Path(pipeline.folder), False
    for number, stage in enumerate(pipeline.stages, 1):
        say(f"[{number}/{len(pipeline.stages)}] {stage.name}")
        if waiting and stage.line:
            say(stage.line)
            continue
        start = time.monotonic()
        done = stage.job(stage, dry_run=dry_run, show=show)
        if dry_run:
            waiting |= not done
            if done:
                say(f" {stage.name} is finished")
        else:
            record(pipeline, stage, None if done else time.monotonic() - start)
    if not dry_run:
        from spiralrope_cli.core.report.page import leave_report

        leave_report(folder)
        say(f"report: {folder / REPORT_FILE}")
    if pipeline.note:
        say(pipeline.note)


def train_stage(stage: Stage, *, dry_run: bool, show: bool) -> bool:
    """A training of either network; `config` is a Resolved."""
    return train.carry_out(stage.config, dry_run=dry_run)


def eval_stage(stage: Stage, *, dry_run: bool, show: bool) -> bool:
    """Best and last checkpoint, both crops, raw and EMA; `config` is where that runs."""
    options = EvalOptions(sources=(stage.folder,), every=True)
    run, notes = evaluate.settle(options, stage.config, set())
    rows = evaluate.measured_rows(run)
    if dry_run:
        say(stage.line)
    elif rows:
        say(f"{stage.folder} is measured: {len(rows)} rows")
        if show:
            from spiralrope_cli.core.metrics.accuracy import print_table

            print_table(rows)
    else:
        say_notes(notes)
        launch(evaluate.JOB, run)
    return bool(rows)


def sample_stage(stage: Stage, *, dry_run: bool, show: bool) -> bool:
    """Images from the averaged weights; `config` has options of `dit-sample`."""
    run, weights = sample.settle(stage.config, download=not dry_run)
    try:
        sample.is_drawn(run, weights)
    except CheckpointError as error:
        hint = f"remove {run.out} to draw again, or draw others: spiralrope dit-sample {run.source}"
        raise CheckpointError(error.message, hint) from error
    return sample.carry_out(run, weights, dry_run=dry_run)


def score_stage(stage: Stage, *, dry_run: bool, show: bool) -> bool:
    """Figures of the samples against the reference; `config` is a FidRun."""
    run: FidRun = stage.config
    result = score.earlier_result(run)
    if dry_run or not result:
        say(stage.line)
    if result and not dry_run:
        say(f"{run.result_file} is there")
        score.report(run, result)
    elif not dry_run:
        launch(score.JOB, score.settle(run))
    return bool(result)


# ---- report
def record(pipeline: Pipeline, stage: Stage, seconds: float | None) -> None:
    """Notes in `pipeline.json` that a stage is done, and the seconds of it, None if done before."""
    path = Path(pipeline.folder) / PIPELINE_FILE
    stages = read_json(path).get("stages", {})
    if seconds is None and stage.name in stages:
        return
    stages[stage.name] = {
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": None if seconds is None else round(seconds, 1),
    }
    write_json(path, {"command": pipeline.command, "spiralrope": __version__, "stages": stages})
