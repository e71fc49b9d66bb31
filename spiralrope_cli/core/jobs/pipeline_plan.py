"""From the options of `run` to the runs of its stages, by the rules of the single commands.

No torch, so that a wrong option of the last stage is told before the first one starts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spiralrope_cli.core.config.nested import build, flatten, read_config, to_nested
from spiralrope_cli.core.config.optim import OptimConfig
from spiralrope_cli.core.config.option import free_fields
from spiralrope_cli.core.config.pipelines import (
    FINETUNE,
    OF_BOTH_TRAININGS,
    PRETRAIN,
    SAMPLE,
    TRAIN,
    DeiTPipeline,
    DiTPipeline,
)
from spiralrope_cli.core.config.resolve import Resolved, Run, StartingPoint, resolve
from spiralrope_cli.core.config.runs import ClassifierRun, MachineConfig
from spiralrope_cli.core.config.samples import decoder_of
from spiralrope_cli.core.data.inputs import look_at
from spiralrope_cli.core.errors import CheckpointError, ConfigError, FetchError, SpiralRopeError
from spiralrope_cli.core.hub.inception import find_inception
from spiralrope_cli.core.hub.vae import find_vae
from spiralrope_cli.core.runtime.launch import world_size
from spiralrope_cli.core.runtime.report import check_tracker
from spiralrope_cli.core.runtime.run_folder import (
    CONFIG_FILE,
    check_same,
    first_step,
    is_finished,
    refuse_run,
    steps_on_disk,
)

OF_FINETUNE = re.compile(r"--(epochs|steps|lr|warmup-epochs|batch-size)\b")
"""Options that finetuning has of its own, as its errors call them."""

ANOTHER_NAME = "or name the pipeline by the options that it was started with, or by --out"


def deit_pipeline(
    options: dict[str, Any], stages: tuple[str, ...], *, finetune: bool = True
) -> DeiTPipeline:
    """The classifier's pipeline from what the user gave.

    What is not trained now is taken as its folder says; options may repeat that, not change it.

    Args:
        options: field name -> value, given options alone; `finetune_epochs` is `epochs` there.
        stages: from `deit_stages`.
        finetune: whether there is a second training, now or before.

    Raises:
        ConfigError: a value that cannot work.
        CheckpointError: a folder that holds another run, or none where one is needed.
        DataError: no such data set.
    """
    given, ahead = dict(options), f"{FINETUNE}_"
    own = {name.removeprefix(ahead): given.pop(name) for name in options if name.startswith(ahead)}
    if own and not finetune:
        raise ConfigError(
            f"--finetune-{next(iter(own)).replace('_', '-')} has no effect with --no-finetune",
            "leave one of them out",
        )
    out = given.pop("out", None)
    first = resolve(PRETRAIN, given)
    folder = folder_of(out, first.run.out, PRETRAIN, "run-deit")
    before, after = folder / PRETRAIN, folder / FINETUNE
    trainings: list[Resolved[ClassifierRun]] = []
    if PRETRAIN in stages:
        trainings.append(placed(first, before))
        start = start_of(trainings[0].run)
    elif FINETUNE in stages:
        start = start_of(saved_run(before, "--skip-training", given))
    if FINETUNE in stages:
        own |= {name: value for name, value in given.items() if name in OF_BOTH_TRAININGS}
        try:
            trainings.append(placed(resolve(FINETUNE, own, start=start), after))
        except ConfigError as error:
            message, hint = of_finetune(error)
            raise ConfigError(f"finetune: {message}", hint) from error
    evaluated = after if finetune else before
    if not trainings:
        of_pretrain = OptimConfig.__dataclass_fields__.keys() | {"drop_path"}
        repeated = {k: v for k, v in given.items() if not finetune or k not in of_pretrain}
        saved_run(evaluated, "--eval-only", {**repeated, **own} if finetune else repeated)
    check_trainings(trainings)
    return DeiTPipeline(
        folder=str(folder),
        trainings=tuple(trainings),
        evaluated=str(evaluated),
        machine=build(MachineConfig, given),
    )


def dit_pipeline(
    options: dict[str, Any], sampling: dict[str, Any], *, reference: str, weights: str
) -> DiTPipeline:
    """The diffusion transformer's pipeline from what the user gave.

    Args:
        options: field name -> value, given options of the training and of the machine.
        sampling: field name -> value, given options of `dit-sample`.
        reference: of the figures, empty for none.
        weights: of Inception, empty for those that were fetched.

    Raises:
        ConfigError: a value that cannot work.
        CheckpointError: a folder that holds another run.
        DataError: no such data set or reference.
    """
    given = dict(options)
    out = given.pop("out", None)
    training = resolve("dit-train", given)
    folder = folder_of(out, training.run.out, training.run.command, "run-dit")
    training = placed(training, folder / TRAIN)
    if reference:
        look_at(Path(reference).expanduser(), "REFERENCE")
    check_trainings([training])
    finished = is_finished(training.run, first_step(training.run))
    if (folder / SAMPLE).exists() and not finished:
        raise CheckpointError(
            f"{folder / SAMPLE} was drawn from weights that {training.run.out} does not hold yet",
            f"remove {folder / SAMPLE}, or give this pipeline another --name or --out",
        )
    return DiTPipeline(
        folder=str(folder),
        training=training,
        sampling=sampling,
        reference=reference,
        weights=weights,
        machine=build(MachineConfig, given),
    )


def why_no_figures(pipeline: DiTPipeline) -> str:
    """Why samples will not be measured, empty where they will.

    Raises:
        ConfigError: the file of `--weights` is not there.
        CheckpointError: the weights are damaged.
    """
    if not pipeline.reference:
        return "there is no --reference to measure against"
    try:
        find_inception(pipeline.weights)
    except FetchError as error:
        return f"{error.message}; {error.hint}"
    return ""


def fetch_vaes(pipeline: DiTPipeline) -> None:
    """Refuses VAEs that a later stage could not use; those that are published are fetched.

    Raises:
        ConfigError, CheckpointError, FetchError: no such VAE, or none that fits.
    """
    pictures = pipeline.training.run.pictures
    if not pictures.in_latents:
        return
    for vae in ([] if pictures.latents else [pictures.vae]) + [decoder_of(pictures.vae)]:
        find_vae(vae)


def folder_of(out: str | None, training: str, command: str, pipeline: str) -> Path:
    """The pipeline's folder: as given, or named as its training's but for the command."""
    usual = Path(training)
    folder = Path(out) if out else usual.with_name(pipeline + usual.name.removeprefix(command))
    refuse_run(folder)
    return folder


def placed(resolved: Resolved[Run], folder: Path) -> Resolved[Run]:
    """The same run in another folder."""
    return replace(resolved, run=replace(resolved.run, out=str(folder)))


def start_of(run: ClassifierRun) -> StartingPoint:
    """The weights that a run leaves, as reading them tells afterwards."""
    return StartingPoint(
        source=run.out, arch=run.arch, rope=run.rope, model=run.model, data=run.data
    )


def saved_run(folder: Path, option: str, given: dict[str, Any]) -> ClassifierRun:
    """A run that a pipeline goes on from without training it.

    Args:
        folder: its own.
        option: that wants it.
        given: field name -> value, options of the user.

    Raises:
        CheckpointError: it has no checkpoint, or was made with other options.
    """
    if not steps_on_disk(folder):
        other = folder.with_name(PRETRAIN)
        raise CheckpointError(
            f"{option}: {folder} holds no checkpoint",
            f"--no-finetune takes those of {other}"
            if folder.name == FINETUNE and steps_on_disk(other)
            else f"leave {option} out, {ANOTHER_NAME}",
        )
    path = folder / CONFIG_FILE
    values = read_config(path, ClassifierRun)
    run: ClassifierRun = build(ClassifierRun, {**values, "out": str(folder)})
    changes = {
        k: v for k, v in given.items() if k in values and k not in free_fields(ClassifierRun)
    }
    changes.pop("precision", None)
    if "data" in changes and (root := Path(str(changes["data"])).expanduser()).is_dir():
        changes["data"] = str(root.resolve())
    check_same(build(ClassifierRun, {**flatten(to_nested(run), ClassifierRun), **changes}), folder)
    return run


def of_finetune(error: SpiralRopeError) -> list[str]:
    """Message and hint of an error of finetuning, by the names that its options have here."""
    return [OF_FINETUNE.sub(r"--finetune-\1", text) for text in (error.message, error.hint)]


def check_trainings(trainings: Sequence[Resolved[Any]]) -> None:
    """Refuses what could not end well, before anything is computed.

    Raises:
        CheckpointError: a folder holds another run, or one from weights that are gone.
        ConfigError: a batch that does not split over the processes, or no such tracker.
    """
    unfinished = ""
    for run in (resolved.run for resolved in trainings):
        check_tracker(run.machine.tracker)
        run.split_batch(world_size(run.machine))
        try:
            step = first_step(run)
        except CheckpointError as error:
            if run.command == FINETUNE:
                raise CheckpointError(*of_finetune(error)) from error
            raise
        if step and unfinished:
            raise CheckpointError(
                f"{run.out} was trained from weights that {unfinished} does not hold yet",
                f"remove {run.out}, or give this pipeline another --name or --out",
            )
        unfinished = "" if is_finished(run, step) else run.out
