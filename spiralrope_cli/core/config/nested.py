"""Configs as files: nested frozen dataclasses to plain values and back, strictly.

Standard library only (and PyYAML, where a file is read).
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any

from spiralrope_cli.core.config.dit_runs import DiTRun, TrainingRun
from spiralrope_cli.core.config.runs import ClassifierRun
from spiralrope_cli.core.errors import ConfigError

RUN_KINDS: dict[str, type[TrainingRun]] = {
    **dict.fromkeys(("pretrain", "finetune"), ClassifierRun),
    "dit-train": DiTRun,
}


def read_config(path: Path, kind: type[TrainingRun] | None = None) -> dict[str, Any]:
    """Flat values of a `config.yaml`.

    Args:
        path: the file, of any training command.
        kind: the run that it must be of, where that matters.

    Raises:
        ConfigError: no such file, no YAML, an unknown key, or another kind of run.
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
    command = nested.get("command")
    of_file = RUN_KINDS.get(str(command), kind or ClassifierRun)
    if kind is not None and of_file is not kind:
        raise ConfigError(f"--config {path} is of another kind of run, {command}")
    flat, wanted = flatten(nested, of_file), leaf_types(of_file)
    for name, value in flat.items():
        _coerced(name, value, wanted[name])
    return flat


def flatten(
    nested: dict[str, Any], kind: type, known: Collection[str] | None = None
) -> dict[str, Any]:
    """Flat values by field name, strictly: an unknown key suggests the nearest known one.

    Raises:
        ConfigError: an unknown key.
    """
    hints = typing.get_type_hints(kind)
    known = known or list(leaf_types(kind))
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if key not in hints:
            raise ConfigError(f"config key {key!r} is not known here", _nearest(key, kind, known))
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"config key {key!r} must hold a group of values")
            flat.update(flatten(value, typing.cast(type, hints[key]), known))
        else:
            flat[key] = value
    return flat


def _nearest(key: Any, kind: type, known: Collection[str]) -> str:
    """What may have been meant by a key, as a hint."""
    hints = typing.get_type_hints(kind)
    groups = [name for name, hint in hints.items() if dataclasses.is_dataclass(hint)]
    if group := next((name for name in groups if key in leaf_types(hints[name])), ""):
        return f"it belongs below {group}:"
    near = difflib.get_close_matches(str(key), [*(set(known) - {key}), *hints], n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def to_nested(run: TrainingRun) -> dict[str, Any]:
    """Plain nested dicts and lists, as `config.yaml` holds them."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return typing.cast(dict[str, Any], plain(dataclasses.asdict(run)))


def leaf_types(kind: type) -> dict[str, Any]:
    """Field name -> type of every value below a config."""
    leaves: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        nested = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        leaves.update(leaf_types(hint) if nested else {name: hint})
    return leaves


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
    raise ConfigError(f"{name} is {value!r}; it must be {_in_words(hint)}")


def _in_words(hint: Any) -> str:
    if typing.get_origin(hint) is types.UnionType:
        return _in_words(typing.get_args(hint)[0]) + " or nothing"
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        count = "" if Ellipsis in inner else f"{len(inner)} "
        return f"a list of {count}values of type {inner[0].__name__}"
    return f"of type {hint.__name__}"
