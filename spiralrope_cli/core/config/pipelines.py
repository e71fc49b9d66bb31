"""Options of `run deit` and `run dit`, besides those of training; lines of the original scripts.

Standard library only.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from spiralrope_cli.core.config.dit_runs import DiTRun
from spiralrope_cli.core.config.fid import INCEPTION, REFERENCE
from spiralrope_cli.core.config.models import RopeConfig, arch_name, dit_size, numbers
from spiralrope_cli.core.config.option import PATH, Opt, check_fields, leaves, option
from spiralrope_cli.core.config.samples import (
    NUM_SAMPLES,
    GuidanceConfig,
    SamplerName,
    SampleRun,
    check_chain,
)
from spiralrope_cli.core.config.training import MachineConfig, OptimConfig
from spiralrope_cli.core.errors import ConfigError

MACHINE_FIELDS = frozenset(MachineConfig.__dataclass_fields__)
OF_BOTH_TRAININGS = MACHINE_FIELDS | {
    *("data", "seed", "micro_batch_size"),
    *("log_every", "validate_every", "save_every", "keep_last"),
}
"""Options for both pretraining and finetuning. Other options of finetuning begin with `finetune_`,
or come from the weights."""
OF_PRETRAINING = OptimConfig.__dataclass_fields__.keys() | {"drop_path"}
"""Options with other values in finetuning."""


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Options of both pipelines."""

    dry_run: bool = option("Print the plans of all stages and stop.", "Stages", default=False)
    from_legacy: str | None = option(
        "Print the command for the arguments of an original run_all.sh line, and stop.",
        "Stages",
        metavar="WORDS",
        may_be_empty=True,
        default=None,
    )
    sweep: tuple[str, ...] = option(
        "One pipeline per value: rotate=none,axial,2, lr=1e-3,2e-3; repeatable, for a grid.",
        "Stages",
        metavar="NAME=V,V",
        many=True,
        default=(),
    )
    seeds: tuple[int, ...] = option(
        "Repeat each configuration with these seeds (weights, data order, augmentation, noise).",
        "Stages",
        metavar="N,N",
        read=numbers,
        expects="a list of numbers, such as 0,1,2",
        default=(),
    )
    out: str = option(
        "Folder of all stages; by default runs/run-...-ARCH-DATA-rROTATE[-NAME].",
        "Run",
        **PATH,
        default="",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"--seeds {','.join(map(str, self.seeds))} has a number twice")


@dataclass(frozen=True, kw_only=True)
class DeiTStages(Stages):
    """Options of `run deit`, besides those of pretraining."""

    eval_only: bool = option("Only evaluate; no training.", "Stages", default=False)
    skip_training: bool = option("Finetune the saved pretraining run.", "Stages", default=False)
    with_finetune: bool = option(
        "Finetune after pretraining; else evaluate the pretrained model.",
        "Stages",
        flag="--finetune/--no-finetune",
        default=True,
    )
    finetune_epochs: int | None = option(
        "Number of epochs of finetuning.", "Run", ge=1, default=None
    )
    finetune_max_steps: int | None = option(
        "Number of steps of finetuning, in place of epochs.",
        "Run",
        ge=0,
        was="--finetune-steps",
        default=None,
    )
    finetune_lr: float | None = option("Learning rate of finetuning.", "Recipe", ge=0, default=None)
    finetune_warmup_epochs: int | None = option(
        "Warm-up epochs of finetuning.", "Recipe", ge=0, default=None
    )
    finetune_batch_size: int | None = option("Batch size of finetuning.", "Run", ge=1, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_only and self.skip_training:
            raise ConfigError(
                "--eval-only and --skip-training exclude each other",
                "--eval-only evaluates the existing run, --skip-training finetunes it first",
            )
        if self.skip_training and not self.with_finetune:
            raise ConfigError(
                "--skip-training and --no-finetune leave nothing to train",
                "use --eval-only --no-finetune",
            )
        for name, value in vars(self).items():
            if name.startswith("finetune_") and value is not None and not self.with_finetune:
                raise ConfigError(
                    f"{leaves(DeiTStages)[name].called} has no effect with --no-finetune",
                    "leave one of them out",
                )


@dataclass(frozen=True, kw_only=True)
class DiTStages(Stages):
    """Options of `run dit`, besides those of training."""

    panel = "Samples and metrics"
    num_samples: int | None = option(NUM_SAMPLES, panel, default=None)
    sampler: SamplerName = option("Sampler.", default=SampleRun.sampler)
    num_sampling_steps: str = option(
        "Number of sampling steps, or ddim25.",
        was="--sampling-steps",
        metavar="N|N,...|ddimN",
        default=SampleRun.num_sampling_steps,
    )
    cfg_scale: float = option(
        "Guidance scale; 1: no guidance.", ge=1, default=GuidanceConfig.cfg_scale
    )
    sampling_seed: int = option("Seed of sampling.", ge=0, default=SampleRun.seed)
    reference: str = option(REFERENCE, default="")
    weights: str = option(INCEPTION, default="")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_chain(self.sampler, self.num_sampling_steps)


def options_of_fid(given: dict[str, Any]) -> dict[str, Any]:
    """Reference and Inception weights of `run dit`, as options of its training with FIDs."""
    if not (every := given.get("fid_every")):
        return {}
    if not given.get("reference"):
        raise ConfigError(f"--fid-every {every} needs --reference")
    return {"fid_reference": given["reference"], "fid_weights": given.get("weights", "")}


# --- Lines of the original `run_all.sh` scripts as options of `run`

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
SCRIPTS = {"deit": DEIT_SCRIPT, "dit": DIT_SCRIPT}


def translate(line: str, kind: str) -> tuple[str, list[str]]:
    """The command for a line as `bash run_all.sh 4 - - - - 8`, and notes; kind is deit or dit."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        raise ConfigError(f"--from-legacy {line!r} is not a valid shell line: {error}") from error
    while words and (words[0] in ("bash", "sh") or words[0].endswith("run_all.sh")):
        words.pop(0)
    known = SCRIPTS[kind]
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
