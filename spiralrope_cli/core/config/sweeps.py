"""What a grid of pipelines is. Standard library only."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from spiralrope_cli.core.config.option import Leaf, leaves
from spiralrope_cli.core.config.pipelines import Pipeline
from spiralrope_cli.core.config.rope import RopeConfig
from spiralrope_cli.core.config.runs import ClassifierRun
from spiralrope_cli.core.errors import ConfigError

OFF = "none"
"""`rotate=none` is the baseline without rotary embedding."""

_OF_RUN = leaves(ClassifierRun)
_OF_TRAINING = ("epochs", "steps", "lr", "warmup_epochs", "batch_size")
KINDS: dict[str, Leaf] = {
    **{("rope" if n == "enabled" else n): leaf for n, leaf in leaves(RopeConfig).items()},
    **{name: _OF_RUN[name] for name in ("arch", "drop_path", *_OF_TRAINING)},
    **{f"finetune_{name}": _OF_RUN[name] for name in _OF_TRAINING},
}
"""What can be swept: name of the option -> its field."""


@dataclass(frozen=True)
class Point:
    """One configuration of a grid.

    Attributes:
        words: name -> value, as the user wrote them.
        options: field name -> value.
    """

    words: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def label(self) -> str:
        """For people: `rotate=2 same_theta=true`."""
        return " ".join(f"{name}={word}" for name, word in self.words) or "as given"

    @property
    def slug(self) -> str:
        """For a folder."""
        return re.sub(r"[^A-Za-z0-9._=-]+", "-", "-".join(self.label.split()))


@dataclass(frozen=True)
class Member:
    """One pipeline of a sweep."""

    point: Point
    seed: int
    pipeline: Pipeline


@dataclass(frozen=True)
class Sweep:
    """Pipelines to run one after the other.

    Attributes:
        folder: with a folder for each member.
        members: all seeds of the first point, then those of the next.
        notes: what the grid holds that changes nothing, one line each.
    """

    folder: str
    members: tuple[Member, ...]
    notes: tuple[str, ...]


def points(axes: Sequence[str]) -> list[Point]:
    """The grid of `NAME=V,V` words; one point without options where there are none.

    Raises:
        ConfigError: no such name, or a value that is none of its kind.
    """
    choices = [_axis(text) for text in axes]
    names = [axis[0][0] for axis in choices]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"--sweep {twice[0]} is given twice", f"as one: {twice[0]}=V,V,V")
    if "rope" in names and any(word == OFF for axis in choices for _, word, _ in axis):
        raise ConfigError(f"--sweep rope and --sweep rotate={OFF} say the same", "leave one out")
    return [
        Point(
            tuple((name, word) for name, word, _ in combination),
            tuple(option for _, _, option in combination),
        )
        for combination in itertools.product(*choices)
    ]


def _axis(text: str) -> list[tuple[str, str, tuple[str, Any]]]:
    name, equals, listed = text.partition("=")
    name = name.strip().removeprefix("--").replace("-", "_")
    words = [word.strip() for word in listed.split(",")]
    if not equals or not all(words):
        raise ConfigError(f"--sweep {text} is not NAME=V,V", "such as --sweep rotate=none,1,2,4")
    if name not in KINDS:
        raise ConfigError(
            f"--sweep {text}: {name} cannot be swept", f"these can: {', '.join(KINDS)}"
        )
    if len(set(words)) < len(words):
        raise ConfigError(f"--sweep {text} holds a value twice")
    return [(name, word, _value(text, name, word)) for word in words]


def _value(text: str, name: str, word: str) -> tuple[str, Any]:
    """Field and value of an option in words."""
    if name == "rotate" and word == OFF:
        return "enabled", False
    leaf = KINDS[name]
    try:
        value = {"true": True, "false": False}.get(word.lower(), word)
        value = leaf.read(value if leaf.hint is bool else word)
    except ConfigError as error:
        raise ConfigError(f"--sweep {text}: {word} must be {leaf.allowed()}") from error
    return ("enabled" if name == "rope" else name), value


def acting(rope: RopeConfig) -> RopeConfig:
    """The same RoPE with options that cannot act at their defaults: equal for equal networks."""
    if not rope.enabled:
        return RopeConfig(enabled=False)
    plain, names = RopeConfig(), {field.name for field in fields(rope)}
    return replace(rope, **{name: getattr(plain, name) for name, _ in rope.inert_options(names)})
