"""Translates lines of the original `run_all.sh` scripts to options of `run`."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spiralrope_cli.core.config.models import RopeConfig, arch_name, dit_size
from spiralrope_cli.core.config.option import leaves
from spiralrope_cli.core.errors import ConfigError

FREQS_FOR = leaves(RopeConfig)["freqs_for"].choices
KEEP = "-"
"""Stands for the default of an argument."""


@dataclass(frozen=True)
class Word:
    """One positional argument of an original script."""

    name: str  # in the original documentation
    option: str  # the option here
    read: Callable[[str], Any]  # text -> value, or raises ValueError
    allowed: str  # allowed values, in words
    default: str  # in the original documentation
    off: str = ""  # the option that turns a flag off, if there is one


def _truth(word: str) -> bool:
    return {"true": True, "false": False}[word.lower()]


def _whole(lowest: int) -> Callable[[str], int]:
    def read(word: str) -> int:
        if (value := int(word)) < lowest:
            raise ValueError
        return value

    return read


def _series(word: str) -> str:
    return FREQS_FOR[FREQS_FOR.index(word)]


NUMBER, WHOLE, TRUTH = "a number", "a whole number", "True or False"
_ROTATE = ("ROTATE", "--rotate", int, WHOLE)
_FREQUENCIES = (
    Word("TRUNCATE_PERCENTAGE", "--truncate-percentage", float, NUMBER, "0.0"),
    Word("MAX_FREQ_LANG", "--max-freq-lang", float, NUMBER, "1.5"),
    Word("MIN_FREQ_LANG", "--min-freq-lang", float, NUMBER, "0.0"),
    Word("SAME_THETA", "--same-theta", _truth, TRUTH, "False", "--no-same-theta"),
)
DEIT_SCRIPT = (
    Word(*_ROTATE, "2"),
    *_FREQUENCIES,
    Word("NPROC_PER_NODE", "--nproc", _whole(1), f"{WHOLE}, 1 or more", "4"),
    Word("EVAL_ONLY", "--eval-only", _truth, TRUTH, "False"),
    Word("SKIP_TRAINING", "--skip-training", _truth, TRUTH, "False"),
)
DIT_SCRIPT = (
    Word("USE_ROPE", "--rope", _truth, TRUTH, "True", "--no-rope"),
    Word(*_ROTATE, "0"),
    Word("THETA", "--theta", float, NUMBER, "10000"),
    Word("FREQS_FOR", "--freqs-for", _series, " or ".join(FREQS_FOR), "lang"),
    Word("MAX_FREQ", "--max-freq", float, NUMBER, "10"),
    *_FREQUENCIES,
    Word("SEED", "--seed", _whole(0), f"{WHOLE}, 0 or more", "0"),
    Word("MODEL", "--arch", lambda word: arch_name(dit_size(word)), "a DiT, as DiT-B/4", "DiT-B/4"),
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
    values = {
        word.name: (given, _value(place, word, given))
        for place, (word, given) in enumerate(zip(known, words, strict=False), 1)
        if given != KEEP
    }
    fields = {_field(word): values[word.name][1] for word in known if word.name in values}
    fields.pop("", None)
    try:
        RopeConfig(**fields)
    except ConfigError as error:
        raise ConfigError(f"--from-legacy: {error.message}", error.hint) from error
    options = [part for word in known if word.name in values for part in _option(word, values)]
    if "--eval-only" in options and "--skip-training" in options:
        options.remove("--skip-training")  # the script checked EVAL_ONLY first
    command = shlex.join(["spiralrope", "run", kind, *options])
    return command, _notes(kind, values)


def _value(place: int, word: Word, given: str) -> Any:
    where = f"--from-legacy: word {place}, {word.name},"
    try:
        value = word.read(given)
    except ConfigError as error:
        raise ConfigError(f"{where} is {given}: {error.message}", error.hint) from error
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"{where} is {given}; it must be {word.allowed}",
            f"{KEEP} keeps the default, {word.default}",
        ) from error
    if (field := _field(word)) and field != "min_freq_lang":
        try:
            RopeConfig(**{field: value})
        except ConfigError as error:
            raise ConfigError(f"{where} is not possible: {error.message}", error.hint) from error
    return value


def _field(word: Word) -> str:
    """The field of `RopeConfig`; empty for other words."""
    field = word.option.removeprefix("--").replace("-", "_")
    return field if field in RopeConfig.__dataclass_fields__ else ""


def _option(word: Word, values: dict[str, tuple[str, Any]]) -> list[str]:
    given, value = values[word.name]
    if isinstance(value, bool):
        flag = word.option if value else word.off
        return [flag] if flag else []
    return [word.option, value if word.option == "--arch" else given]


def _notes(kind: str, values: dict[str, tuple[str, Any]]) -> list[str]:
    notes = ["DATA_PATH of the script is --data here, or $SPIRALROPE_DATA; without both: digits"]
    no_rope = values.get("USE_ROPE", ("", True))[1] is False
    pixel = values.get("FREQS_FOR", ("", "lang"))[1] == "pixel"
    if "MAX_FREQ_LANG" not in values and not no_rope and not pixel:
        notes.append(
            "MAX_FREQ_LANG is not given. Its documented default is 1.5, and this command uses it, "
            "but scripts passed 0.5 or 1.0. To repeat such a run, add --max-freq-lang with the "
            "value in its checkpoint"
        )
    if "MODEL" not in values and kind == "dit":
        notes.append("MODEL is not given: dit-b4, as here for image folders")
    if values.get("ROTATE", ("", 2))[1] in (0, 1) and not no_rope:
        notes.append("ROTATE 0 and 1 are both plain axial RoPE (two directions)")
    return notes
