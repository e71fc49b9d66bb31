"""The grid of `run --sweep`: its axes as typed, and its points. Standard library only."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spiralrope_cli.core.config.dit_runs import DiTRun
from spiralrope_cli.core.config.models import RopeConfig
from spiralrope_cli.core.config.option import Opt, leaves, renamed_fields
from spiralrope_cli.core.config.pipelines import DeiTStages
from spiralrope_cli.core.config.runs import ClassifierRun
from spiralrope_cli.core.config.training import OptimConfig
from spiralrope_cli.core.errors import ConfigError

KINDS = {
    "none": ("enabled", False),
    "axial": ("rope_kind", "axial"),
    "mixed": ("rope_kind", "mixed"),
}
"""Words of the axes below that are no number of directions -> field and value."""
KIND_AXES = ("rotate", "rope_kind")
_OF_ROPE = {("rope" if n == "enabled" else n): opt for n, opt in leaves(RopeConfig).items()}
_OF_DEIT, _OF_DIT = leaves(ClassifierRun), leaves(DiTRun)
_OF_TRAINING = ("epochs", "max_steps", "lr", "warmup_epochs", "batch_size")
SWEPT: dict[str, dict[str, Opt]] = {
    "deit": {
        **_OF_ROPE,
        **{name: _OF_DEIT[name] for name in ("arch", "drop_path", *_OF_TRAINING)},
        **{f"finetune_{name}": _OF_DEIT[name] for name in _OF_TRAINING},
    },
    "dit": {**_OF_ROPE, **{name: _OF_DIT[name] for name in ("arch", *_OF_TRAINING)}},
}
"""Options that can be swept: pipeline -> name -> field."""
RENAMED = renamed_fields(OptimConfig) | renamed_fields(DeiTStages)
"""Old name -> name. Folders keep the old name, so that an earlier sweep resumes."""


@dataclass(frozen=True)
class Point:
    """One configuration of a grid: (name, value) of each option, as typed."""

    words: tuple[tuple[str, str], ...]
    kind: str  # of the pipeline: `deit` or `dit`

    def __str__(self) -> str:
        return " ".join(f"{name}={word}" for name, word in self.words) or "as given"

    @property
    def options(self) -> dict[str, Any]:
        """Field name -> value."""
        return dict(_option(self.kind, name, word) for name, word in self.words)

    @property
    def slug(self) -> str:
        """Name of the folder."""
        return re.sub(r"[^A-Za-z0-9._=-]+", "-", "-".join(str(self).split()))


def points(axes: Sequence[str], kind: str) -> list[Point]:
    """The grid of `NAME=V,V` words; without words a single point."""
    choices = [_axis(text, kind) for text in axes]
    names = [RENAMED.get(axis[0][0], axis[0][0]) for axis in choices]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"--sweep {twice[0]} is given twice", f"use one: {twice[0]}=V,V,V")
    for name, word in itertools.chain(*choices):
        same = "rope" if word == "none" else "rope_kind"
        if name in KIND_AXES and word in KINDS and name != same and same in names:
            raise ConfigError(
                f"--sweep {same} and --sweep {name}={word} mean the same", "leave one of them out"
            )
    return [Point(words, kind) for words in itertools.product(*choices)]


def _axis(text: str, kind: str) -> list[tuple[str, str]]:
    """(name, word) of each value of `NAME=V,V`."""
    name, equals, listed = text.partition("=")
    name = name.strip().removeprefix("--").replace("-", "_")
    words = [word.strip() for word in listed.split(",")]
    if not equals or not all(words):
        raise ConfigError(
            f"--sweep {text} is not NAME=V,V", "such as --sweep rotate=none,axial,2,4"
        )
    known = SWEPT[kind]
    if RENAMED.get(name, name) not in known:
        raise ConfigError(
            f"--sweep {text}: {name} cannot be swept", f"these can: {', '.join(known)}"
        )
    if len(set(words)) < len(words):
        raise ConfigError(f"--sweep {text} has a value twice")
    for word in words:
        try:
            _option(kind, name, word)
        except ConfigError as error:
            allowed = known[RENAMED.get(name, name)].readable()
            raise ConfigError(f"--sweep {text}: {word} must be {allowed}") from error
    return [(name, word) for word in words]


def _option(kind: str, name: str, word: str) -> tuple[str, Any]:
    """Field and value of a typed option."""
    name = RENAMED.get(name, name)
    if name in KIND_AXES and word in KINDS:
        return KINDS[word]
    return ("enabled" if name == "rope" else name), SWEPT[kind][name].convert(word)
