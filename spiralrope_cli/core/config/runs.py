"""What a run is: frozen, checked, and written to `config.yaml`. Standard library only.

Every field name is unique over all groups, and the command line option is that name with dashes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from spiralrope_cli.core.config.datasets import DataSet
from spiralrope_cli.core.config.models import (
    SIZE,
    RopeConfig,
    check_divides,
    deit_size,
    format_size,
)
from spiralrope_cli.core.config.option import (
    DATA,
    MODEL,
    PATH,
    RUN,
    SOURCE,
    Opt,
    check_fields,
    leaves,
)
from spiralrope_cli.core.config.training import MachineConfig, OptimConfig
from spiralrope_cli.core.errors import ConfigError

MIX_GROUP = 8
"""Images that share one mixup or cutmix draw; fixed, so that it is the same for any split."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The classifier's sizes beyond its architecture; pixels and counts."""

    image_size: Annotated[
        tuple[int, int], Opt("Side, or height x width, in pixels.", MODEL, **SIZE)
    ]
    patch_size: Annotated[int, Opt("Side of a patch in pixels.", MODEL)]
    in_chans: int
    num_classes: Annotated[int, "the number of classes"]
    drop_path: Annotated[float, Opt("Stochastic depth rate in [0, 1).", MODEL, ge=0, lt=1)]
    pretrain_grid: tuple[int, int] | None = None  # patches that positions refer to, if not its own

    def __post_init__(self) -> None:
        check_fields(self)
        check_divides(self.image_size, self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches as (rows, columns)."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """From a decoded image to what the network sees, in training and in evaluation."""

    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]
    crop_ratio: Annotated[
        float,
        Opt("Validation resizes to image size / this, then crops the centre.", DATA, gt=0, le=1),
    ]
    geometry: Annotated[
        Literal["crop", "shift"], Opt("Random resized crop, or small shifts and rotations.", DATA)
    ]
    crop_scale: Annotated[
        float, Opt("Smallest fraction of the area that crop keeps.", DATA, gt=0, le=1)
    ]
    hflip: Annotated[float, Opt("Probability of a horizontal flip.", DATA, ge=0, le=1)]
    translate: Annotated[
        float,
        Opt("Largest shift in pixels (geometry shift).", DATA, ge=0, was="--max-shift"),
    ]
    degrees: Annotated[
        float,
        Opt("Largest rotation in degrees (geometry shift).", DATA, ge=0, was="--max-rotation"),
    ]
    auto_augment: Annotated[
        str,
        Opt(
            "timm's name: 3a (3-Augment), rand-m9-mstd0.5-inc1 (RandAugment), ...; or none.",
            DATA,
            metavar="NAME",
            pattern=r"none|3a|(rand|augmix|original|originalr|v0|v0r)(-.+)?",
            expects="none, 3a, rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, original or v0, as timm "
            "names them",
        ),
    ]
    color_jitter: Annotated[float, Opt("Strength of color jitter; 0: none.", DATA, ge=0)]
    random_erasing: Annotated[float, Opt("Probability of erasing; 0: none.", DATA, ge=0, le=1)]
    repeated_aug: Annotated[int, Opt("Augmented copies per image; 1: off.", DATA, ge=1)]
    mixup: Annotated[float, Opt("Mixup alpha; 0: none.", DATA, ge=0)]
    cutmix: Annotated[float, Opt("CutMix alpha; 0: none.", DATA, ge=0)]
    mixup_switch_prob: float  # probability of cutmix where both are on
    smoothing: Annotated[float, Opt("Label smoothing in [0, 1).", DATA, ge=0, lt=1)]

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.mixup_switch_prob <= 1:
            raise ConfigError(
                f"mixup_switch_prob is {self.mixup_switch_prob}; it must be in [0, 1]"
            )

    def check_data(self, data_set: DataSet) -> None:
        """Refuses augmentation that the kind of data set cannot have.

        Raises:
            ConfigError: names the option and what there is in its place.
        """
        if data_set.kind == "folder" and self.geometry == "shift":
            raise ConfigError(
                "--geometry shift is for the built-in sets", "use --geometry crop for image folders"
            )
        for name, off in (("auto_augment", "none"), ("color_jitter", 0)):
            if data_set.kind == "memory" and (value := getattr(self, name)) != off:
                raise ConfigError(
                    f"{leaves(AugmentConfig)[name].called} {value} works on photographs, "
                    f"not on the grey images of {data_set.data}",
                    "use --translate, --degrees, --random-erasing, --mixup or --cutmix",
                )

    @property
    def mixes(self) -> bool:
        """Whether labels are mixed."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True, kw_only=True)
class EvalProtocol:
    """Which images are looked at, and how they reach the network."""

    data: str  # a built-in name or a folder
    num_val: int
    image_size: tuple[int, int]  # (height, width) in pixels
    in_chans: int
    crop_ratio: float  # resized to image size / this, then cropped at the centre
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == self.in_chans:
            raise ConfigError(
                f"--data {self.data} has {len(self.mean)} channel(s), the weights take "
                f"{self.in_chans}"
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run reports, validates and saves."""

    # Log points are the only moments that wait for the device.
    log_every: Annotated[int, Opt("Steps between log points.", RUN, ge=1, free=True)]
    validate_every: Annotated[int, Opt("Epochs between validations.", RUN, ge=1, free=True)]
    save_every: Annotated[int, Opt("Epochs between checkpoints.", RUN, ge=1, free=True)]
    keep_last: Annotated[int, Opt("Newest checkpoints kept beside the best.", RUN, ge=1, free=True)]
    keep_every: Annotated[
        int, Opt("Keep checkpoints at multiples of this; 0: none.", RUN, ge=0, free=True)
    ]

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class ClassifierRun:
    """A training run of a classifier, complete."""

    command: str
    arch: Annotated[
        str,
        Opt(
            "deit-ti, deit-s, deit-b, deit-l, or by numbers: deit-WIDTHxDEPTHxHEADS.",
            MODEL,
            metavar="NAME",
            complete="deit_archs",
        ),
    ]
    data: Annotated[
        str,
        Opt(
            "digits, fashion-mnist, or a folder with train/ and val/ of class folders. "
            "Without it: $SPIRALROPE_DATA, else the bundled digits.",
            DATA,
            metavar="NAME|FOLDER",
            complete="data_sets",
        ),
    ]
    out: Annotated[
        str,
        Opt(
            "Run folder; by default runs/COMMAND-ARCH-DATA-rROTATE[-NAME].", RUN, **PATH, free=True
        ),
    ]
    seed: Annotated[int, Opt("Seed of weights, data order and augmentation.", RUN, ge=0)]
    num_train: Annotated[int, "the number of training images"]
    num_val: Annotated[int, "the number of validation images"]
    source: Annotated[str, SOURCE] = ""
    rope: RopeConfig
    model: ModelConfig
    augment: AugmentConfig
    optim: OptimConfig
    checkpoint: CheckpointConfig
    machine: MachineConfig = field(default_factory=MachineConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        self.rope.check_head_dim(deit_size(self.arch).head_dim)
        if not len(self.augment.mean) == len(self.augment.std) == self.model.in_chans:
            raise ConfigError(
                f"mean {self.augment.mean} and std {self.augment.std} need one value for each of "
                f"in_chans {self.model.in_chans}"
            )
        self.optim.check_length(self.num_train, self.data)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches as (rows, columns)."""
        return self.model.grid

    @property
    def vae_in_loop(self) -> str:
        """A classifier sees pixels."""
        return ""

    def inert_options(self) -> list[tuple[str, str]]:
        """Fields of a classifier that cannot act in this run, each with the reason."""
        augment, inert = self.augment, []
        if augment.geometry == "crop":
            inert += [(name, "--geometry is crop") for name in ("translate", "degrees")]
        else:
            inert += [("crop_scale", "--geometry is shift")]
        if augment.auto_augment not in ("none", "3a") and augment.color_jitter:
            inert += [("color_jitter", f"timm leaves it out beside {augment.auto_augment}")]
        return inert

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; what is left of a shuffled epoch is dropped."""
        return self.optim.steps_per_epoch(self.num_train)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.optim.total_steps(self.num_train)

    def split_batch(self, world_size: int) -> tuple[int, int]:
        """How a step is shared out.

        Returns:
            images at a time per process, and how many times before the optimizer steps.

        Raises:
            ConfigError: the total batch cannot be met exactly; the nearest that can are named.
        """
        micro, accumulation = self.optim.split_batch(world_size, self.num_train)
        if self.augment.mixes and micro % MIX_GROUP:
            raise ConfigError(
                f"{micro} images at a time per process do not hold whole mixing groups of "
                f"{MIX_GROUP}",
                f"use a multiple of {MIX_GROUP}, or --mixup 0 --cutmix 0",
            )
        return micro, accumulation

    keeps_best = True
    """Whether the checkpoint of the best validation stays beside the newest."""
    num_conditions = 0
    """Numbers per image that the network takes beside it."""
    positions = "learned absolute"
    """The kind of positions beside RoPE."""
    unit = "px"
    """Of the sides of the network's input."""

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return deit_size(self.arch).head_dim

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.model.image_size

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the network's input."""
        return self.model.in_chans, *self.model.image_size

    @property
    def data_line(self) -> str:
        """What it learns from, in words."""
        return (
            f"{self.data}: {self.num_train} training and {self.num_val} validation images, "
            f"{self.model.num_classes} classes"
        )

    def misfits(self, before: dict[str, Any]) -> list[str]:
        """What of weights with other sizes does not fit this run, in words.

        Args:
            before: name -> value, sizes of the weights that it starts from.
        """
        messages = []
        if before["num_classes"] != self.model.num_classes:
            messages.append(
                f"head re-initialised: {before['num_classes']} -> {self.model.num_classes} classes"
            )
        if before["image_size"] != self.model.image_size:
            was, now = map(format_size, (before["image_size"], self.model.image_size))
            messages.append(f"position embedding resampled: {was} -> {now} px")
        return messages

    @property
    def save_steps(self) -> int:
        """Optimizer steps between checkpoints."""
        return self.checkpoint.save_every * self.steps_per_epoch
