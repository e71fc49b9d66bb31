"""`config.yaml`: nested frozen dataclasses to plain values and back, with strict keys.

Standard library only (PyYAML is imported when a file is read).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any

from spiralrope_cli.core.config.dit_runs import DiTRun, TrainingRun
from spiralrope_cli.core.config.option import leaves, read_values, renamed_fields
from spiralrope_cli.core.config.runs import ClassifierRun
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.storage import parse

RUN_KINDS: dict[str, type[TrainingRun]] = {
    **dict.fromkeys(("pretrain", "finetune"), ClassifierRun),
    "dit-train": DiTRun,
}


def read_config(path: Path, kind: type[TrainingRun] | None = None) -> dict[str, Any]:
    """Flat values of a `config.yaml`, in the types of their fields; checks that it is of `kind`."""
    import yaml

    try:
        nested = parse(path.read_text(), yaml.safe_load)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--config {path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(nested, dict):
        raise ConfigError(f"--config {path} is not a config of a run")
    command = nested.get("command")
    of_file = RUN_KINDS.get(str(command), kind or ClassifierRun)
    if kind is not None and of_file is not kind:
        raise ConfigError(f"--config {path} is of another kind of run, {command}")
    known, nested = leaves(of_file), renamed(nested, of_file)
    return read_values(known, flatten(nested, of_file))


def renamed(nested: dict[str, Any], kind: type) -> dict[str, Any]:
    """A nested config with old names replaced by new ones."""
    names, found = renamed_fields(kind), {}
    for key, value in nested.items():
        if (name := names.get(key, key)) in found:
            was = next(old for old in nested if names.get(old) == name)
            raise ConfigError(f"config keys {was!r} and {name!r} are one", f"leave {was!r} out")
        found[name] = renamed(value, kind) if isinstance(value, dict) else value
    return found


def flatten(
    nested: dict[str, Any], kind: type, known: Collection[str] | None = None
) -> dict[str, Any]:
    """Flat values by field name; for an unknown key the error suggests the nearest."""
    hints, known = typing.get_type_hints(kind), known or list(leaves(kind))
    groups: dict[str, Any] = {
        n: hint for n, hint in hints.items() if dataclasses.is_dataclass(hint)
    }
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), [*({*known} - {key}), *hints], n=1)
            hint = f"did you mean {near[0]!r}?" if near else ""
            if home := [name for name, group in groups.items() if key in leaves(group)]:
                hint = f"it belongs in the group {home[0]}:"
            raise ConfigError(f"config key {key!r} is unknown", hint)
        if key not in groups:
            flat[key] = value
        elif isinstance(value, dict):
            flat.update(flatten(value, groups[key], known))
        else:
            raise ConfigError(f"config key {key!r} must hold a group of values")
    return flat


def flat_values(config: Any) -> dict[str, Any]:
    """Field name -> value, over all groups of a config."""
    flat: dict[str, Any] = {}
    for name, value in vars(config).items():
        flat.update(flat_values(value) if dataclasses.is_dataclass(value) else {name: value})
    return flat


def to_nested(run: TrainingRun) -> dict[str, Any]:
    """Nested dicts and lists for `config.yaml`."""
    nested: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(run)))  # tuples to lists
    return nested


def build(kind: type, values: dict[str, Any]) -> Any:
    """Builds a nested config from flat values by field name; types and bounds are checked."""
    hints, known = typing.get_type_hints(kind), leaves(kind)
    arguments: dict[str, Any] = {}
    for each in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[each.name]):
            arguments[each.name] = build(typing.cast(type, hints[each.name]), values)
        elif each.name in values:
            arguments[each.name] = known[each.name].convert(values[each.name])
        elif each.default is each.default_factory is dataclasses.MISSING:
            raise ConfigError(
                f"the config has no {each.name}", "it is of another version of spiralrope"
            )
    return kind(**arguments)
