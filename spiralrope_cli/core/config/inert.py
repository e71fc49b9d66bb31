"""Options that cannot act, each told in one line, and those that a data set cannot have."""

from __future__ import annotations

from spiralrope_cli.core.config.datasets import DataSet
from spiralrope_cli.core.config.dit_runs import TrainingRun
from spiralrope_cli.core.config.runs import AugmentConfig
from spiralrope_cli.core.errors import ConfigError


def notes(run: TrainingRun, data_set: DataSet, given: set[str]) -> list[str]:
    """One line for each of the `given` field names that changes nothing in this run."""
    inert = [*run.rope.inert_options(given), *run.inert_options()]
    if run.optim.steps:
        inert += [("epochs", "--steps is given")]
    if run.optim.schedule == "constant":
        inert += [(name, "--schedule is constant") for name in ("min_lr", "warmup_epochs")]
    if data_set.kind == "memory":
        inert += [(name, f"{data_set.data} lives in memory") for name in ("workers", "skip_bad")]
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
