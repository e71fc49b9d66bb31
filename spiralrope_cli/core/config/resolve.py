"""From options to a run: recipe, then data set, then config file, then options; the last wins.

Standard library only (and PyYAML, where a file is read).
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from spiralrope_cli.core.config import inert, recipes
from spiralrope_cli.core.config.datasets import DataSet, find_data_set
from spiralrope_cli.core.config.dit_runs import DiTModelConfig, DiTRun, TrainingRun
from spiralrope_cli.core.config.models import deit_size
from spiralrope_cli.core.config.nested import build, read_config
from spiralrope_cli.core.config.rope import RopeConfig
from spiralrope_cli.core.config.runs import ClassifierRun, ModelConfig
from spiralrope_cli.core.errors import ConfigError

DATA_VARIABLE = "SPIRALROPE_DATA"
RUNS_FOLDER = "runs"
NOT_FROM_FILE = {"command", "out", "num_train", "num_val", "num_classes", "resume"}
"""Fields that a config file shows but that a repeated run finds anew."""

Run = TypeVar("Run", bound=TrainingRun)
Layer = tuple[str, dict[str, Any]]
"""Where values come from, and field name -> value."""


FIXED_BY_SOURCE = {
    *("arch", "patch_size", "in_chans", "pretrain_grid", "qk_norm", "source"),
    *(RopeConfig.__dataclass_fields__.keys() - {"scaling"}),
}
"""Fields that the weights to start from decide, whatever a config file says."""


@dataclass(frozen=True)
class StartingPoint:
    """The weights that a run starts from.

    Attributes:
        source: as the user named them.
        arch: theirs.
        rope: the options they were trained with.
        model: their sizes.
        data: the data set of the run that made them, empty where unknown.
        pictures: image_size and vae of a diffusion transformer, as far as they are known.
    """

    source: str
    arch: str
    rope: RopeConfig
    model: ModelConfig | DiTModelConfig
    data: str = ""
    pictures: dict[str, Any] = field(default_factory=dict)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches as (rows, columns)."""
        if isinstance(self.model, ModelConfig):
            return self.model.grid
        return self.model.grid(self.arch)

    def fields(self) -> dict[str, Any]:
        """Field name -> value of what they decide."""
        values = {**dataclasses.asdict(self.rope), **dataclasses.asdict(self.model)}
        for name in ("drop_path", "label_dropout"):  # of training, not of the weights
            values.pop(name, None)
        values.update(self.pictures, source=self.source, arch=self.arch)
        return {**values, "data": self.data} if self.data else values


@dataclass(frozen=True)
class Resolved(Generic[Run]):
    """A run, and where each of its values came from.

    Attributes:
        run: complete and checked.
        sources: field name -> `option`, `config file`, `source`, `data set`, `recipe`,
            `environment`, `default`.
        warnings: options that cannot act, one line each.
    """

    run: Run
    sources: dict[str, str]
    warnings: tuple[str, ...]


def resolve_classifier(
    command: str,
    options: dict[str, Any],
    config_file: Path | None = None,
    start: StartingPoint | None = None,
) -> Resolved[ClassifierRun]:
    """A classifier's training run from what the user gave.

    Args:
        command: `pretrain` or `finetune`.
        options: field name -> value, given options alone.
        config_file: a `config.yaml` of an earlier run.
        start: the weights to start from, where the command takes some.

    Raises:
        ConfigError: an unknown key, or a value that cannot work.
        DataError: no such data set.
    """
    chosen = chosen_layers(ClassifierRun, options, config_file, start)
    data, data_source = choose_data(chosen)
    data_set = find_data_set(data)
    arch, arch_source = choose("arch", chosen, data_set.default_arch)
    head_dim = deit_size(arch).head_dim

    of_data = {**data_set.defaults, **(data_set.finetune if command == "finetune" else {})}
    values, sources = merged(
        ("recipe", recipes.recipe(command, arch)),
        ("data set", of_data),
        *chosen,
        ("data set", {"num_classes": data_set.num_classes}),
    )
    fit_channels(values)
    if start:
        fit_positions(values, sources, start, "image_size")
    values.update(command=command, arch=arch, data=data_set.data)
    values.update(num_train=data_set.num_train, num_val=data_set.num_val)
    sources.update(data=data_source, arch=arch_source)
    fit_length(values, sources, options)
    fit_name(values, sources, data_set, head_dim)
    run: ClassifierRun = build(ClassifierRun, values)
    inert.check_fits(run.augment, data_set)
    return Resolved(run, sources, tuple(inert.notes(run, data_set, options_in(sources))))


def chosen_layers(
    kind: type[TrainingRun],
    options: dict[str, Any],
    config_file: Path | None,
    start: StartingPoint | None,
) -> list[Layer]:
    """What the user settled on, from weak to strong: starting weights, config file, options.

    Raises:
        ConfigError: the file is of a run that starts from weights, and there are none.
    """
    from_file = read_config(config_file, kind) if config_file else {}
    if from_file.get("source") and not start:
        again = "dit-train --init" if kind is DiTRun else "finetune"
        raise ConfigError(
            f"--config {config_file} is of a run that starts from {from_file['source']}",
            f"spiralrope {again} {from_file['source']} --config {config_file}",
        )
    fixed = NOT_FROM_FILE | (FIXED_BY_SOURCE if start else set())
    from_file = {key: value for key, value in from_file.items() if key not in fixed}
    of_start = start.fields() if start else {}
    return [("source", of_start), ("config file", from_file), ("option", options)]


def merged(*layers: Layer) -> tuple[dict[str, Any], dict[str, str]]:
    """Field name -> value and field name -> where it came from; a later layer wins."""
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for origin, layer in layers:
        values.update(layer)
        sources.update(dict.fromkeys(layer, origin))
    return values, sources


def options_in(sources: dict[str, str]) -> set[str]:
    """The fields that an option set."""
    return {name for name, source in sources.items() if source == "option"}


def fit_channels(values: dict[str, Any]) -> None:
    """Fits mean and std to the network's channels: the grey one for each, or the colours' mean."""
    for name in ("mean", "std"):
        given = tuple(values[name])
        if len(given) == 1:
            values[name] = given * values["in_chans"]
        elif values["in_chans"] == 1:
            values[name] = (round(sum(given) / len(given), 4),)


def fit_positions(
    values: dict[str, Any], sources: dict[str, str], start: StartingPoint, size: str
) -> None:
    """Lets another image size than the weights' keep their grid for the positions.

    Whatever they were trained with, their positions are then squeezed into the trained range
    unless the user wants it otherwise: published weights say `extrapolate`, which means nothing
    at their own size.

    Args:
        values: changed in place.
        sources: changed in place.
        start: the weights.
        size: field of the network's size, `image_size` or `input_size`.
    """
    if tuple(values[size]) == getattr(start.model, size):
        return
    if sources["scaling"] == "source":
        values["scaling"], sources["scaling"] = "interpolate", "default"
    values["pretrain_grid"] = start.model.pretrain_grid or start.grid


def fit_length(values: dict[str, Any], sources: dict[str, str], options: dict[str, Any]) -> None:
    """Lets `--epochs` win over a file's steps, and a short run have a short warm-up."""
    if "epochs" in options and "steps" not in options:
        values["steps"], sources["steps"] = 0, "option"
    if values["steps"] and sources["warmup_epochs"] in ("recipe", "data set"):
        steps_per_epoch = max(values["num_train"] // max(values["batch_size"], 1), 1)
        longest = int(values["steps"]) // (4 * steps_per_epoch)
        values["warmup_epochs"] = min(values["warmup_epochs"], longest)


def fit_name(
    values: dict[str, Any], sources: dict[str, str], data_set: DataSet, head_dim: int
) -> None:
    """Names the run's folder without a date, so that the same command finds its own."""
    rope: RopeConfig = build(RopeConfig, values)
    rope.check_head_dim(head_dim)
    turned = f"r{rope.rotate}" if rope.enabled else "norope"
    name = values.pop("name", None)
    sources.pop("name", None)
    if name and "out" in values:
        raise ConfigError(
            f"--name {name} and --out {values['out']} both name the folder", "give one"
        )
    parts = [values["command"], values["arch"], data_set.slug, turned, *([name] if name else [])]
    folder = re.sub(r"[^\w.-]+", "-", "-".join(parts))
    values.setdefault("out", str(Path(RUNS_FOLDER) / folder))


def choose_data(layers: list[Layer]) -> tuple[str, str]:
    """The data set's name or folder, and where that came from."""
    if variable := os.environ.get(DATA_VARIABLE):
        return choose("data", layers, variable, "environment")
    return choose("data", layers, "digits", "default")


def choose(
    key: str, layers: list[Layer], default: Any, default_source: str = "data set"
) -> tuple[Any, str]:
    """A value that others follow from, and where it came from."""
    for source, layer in reversed(layers):
        if layer.get(key) is not None:
            return layer[key], source
    return default, default_source
