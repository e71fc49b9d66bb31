"""Translates lines of the original `run_all.sh` scripts to options of `run`."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any, NamedTuple

from spiralrope_cli.core.config.dit_runs import DiTRun
from spiralrope_cli.core.config.models import RopeConfig, arch_name, dit_size
from spiralrope_cli.core.config.option import Opt, leaves
from spiralrope_cli.core.config.pipelines import DeiTStages
from spiralrope_cli.core.errors import ConfigError

KEEP = "-"
"""Stands for the default of an argument."""


class Word(NamedTuple):
    """One positional argument of an original script."""

    name: str  # in the original documentation
    default: str  # there
    opt: Opt  # the option here

    @property
    def option(self) -> str:
        """Its name on the command line."""
        return self.opt.called


def _word(name: str, field: str, default: str, **more: Any) -> Word:
    opt = {**leaves(DeiTStages), **leaves(DiTRun)}[field]
    if opt.hint is bool:
        more["expects"] = "True or False"
    return Word(name, default, replace(opt, **more))


_FREQUENCIES = (
    _word("TRUNCATE_PERCENTAGE", "truncate_percentage", "0.0"),
    _word("MAX_FREQ_LANG", "max_freq_lang", "1.5"),
    _word("MIN_FREQ_LANG", "min_freq_lang", "0.0"),
    _word("SAME_THETA", "same_theta", "False"),
)
DEIT_SCRIPT = (
    _word("ROTATE", "rotate", "2"),
    *_FREQUENCIES,
    _word("NPROC_PER_NODE", "nproc", "4", ge=1, le=None),
    _word("EVAL_ONLY", "eval_only", "False"),
    _word("SKIP_TRAINING", "skip_training", "False"),
)
DIT_SCRIPT = (
    _word("USE_ROPE", "enabled", "True"),
    _word("ROTATE", "rotate", "0"),
    _word("THETA", "theta", "10000"),
    _word("FREQS_FOR", "freqs_for", "lang"),
    _word("MAX_FREQ", "max_freq", "10"),
    *_FREQUENCIES,
    _word("SEED", "seed", "0"),
    _word("MODEL", "arch", "DiT-B/4", read=lambda text: arch_name(dit_size(text))),
)
WORDS = {"deit": DEIT_SCRIPT, "dit": DIT_SCRIPT}


def translate(line: str, kind: str) -> tuple[str, list[str]]:
    """The command for a line of an original script, and notes for the user.

    Args:
        line: such as `4 - - - - 8`, with or without `bash run_all.sh`.
        kind: `deit` or `dit`.
    """
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        raise ConfigError(f"--from-legacy {line!r} is not a valid shell line: {error}") from error
    while words and (words[0] in ("bash", "sh") or words[0].endswith("run_all.sh")):
        words.pop(0)
    known = WORDS[kind]
    if len(words) > len(known):
        raise ConfigError(
            f"--from-legacy has {len(words)} words; the script took at most {len(known)}",
            " ".join(word.name for word in known),
        )
    options: list[str] = []
    values: dict[str, Any] = {}  # by field
    for place, (word, given) in enumerate(zip(known, words, strict=False), 1):
        if given != KEEP:
            values[word.opt.name] = value = _value(place, word, given)
            as_typed = value if word.opt.name == "arch" or isinstance(value, bool) else given
            options += filter(None, word.opt.typed(as_typed))
    rope = {name: values[name] for name in RopeConfig.__dataclass_fields__ if name in values}
    try:
        RopeConfig(**rope)
    except ConfigError as error:
        raise ConfigError(f"--from-legacy: {error.message}", error.hint) from error
    if "--eval-only" in options and "--skip-training" in options:
        options.remove("--skip-training")  # the script checked EVAL_ONLY first
    return shlex.join(["spiralrope", "run", kind, *options]), _notes(kind, values)


def _value(place: int, word: Word, given: str) -> Any:
    try:
        value = word.opt.convert(given)
        word.opt.check(value)
    except ConfigError as error:
        said = error.message.removeprefix(f"{word.option} ")
        raise ConfigError(
            f"--from-legacy: word {place}, {word.name}, {said}",
            error.hint or f"{KEEP} keeps the default, {word.default}",
        ) from error
    return value


def _notes(kind: str, values: dict[str, Any]) -> list[str]:
    notes = ["DATA_PATH of the script is --data here, or $SPIRALROPE_DATA; without both: digits"]
    rope = values.get("enabled", True)
    if "max_freq_lang" not in values and rope and values.get("freqs_for") != "pixel":
        notes.append(
            "MAX_FREQ_LANG is not given. Its documented default is 1.5, and this command uses it, "
            "but scripts passed 0.5 or 1.0. To repeat such a run, add --max-freq-lang with the "
            "value in its checkpoint"
        )
    if "arch" not in values and kind == "dit":
        notes.append("MODEL is not given: dit-b4, as here for image folders")
    if values.get("rotate", 2) in (0, 1) and rope:
        notes.append("ROTATE 0 and 1 are both plain axial RoPE (two directions)")
    return notes
