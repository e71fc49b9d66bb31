"""What a whole pipeline is: its options, its stages, and what a grid of them is.

Standard library only.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

from spiralrope_cli.core.config.option import (
    PATH,
    RECIPE,
    RUN,
    SAMPLES,
    STAGES,
    Leaf,
    Opt,
    check_fields,
    leaves,
    numbers,
)
from spiralrope_cli.core.config.rope import RopeConfig
from spiralrope_cli.core.config.runs import ClassifierRun
from spiralrope_cli.core.config.samples import GuidanceConfig, Sampler, SampleRun
from spiralrope_cli.core.config.training import MachineConfig, OptimConfig, TrainOptions
from spiralrope_cli.core.errors import CheckpointError, ConfigError

PRETRAIN, FINETUNE, EVALUATE = "pretrain", "finetune", "eval"
TRAIN, SAMPLE = "dit-train", "dit-sample"
MACHINE_FIELDS = frozenset(MachineConfig.__dataclass_fields__)
OF_BOTH_TRAININGS = MACHINE_FIELDS | {
    *("data", "seed", "micro_batch_size"),
    *("log_every", "validate_every", "save_every", "keep_last"),
}
"""Options that hold for pretraining and for finetuning; of the others, those of finetuning begin
with `finetune_`, or come with the weights."""
OF_PRETRAINING = OptimConfig.__dataclass_fields__.keys() | {"drop_path"}
"""Those that finetuning has values of its own for."""

FROM_LEGACY = Opt(
    "Print the command for the words of an old run_all.sh line, and stop.", STAGES, metavar="WORDS"
)
DRY_RUN = Opt("Print the plans of all stages and stop.", STAGES)
FOLDER = Opt("Folder of all stages; by default runs/run-...-ARCH-DATA-rROTATE[-NAME].", RUN, **PATH)


@dataclass(frozen=True, kw_only=True)
class DeiTStages:
    """What `run deit` takes beside the options of its pretraining."""

    eval_only: Annotated[bool, Opt("Measure what is there, train nothing.", STAGES)] = False
    skip_training: Annotated[bool, Opt("Finetune and measure what was pretrained.", STAGES)] = False
    with_finetune: Annotated[
        bool,
        Opt(
            "With the second training, or measure the first one.",
            STAGES,
            flag="--finetune/--no-finetune",
        ),
    ] = True
    dry_run: Annotated[bool, DRY_RUN] = False
    from_legacy: Annotated[str | None, FROM_LEGACY] = None
    sweep: Annotated[
        tuple[str, ...],
        Opt(
            "rotate=none,0,2, lr=1e-3,2e-3, ...: one pipeline for each value; repeated, the grid.",
            STAGES,
            metavar="NAME=V,V",
            many=True,
        ),
    ] = ()
    seeds: Annotated[
        tuple[int, ...],
        Opt(
            "0,1,2: each configuration with each of these, the data order included.",
            STAGES,
            metavar="N,N",
            read=numbers,
            expects="a list of numbers, such as 0,1,2",
        ),
    ] = ()
    finetune_epochs: Annotated[int | None, Opt("Length of finetuning.", RUN, ge=1)] = None
    finetune_steps: Annotated[
        int | None, Opt("Finetuning in steps, in place of epochs.", RECIPE, ge=0)
    ] = None
    finetune_lr: Annotated[float | None, Opt("Base learning rate of finetuning.", RECIPE, ge=0)] = (
        None
    )
    finetune_warmup_epochs: Annotated[int | None, Opt("Warm-up of finetuning.", RECIPE, ge=0)] = (
        None
    )
    finetune_batch_size: Annotated[int | None, Opt("Images per step of finetuning.", RUN, ge=1)] = (
        None
    )
    out: Annotated[str, FOLDER] = ""

    def __post_init__(self) -> None:
        check_fields(self)
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"--seeds {','.join(map(str, self.seeds))} holds a number twice")
        if self.eval_only and self.skip_training:
            raise ConfigError(
                "--eval-only and --skip-training exclude each other",
                "--eval-only measures what is there, --skip-training finetunes it first",
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

    @property
    def pretrains(self) -> bool:
        """Whether the first training is wanted now."""
        return not (self.eval_only or self.skip_training)

    @property
    def finetunes(self) -> bool:
        """Whether the second training is wanted now."""
        return self.with_finetune and not self.eval_only


@dataclass(frozen=True, kw_only=True)
class DiTStages:
    """What `run dit` takes beside the options of its training."""

    dry_run: Annotated[bool, DRY_RUN] = False
    from_legacy: Annotated[str | None, FROM_LEGACY] = None
    num: Annotated[
        int | None, Opt("Images to draw; 50000, or 200 for a built-in set.", SAMPLES, ge=1)
    ] = None
    sampler: Annotated[Sampler, Opt("As dit-sample --sampler.", SAMPLES)] = SampleRun.sampler
    sampling_steps: Annotated[str, Opt("250, or ddim25, ..., as dit-sample --steps.", SAMPLES)] = (
        SampleRun.steps
    )
    cfg_scale: Annotated[float, Opt("Guidance; 1 is none.", SAMPLES, ge=1)] = (
        GuidanceConfig.cfg_scale
    )
    sampling_seed: Annotated[int, Opt("Of the samples, whatever --seed is.", SAMPLES, ge=0)] = (
        SampleRun.seed
    )
    reference: Annotated[
        str,
        Opt(
            "Real images or their statistics, a folder or an .npz: measure FID against them.",
            SAMPLES,
            metavar="FILE",
        ),
    ] = ""
    weights: Annotated[str, Opt("Inception's, if not those fetched.", SAMPLES, metavar="FILE")] = ""
    out: Annotated[str, FOLDER] = ""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Stage:
    """One part of a pipeline.

    Attributes:
        name: for the heading and the record.
        folder: where its results go.
        config: what its job takes.
        job: called as job(stage, dry_run=, show=), skips what is done, and returns whether it
            was; `show` lets eval print what was measured before.
        line: what it will do, as far as that is known before the stage ahead of it is done.
    """

    name: str
    folder: str
    config: Any
    job: Callable[..., bool]
    line: str = ""


@dataclass(frozen=True)
class Pipeline:
    """Stages in order.

    Attributes:
        command: of them all.
        folder: with a folder for each of them.
        stages: settled.
        note: what is left out, and why.
    """

    command: str
    folder: str
    stages: tuple[Stage, ...]
    note: str = ""


def of_training(given: dict[str, Any], own: type) -> dict[str, Any]:
    """The given options without those of the pipeline itself."""
    not_here = leaves(own).keys() | leaves(TrainOptions)
    return {name: value for name, value in given.items() if name not in not_here}


def of_finetuning(given: dict[str, Any]) -> dict[str, Any]:
    """The given options of finetuning, by the names that it has for them."""
    ahead = "finetune_"
    return {n.removeprefix(ahead): value for n, value in given.items() if n.startswith(ahead)}


@contextlib.contextmanager
def refusals_of(stage: str) -> Iterator[None]:
    """Puts a stage's name before what it refuses, and calls its options as `run` does."""
    try:
        yield
    except (ConfigError, CheckpointError) as error:
        if stage not in CALLED_HERE:
            raise
        message, hint = (
            re.sub(r"--[\w-]+", lambda word: CALLED_HERE[stage].get(word[0], word[0]), text)
            for text in (error.message, error.hint)
        )
        raise type(error)(f"{stage}: {message}", hint) from error


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
CALLED_HERE = {
    FINETUNE: {_OF_RUN[n].called: leaves(DeiTStages)[f"finetune_{n}"].called for n in _OF_TRAINING},
    SAMPLE: {"--steps": "--sampling-steps"},
}
"""Stage -> its options that have another name in `run`."""


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
        return ("enabled" if name == "rope" else name), leaf.read(word)
    except ConfigError as error:
        raise ConfigError(f"--sweep {text}: {word} must be {leaf.readable()}") from error


def acting(rope: RopeConfig) -> RopeConfig:
    """The same RoPE with options that cannot act at their defaults: equal for equal networks."""
    if not rope.enabled:
        return RopeConfig(enabled=False)
    plain, names = RopeConfig(), {field.name for field in fields(rope)}
    return replace(rope, **{name: getattr(plain, name) for name, _ in rope.inert_options(names)})
