"""Options are fields of configs: `Opt` describes an option, reads its values and checks them.

    epochs: int = option("Number of epochs.", "Run", ge=1)

Command line, YAML and Python use the same name, type, bounds and messages. A field without help
has no option; `num_train: int = option(called="the number of images")` gives its name in messages.
`panel` of a config is that of all its fields that name no other; with `free` a resumed run may
change all of them. Standard library only.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import os
import re
import reprlib
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from operator import ge, gt, le, lt
from typing import Any

from spiralrope_cli.core.errors import ConfigError, in_one

PANELS = (
    *("Stages", "Weights", "Attention", "Export", "Upload", "Download", "Display", "Sampling"),
    *("Images", "Metrics", "Model", "Spiral RoPE", "Data and augmentation", "Recipe"),
    *("Samples and metrics", "Figure", "Run", "Output", "Machine"),
)
"""Panels of the help, in this order."""


@dataclass(frozen=True)
class Opt:
    """A field of a config, and its option; `leaves` adds what the field itself says."""

    help: str = ""  # empty: there is no option
    panel: str = ""  # its panel in the help
    _: dataclasses.KW_ONLY
    flag: str = ""  # the option, if it is not the name of the field with dashes
    was: str = ""  # its old name, a hidden option
    metavar: str = ""  # placeholder in the help, if that of the type is not enough
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    pattern: str = ""  # regular expression that a string must match
    expects: str = ""  # allowed values, in messages; by default from type and bounds
    read: Callable[[str], Any] | None = None  # text -> value, or raises ValueError
    complete: str | tuple[str, ...] = ""  # function in commands/completion.py, or the words
    free: bool = False  # a resumed run may change it: it has no effect on results
    many: bool = False  # repeatable; the field is a tuple
    argument: bool = False  # positional
    required: bool = False
    may_be_empty: bool = False
    # Spelling that needs no value -> the values that it then means
    bare: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict, hash=False)
    called: str = ""  # its name in messages, if it has no option
    # Of the field
    name: str = ""
    hint: Any = None  # type; of one element if `many`
    optional: bool = False
    default: Any = None  # MISSING: there is none

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a `Literal`; else none."""
        return typing.get_args(self.hint) if typing.get_origin(self.hint) is typing.Literal else ()

    def allowed(self) -> str:
        """Allowed values, for messages."""
        if self.choices or self.expects:
            return self.expects or one_of(self.choices)
        low = self.ge if self.gt is None else self.gt
        high = self.le if self.lt is None else self.lt
        if low is None:
            inner = typing.get_args(self.hint)
            return f"a list, each {_TYPES[inner[0]]}" if inner else _TYPES[self.hint]
        if high is not None:
            left, right = "[" if self.gt is None else "(", "]" if self.lt is None else ")"
            return f"in {left}{low:.10g}, {high:.10g}{right}"
        whole = "a whole number, " if self.hint is int else ""
        return whole + (f"{low:.10g} or more" if self.gt is None else f"above {low:.10g}")

    def readable(self) -> str:
        """`allowed`, for a value of a wrong type."""
        return "a number, " * (self.hint is float) + self.allowed()

    def typed(self, value: Any) -> list[str]:
        """The words of a command line for this value."""
        if isinstance(value, bool) and self.help:
            on, _, off = self.flag.partition("/")
            return [on if value else off]
        return [self.called, str(value)]

    def convert(self, value: Any) -> Any:
        """Converts a word of the command line, or a value of YAML, to the type of the field."""
        if self.many and isinstance(value, (list, tuple)):
            return tuple(dataclasses.replace(self, many=False).convert(each) for each in value)
        if value is None and self.optional:
            return None
        try:
            read = self.read if isinstance(value, (str, int)) else None
            found = read(str(value)) if read else _as(self.hint, value)
            parts = found if isinstance(found, tuple) else (found,)
            if any(isinstance(n, int) and abs(n) > MOST for n in parts) and "seed" not in self.name:
                raise self._refused(value, f"{self.readable()}, at most {MOST}")
            return found
        except (TypeError, ValueError, OverflowError) as error:
            raise self._refused(value, self.readable()) from error

    def check(self, value: Any) -> None:
        """Raises if a value is out of bounds."""
        bounds = [(self.ge, ge), (self.gt, gt), (self.le, le), (self.lt, lt)]
        given = [(bound, fit) for bound, fit in bounds if bound is not None]
        for each in value if self.many else (value,):
            if self.choices:
                fits = each in (*self.choices, None)
            elif isinstance(each, str):
                fits = not self.pattern or re.fullmatch(self.pattern, each) is not None
            else:
                fits = each is None or all(
                    fit(each, n) and abs(each) < math.inf for n, fit in given
                )
            if not fits:
                raise self._refused(each, self.allowed())

    def _refused(self, value: Any, allowed: str) -> ConfigError:
        finite = ", and finite" if value in (math.inf, "inf") else ""
        shown = (value if isinstance(value, str) else reprlib.repr(value))[:200] or "empty"
        return ConfigError(f"{self.called} is {shown}; it must be {allowed}{finite}")


def option(
    help: str | Opt = "", panel: str = "", *, default: Any = dataclasses.MISSING, **more: Any
) -> Any:
    """A field of a config; in place of the help an `Opt` that several fields share."""
    shared = help if isinstance(help, Opt) else Opt(help)
    opt = dataclasses.replace(shared, panel=panel or shared.panel, **more)
    return dataclasses.field(default=default, metadata={"option": opt})


def read_values(known: Mapping[str, Opt], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values in the types of their fields, others as they are; all that are wrong in one error."""
    found, errors = dict(values), []
    for name in filter(known.__contains__, values):
        try:
            found[name] = known[name].convert(values[name])
            known[name].check(found[name])
        except ConfigError as error:
            errors.append(error)
    if errors:
        raise in_one(errors)
    return found


MOST = 2**31 - 1  # of whole numbers: what computes with them has 32 or 64 bits; seeds are hashed
_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _as(hint: Any, value: Any) -> Any:
    """Converts a value to a type. YAML has no tuples, and reads 1e-3 as a string."""
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        if isinstance(value, (str, dict)) or (Ellipsis not in inner and len(value) != len(inner)):
            raise ValueError
        return tuple(_as(inner[0], each) for each in value)
    kind = str if typing.get_origin(hint) is typing.Literal else typing.get_origin(hint) or hint
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, bool) is not (kind is bool):
        raise ValueError
    if kind is float or (kind is int and isinstance(value, str)):
        return kind(value)
    if kind is int and float(value) == int(value):
        return int(value)
    if not isinstance(value, kind):
        raise ValueError
    return value


@functools.cache
def groups(kind: type) -> dict[str, Any]:
    """The fields of a config that are configs themselves."""
    hints = typing.get_type_hints(kind)
    return {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}


def _leaves(kind: type) -> dict[str, Opt]:
    """All fields of a config and its groups, by name; names must be unique."""
    found: dict[str, Opt] = {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, opt = hints[field.name], field.metadata.get("option", Opt())
        if field.name in groups(kind):
            inner = leaves(hint)
        else:
            optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
            for _ in range(optional + opt.many):
                hint = typing.get_args(hint)[0]
            flag = opt.flag or "--" + field.name.replace("_", "-")
            said = flag.partition("/")[0] if opt.help else opt.called or field.name
            called = opt.metavar if opt.argument else said
            of_field = {"name": field.name, "hint": hint, "optional": optional}
            of_field |= {"default": field.default, "flag": flag, "called": called}
            of_field |= {"free": opt.free or getattr(kind, "free", False)}
            of_kind = "" if opt.argument else getattr(kind, "panel", "")
            of_field |= {"panel": opt.panel or of_kind}
            inner = {field.name: dataclasses.replace(opt, **of_field)}
        if twice := found.keys() & inner.keys():
            raise TypeError(f"{kind.__name__}: {', '.join(twice)} is in two groups")
        found.update(inner)
    return found


leaves: Callable[[type], dict[str, Opt]] = functools.cache(_leaves)


def renamed_fields(kind: type) -> dict[str, str]:
    """Old name -> name, for the fields and groups of a config."""
    found = {field.metadata.get("was", ""): field.name for field in dataclasses.fields(kind)}
    for name, opt in leaves(kind).items():
        found[opt.was.removeprefix("--").replace("-", "_")] = name
    return {was: name for was, name in found.items() if was}


def check_fields(config: Any) -> None:
    """Checks the values of a config, without its groups; for `__post_init__`."""
    for name, opt in leaves(type(config)).items():
        if name in vars(config):
            opt.check(vars(config)[name])


def idle_lines(kind: type, inert: Iterable[tuple[str, str]], given: Collection[str]) -> list[str]:
    """One line per given option that has no effect; `inert` is (field, reason)."""
    known = leaves(kind)
    return [f"{known[name].called} has no effect: {why}" for name, why in inert if name in given]


def one_of(words: Iterable[str]) -> str:
    """`a, b or c`."""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def in_words(value: Any) -> str:
    """A value for the help, about as it is typed."""
    if isinstance(value, tuple):
        return "x".join(map(in_words, dict.fromkeys(value)))
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- Nested configs <-> flat values by field name


def renamed(nested: dict[str, Any], kind: type) -> dict[str, Any]:
    """A nested config with old names replaced by new ones."""
    names, found = renamed_fields(kind), {}
    for key, value in nested.items():
        if (name := names.get(key, key)) in found:
            was = next(old for old in nested if names.get(old) == name)
            raise ConfigError(f"config keys {was!r} and {name!r} are one", f"leave {was!r} out")
        inner = isinstance(value, dict) and groups(kind).get(name)
        found[name] = renamed(value, inner) if inner else value
    return found


def flatten(
    nested: dict[str, Any], kind: type, known: Collection[str] | None = None
) -> dict[str, Any]:
    """Flat values by field name; for an unknown key the error suggests the nearest."""
    here, known = {field.name for field in dataclasses.fields(kind)}, known or list(leaves(kind))
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if key not in here:
            near = difflib.get_close_matches(str(key), {*known, *here} - {key}, n=1)
            hint = f"did you mean {near[0]!r}?" if near else ""
            if home := [name for name, group in groups(kind).items() if key in leaves(group)]:
                hint = f"it belongs in the group {home[0]}:"
            raise ConfigError(f"config key {key!r} is unknown", hint)
        if key not in groups(kind):
            flat[key] = value
        elif isinstance(value, dict):
            flat.update(flatten(value, groups(kind)[key], known))
        else:
            raise ConfigError(f"config key {key!r} must hold a group of values")
    return flat


def flat_values(config: Any) -> dict[str, Any]:
    """Field name -> value, over all groups of a config."""
    flat: dict[str, Any] = {}
    for name, value in vars(config).items():
        flat.update(flat_values(value) if dataclasses.is_dataclass(value) else {name: value})
    return flat


def to_nested(run: Any) -> dict[str, Any]:
    """Nested dicts and lists for `config.yaml`."""
    return dict(json.loads(json.dumps(dataclasses.asdict(run))))  # tuples to lists


def build(kind: type, values: dict[str, Any]) -> Any:
    """Builds a nested config from flat values by field name; types and bounds are checked."""
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        name = field.name
        if name in groups(kind):
            arguments[name] = build(groups(kind)[name], values)
        elif name in values:
            arguments[name] = leaves(kind)[name].convert(values[name])
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"the config has no {name}", "it is of another version of spiralrope")
    return kind(**arguments)


# --- Text -> value


def path(text: str) -> str:
    """A path; expands `~`, as shells do not in `--out=~/runs`. Empty is an error."""
    if not text.strip():
        raise ValueError
    return os.path.expanduser(text)


def folder(text: str) -> str:
    """A folder: expands `~`, removes a slash at the end; may be empty."""
    return os.path.normpath(os.path.expanduser(text)) if text else ""


PATH: dict[str, Any] = {"read": path, "expects": "a path", "metavar": "FOLDER"}
FILE = {**PATH, "metavar": "FILE"}
SOURCE = Opt(
    "Run folder, checkpoint file, published name, or hf:OWNER/NAME of the Hugging Face "
    "Hub, also with /FILE and @REVISION.",
    metavar="SOURCE",
    complete="sources",
    argument=True,
    required=True,
)
