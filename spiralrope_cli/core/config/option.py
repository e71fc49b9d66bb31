"""Options are fields of configs: `Opt` describes them, `Leaf` reads and checks their values.

    epochs: Annotated[int, Opt("Number of epochs.", RUN, ge=1)]

Command line, YAML and Python use the same name, type, bounds and messages. A field without `Opt`
has no option; `Annotated[int, "the number of images"]` gives its name in messages. Standard
library only.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass
from operator import ge, gt, le, lt
from typing import Any

from spiralrope_cli.core.errors import ConfigError, in_one

STAGES, WEIGHTS, ATTENTION, EXPORT = "Stages", "Weights", "Attention", "Export"
DOWNLOAD, SHOW, SAMPLING, IMAGES = "Download", "Display", "Sampling", "Images"
METRICS, MODEL, ROPE = "Metrics", "Model", "Spiral RoPE"
DATA, RECIPE, SAMPLES = "Data and augmentation", "Recipe", "Samples and metrics"
RUN, FIGURE, OUTPUT, MACHINE = "Run", "Figure", "Output", "Machine"
PANELS = (
    *(STAGES, WEIGHTS, ATTENTION, EXPORT, DOWNLOAD, SHOW, SAMPLING, IMAGES, METRICS),
    *(MODEL, ROPE, DATA, RECIPE, SAMPLES, FIGURE, RUN, OUTPUT, MACHINE),
)
"""Panels of the help, in this order."""


@dataclass(frozen=True)
class Opt:
    """The option of a field."""

    help: str
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
    complete: str = ""  # name of a function in commands/completion.py
    free: bool = False  # a resumed run may change it: it has no effect on results
    many: bool = False  # repeatable; the field is a tuple
    argument: bool = False  # positional
    required: bool = False


@dataclass(frozen=True)
class Leaf:
    """A field of a config or of one of its groups, with its option if it has one."""

    name: str
    hint: Any  # type; of one element if `many`
    optional: bool
    many: bool
    default: Any
    opt: Opt | None
    called: str  # its name in messages

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a `Literal`; else none."""
        return typing.get_args(self.hint) if typing.get_origin(self.hint) is typing.Literal else ()

    def allowed(self) -> str:
        """Allowed values, for messages."""
        opt = self.opt or Opt("")
        if self.choices or opt.expects:
            return opt.expects or " or ".join(self.choices)
        low = opt.ge if opt.gt is None else opt.gt
        high = opt.le if opt.lt is None else opt.lt
        if low is not None and high is not None:
            left, right = "[" if opt.gt is None else "(", "]" if opt.lt is None else ")"
            return f"in {left}{low:g}, {high:g}{right}"
        if low is not None:
            whole = "a whole number, " if self.hint is int else ""
            return whole + (f"{low:g} or more" if opt.gt is None else f"above {low:g}")
        inner = typing.get_args(self.hint)
        return f"a list, each {_TYPES[inner[0]]}" if inner else _TYPES[self.hint]

    def readable(self) -> str:
        """`allowed`, for a value of a wrong type."""
        return "a number, " * (self.hint is float) + self.allowed()

    def typed(self, value: Any) -> list[str]:
        """The words of a command line for this value."""
        if isinstance(value, bool) and self.opt:
            on, _, off = (self.opt.flag or self.called).partition("/")
            return [on if value else off]
        return [self.called, str(value)]

    def read(self, value: Any) -> Any:
        """Converts a word of the command line, or a value of YAML, to the type of the field."""
        if self.many and isinstance(value, (list, tuple)):
            return tuple(dataclasses.replace(self, many=False).read(each) for each in value)
        if value is None and self.optional:
            return None
        try:
            if isinstance(value, (str, int)) and self.opt and self.opt.read:
                return self.opt.read(str(value))
            return _as(self.hint, value)
        except (TypeError, ValueError, OverflowError) as error:
            raise self._refused(value, self.readable()) from error

    def check(self, value: Any) -> None:
        """Raises if a value is out of bounds."""
        for each in value if self.many else (value,):
            if each is not None and not self._fits(each):
                raise self._refused(each, self.allowed())

    def _fits(self, value: Any) -> bool:
        opt = self.opt or Opt("")
        if self.choices:
            return value in self.choices
        if isinstance(value, str):
            return not opt.pattern or re.fullmatch(opt.pattern, value) is not None
        bounds = [(opt.ge, ge), (opt.gt, gt), (opt.le, le), (opt.lt, lt)]
        return all(
            holds(value, bound) and math.isfinite(value)
            for bound, holds in bounds
            if bound is not None
        )

    def _refused(self, value: Any, allowed: str) -> ConfigError:
        finite = ", and finite" if value in (math.inf, "inf") else ""
        shown = "empty" if value == "" else value
        return ConfigError(f"{self.called} is {shown}; it must be {allowed}{finite}")


def read_values(known: Mapping[str, Leaf], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values in the types of their fields, others as they are; all that are wrong in one error.

    Raises:
        ConfigError: names the options and what is allowed.
    """
    found, errors = dict(values), []
    for name in filter(known.__contains__, values):
        try:
            found[name] = known[name].read(values[name])
            known[name].check(found[name])
        except ConfigError as error:
            errors.append(error)
    if errors:
        raise in_one(errors)
    return found


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


def _leaves(kind: type) -> dict[str, Leaf]:
    """All fields of a config and its groups, by name; names must be unique."""
    found: dict[str, Leaf] = {}
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint, opt, called = hints[field.name], None, ""
        if typing.get_origin(hint) is typing.Annotated:
            hint, said = typing.get_args(hint)
            opt, called = (said, "") if isinstance(said, Opt) else (None, said)
        if dataclasses.is_dataclass(hint):
            inner = leaves(typing.cast(type, hint))
        else:
            optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
            hint = typing.get_args(hint)[0] if optional else hint
            if opt:
                flag = opt.flag.partition("/")[0] or "--" + field.name.replace("_", "-")
                called = opt.metavar if opt.argument else flag
            many = opt is not None and opt.many
            hint = typing.get_args(hint)[0] if many else hint
            called = called or field.name
            leaf = Leaf(field.name, hint, optional, many, field.default, opt, called)
            inner = {field.name: leaf}
        if twice := found.keys() & inner.keys():
            raise TypeError(f"{kind.__name__}: {', '.join(twice)} is in two groups")
        found.update(inner)
    return found


leaves: Callable[[type], dict[str, Leaf]] = functools.cache(_leaves)


def renamed_fields(kind: type) -> dict[str, str]:
    """Old name -> name, for the fields and groups of a config."""
    found = {field.metadata.get("was", ""): field.name for field in dataclasses.fields(kind)}
    own = {field.name for field in dataclasses.fields(kind)}
    for name, leaf in leaves(kind).items():
        if leaf.opt and name in own:
            found[leaf.opt.was.removeprefix("--").replace("-", "_")] = name
    return {was: name for was, name in found.items() if was}


def check_fields(config: Any) -> None:
    """Checks the values of a config, without its groups; for `__post_init__`."""
    for name, leaf in leaves(type(config)).items():
        if name in vars(config):
            leaf.check(vars(config)[name])


def free_fields(kind: type) -> frozenset[str]:
    """Fields that a resumed run may change: they have no effect on results."""
    return frozenset(n for n, leaf in leaves(kind).items() if leaf.opt and leaf.opt.free)


def idle_lines(kind: type, inert: Iterable[tuple[str, str]], given: Collection[str]) -> list[str]:
    """One line per given option that has no effect; `inert` is (field, reason)."""
    known = leaves(kind)
    return [f"{known[name].called} has no effect: {why}" for name, why in inert if name in given]


def document(kind: type) -> type:
    """Class decorator: adds the help of each option to the docstring."""
    lines = [
        f"    {name} ({leaf.default!r}): {leaf.opt.help}"
        for name, leaf in leaves(kind).items()
        if leaf.opt and leaf.default is not MISSING
    ]
    kind.__doc__ = "\n".join([(kind.__doc__ or "").rstrip(), "", "Attributes:", *lines])
    return kind


def in_words(value: Any) -> str:
    """A value for the help, about as it is typed."""
    if isinstance(value, tuple):
        return "x".join(map(in_words, dict.fromkeys(value)))
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- Text -> value


def numbers(text: str) -> tuple[int, ...]:
    """`207,88` -> (207, 88)."""
    if not re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", text):
        raise ValueError
    return tuple(int(number) for number in text.split(","))


def pair(text: str) -> tuple[int, ...]:
    """`0,600` -> (0, 600)."""
    if len(found := numbers(text)) != 2:
        raise ValueError
    return found


def path(text: str) -> str:
    """A path; expands `~`, as shells do not in `--out=~/runs`. Empty is an error."""
    if not text.strip():
        raise ValueError
    return os.path.expanduser(text)


def folder(text: str) -> str:
    """A folder: expands `~`, removes a slash at the end; may be empty."""
    return os.path.normpath(os.path.expanduser(text)) if text else ""


PATH: dict[str, Any] = {"read": path, "expects": "a path", "metavar": "FOLDER"}
SOURCE = Opt(
    "Run folder, checkpoint file, or published name.",
    metavar="SOURCE",
    complete="sources",
    argument=True,
    required=True,
)
