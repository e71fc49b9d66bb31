"""Options that cannot act, each told in one line, and those that a data set cannot have."""

from __future__ import annotations

from spiralrope_cli.core.config.datasets import DataSet
from spiralrope_cli.core.config.dit_runs import DiTRun, TrainingRun
from spiralrope_cli.core.config.runs import AugmentConfig, ClassifierRun
from spiralrope_cli.core.errors import ConfigError


def notes(run: ClassifierRun, data_set: DataSet, given: set[str]) -> list[str]:
    """One line for each of the `given` field names that changes nothing in this run."""
    augment = run.augment
    inert = run.rope.inert_options(given)
    if augment.geometry == "crop":
        inert += [(name, "--geometry is crop") for name in ("max_shift", "max_rotation")]
    else:
        inert += [("crop_scale", "--geometry is shift")]
    if augment.auto_augment not in ("none", "3a") and augment.color_jitter:
        inert += [("color_jitter", f"timm leaves it out beside {augment.auto_augment}")]
    return _told(inert + _of_every_run(run, data_set), given)


def dit_notes(run: DiTRun, data_set: DataSet, given: set[str]) -> list[str]:
    """The same for a diffusion transformer."""
    inert = run.rope.inert_options(given) + _of_every_run(run, data_set)
    if data_set.kind == "latents":
        inert += [(name, "--latents is given") for name in ("data", "workers", "skip_bad")]
    return _told(inert, given)


def _of_every_run(run: TrainingRun, data_set: DataSet) -> list[tuple[str, str]]:
    inert = []
    if run.optim.steps:
        inert += [("epochs", "--steps is given")]
    if run.optim.schedule == "constant":
        inert += [(name, "--schedule is constant") for name in ("min_lr", "warmup_epochs")]
    if data_set.kind == "memory":
        inert += [(name, f"{data_set.data} lives in memory") for name in ("workers", "skip_bad")]
    return inert


def _told(inert: list[tuple[str, str]], given: set[str]) -> list[str]:
    return [
        f"--{name.replace('_', '-')} has no effect: {why}" for name, why in inert if name in given
    ]


def check_fits(augment: AugmentConfig, data_set: DataSet) -> None:
    """Refuses augmentation that the kind of data set cannot have.

    Raises:
        ConfigError: names the option and what there is in its place.
    """
    if data_set.kind == "folder" and augment.geometry == "shift":
        raise ConfigError(
            "--geometry shift is for the built-in sets", "use --geometry crop for image folders"
        )
    if data_set.kind == "memory":
        for name, off in (("auto_augment", "none"), ("color_jitter", 0)):
            if (value := getattr(augment, name)) != off:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {value} works on photographs, "
                    f"not on the grey pictures of {data_set.data}",
                    "use --max-shift, --max-rotation, --random-erasing, --mixup or --cutmix",
                )
