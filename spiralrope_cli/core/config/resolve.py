"""From options to a run: recipe, then data set, then config file, then options; the last wins.

Standard library only (and PyYAML, where a file is read).
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spiralrope_cli.core.config import inert, recipes
from spiralrope_cli.core.config.datasets import DataSet, find_data_set
from spiralrope_cli.core.config.models import deit_size
from spiralrope_cli.core.config.rope import RopeConfig
from spiralrope_cli.core.config.runs import ClassifierRun, ModelConfig
from spiralrope_cli.core.errors import ConfigError

DATA_VARIABLE = "SPIRALROPE_DATA"
RUNS_FOLDER = "runs"
NOT_FROM_FILE = {"command", "out", "num_train", "num_val", "num_classes", "resume"}
"""Fields that a config file shows but that a repeated run finds anew."""


FIXED_BY_SOURCE = {"arch", "patch_size", "in_chans", "pretrain_grid", "source"}
"""Fields that the weights to start from decide, whatever a config file says."""


@dataclass(frozen=True)
class StartingPoint:
    """The weights that a run starts from.

    Attributes:
        source: as the user named them.
        arch: theirs.
        rope: the options they were trained with.
        model: their sizes.
        published: whether they come in the published layout.
        data: the data set of the run that made them, empty where unknown.
    """

    source: str
    arch: str
    rope: RopeConfig
    model: ModelConfig
    published: bool = False
    data: str = ""

    def fields(self) -> dict[str, Any]:
        """Field name -> value of what they decide."""
        values = {**dataclasses.asdict(self.rope), **dataclasses.asdict(self.model)}
        del values["drop_path"]
        values.update(source=self.source, arch=self.arch)
        return {**values, "data": self.data} if self.data else values


@dataclass(frozen=True)
class Resolved:
    """A run, and where each of its values came from.

    Attributes:
        run: complete and checked.
        sources: field name -> `option`, `config file`, `source`, `data set`, `recipe`,
            `environment`, `default`.
        warnings: options that cannot act, one line each.
    """

    run: ClassifierRun
    sources: dict[str, str]
    warnings: tuple[str, ...]


def resolve_classifier(
    command: str,
    options: dict[str, Any],
    config_file: Path | None = None,
    start: StartingPoint | None = None,
) -> Resolved:
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
    from_file = read_config(config_file) if config_file else {}
    fixed = NOT_FROM_FILE | (FIXED_BY_SOURCE if start else set())
    from_file = {key: value for key, value in from_file.items() if key not in fixed}
    of_start = start.fields() if start else {}
    chosen = [("source", of_start), ("config file", from_file), ("option", options)]

    data, data_source = _choose("data", chosen, os.environ.get(DATA_VARIABLE), "digits")
    data_set = find_data_set(data)
    arch, arch_source = _choose("arch", chosen, None, data_set.default_arch)
    size = deit_size(arch)

    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    of_data = {**data_set.defaults, **(data_set.finetune if command == "finetune" else {})}
    for origin, layer in (
        ("recipe", recipes.recipe(command, arch)),
        ("data set", of_data),
        *chosen,
        ("data set", {"num_classes": data_set.num_classes}),
    ):
        values.update(layer)
        sources.update(dict.fromkeys(layer, origin))
    fit_channels(values)
    if start:
        fit_positions(values, sources, start)
    values.update(
        command=command,
        arch=arch,
        data=data_set.data,
        num_train=data_set.num_train,
        num_val=data_set.num_val,
    )
    sources.update(data=data_source, arch=arch_source)
    fit_length(values, sources, options)
    name = values.pop("name", None)
    sources.pop("name", None)

    rope: RopeConfig = build(RopeConfig, values)
    rope.check_head_dim(size.head_dim)
    if "out" not in values:
        values["out"] = str(Path(RUNS_FOLDER) / run_name(values, rope, data_set, name))
    run: ClassifierRun = build(ClassifierRun, values)
    inert.check_fits(run.augment, data_set)
    given = {name for name, source in sources.items() if source == "option"}
    warnings = inert.notes(run, data_set, given)
    return Resolved(run, sources, tuple(warnings))


def fit_channels(values: dict[str, Any]) -> None:
    """Gives a network for colour pictures the grey set's mean and std for each channel."""
    for name in ("mean", "std"):
        if len(values[name]) == 1:
            values[name] = tuple(values[name]) * values["in_chans"]


def fit_positions(values: dict[str, Any], sources: dict[str, str], start: StartingPoint) -> None:
    """Lets another image size than the weights' keep their grid for the positions.

    Published weights say `extrapolate`, which means nothing at their own size; at another one
    their positions are squeezed into the trained range, unless the user wants it otherwise.
    """
    if tuple(values["image_size"]) == start.model.image_size:
        return
    if start.published and sources["scaling"] == "source":
        values["scaling"], sources["scaling"] = "interpolate", "default"
    values["pretrain_grid"] = start.model.pretrain_grid or start.model.grid


def fit_length(values: dict[str, Any], sources: dict[str, str], options: dict[str, Any]) -> None:
    """Lets `--epochs` win over a file's steps, and a short run have a short warm-up."""
    if "epochs" in options and "steps" not in options:
        values["steps"], sources["steps"] = 0, "option"
    if values["steps"] and sources["warmup_epochs"] in ("recipe", "data set"):
        steps_per_epoch = max(values["num_train"] // max(values["batch_size"], 1), 1)
        longest = int(values["steps"]) // (4 * steps_per_epoch)
        values["warmup_epochs"] = min(values["warmup_epochs"], longest)


def run_name(values: dict[str, Any], rope: RopeConfig, data_set: DataSet, name: str | None) -> str:
    """Folder name of a run: without a date, so that the same command finds its own."""
    turned = f"r{rope.rotate}" if rope.enabled else "norope"
    parts = [values["command"], values["arch"], data_set.slug, turned, *([name] if name else [])]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts))


def _choose(
    key: str, layers: list[tuple[str, dict[str, Any]]], variable: str | None, default: str
) -> tuple[str, str]:
    for source, layer in reversed(layers):
        if layer.get(key) is not None:
            return layer[key], source
    if variable:
        return variable, "environment"
    return default, "data set" if key == "arch" else "default"


def build(kind: type, values: dict[str, Any]) -> Any:
    """Builds a nested frozen config from flat values by field name."""
    hints = typing.get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for name in _fields_of(kind):
        if dataclasses.is_dataclass(hints[name]):
            arguments[name] = build(typing.cast(type, hints[name]), values)
        elif name in values:
            arguments[name] = _coerced(name, values[name], hints[name])
    return kind(**arguments)


def _fields_of(kind: type) -> list[str]:
    return [each.name for each in dataclasses.fields(kind)]


def leaf_types(kind: type) -> dict[str, Any]:
    """Field name -> type of every value below a config."""
    leaves: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        nested = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        leaves.update(leaf_types(hint) if nested else {name: hint})
    return leaves


def _coerced(name: str, value: Any, hint: Any) -> Any:
    """The value in its field's type; YAML knows no tuples, and writes 1e-3 as a word."""
    try:
        if typing.get_origin(hint) is types.UnionType:
            return None if value is None else _coerced(name, value, typing.get_args(hint)[0])
        if typing.get_origin(hint) is tuple:
            inner = typing.get_args(hint)
            if not isinstance(value, (list, tuple)):
                raise TypeError
            if Ellipsis not in inner and len(value) != len(inner):
                raise ValueError
            return tuple(_coerced(name, item, inner[0]) for item in value)
        if hint is float and not isinstance(value, bool):
            return float(value)
        if hint is int and float(value) == int(value) and not isinstance(value, bool):
            return int(value)
        if isinstance(value, hint):
            return value
    except (TypeError, ValueError):
        pass
    wanted = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{name} is {value!r}; it must be of type {wanted}")


def to_nested(run: ClassifierRun) -> dict[str, Any]:
    """Plain nested dicts and lists, as `config.yaml` holds them."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return typing.cast(dict[str, Any], plain(dataclasses.asdict(run)))


def flatten(nested: dict[str, Any], kind: type = ClassifierRun) -> dict[str, Any]:
    """Flat values by field name, strictly: an unknown key suggests the nearest known one.

    Raises:
        ConfigError: an unknown key.
    """
    hints = typing.get_type_hints(kind)
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if key not in hints:
            known = [*leaf_types(ClassifierRun), *hints]
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ConfigError(
                f"config key {key!r} is not known", f"did you mean {near[0]!r}?" if near else ""
            )
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"config key {key!r} must hold a group of values")
            flat.update(flatten(value, typing.cast(type, hints[key])))
        else:
            flat[key] = value
    return flat


def read_config(path: Path) -> dict[str, Any]:
    """Flat values of a `config.yaml`.

    Raises:
        ConfigError: no such file, no YAML, or an unknown key.
    """
    import yaml

    try:
        nested = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is no YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(nested, dict):
        raise ConfigError(f"--config {path} holds no config")
    return flatten(nested)
