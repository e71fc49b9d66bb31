"""Config of a classifier's training run, frozen and checked. Standard library only.

Field names are unique over all groups; the option is the name with dashes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from spiralrope_cli.core.config.datasets import DATA_NAMES, DATA_SETS, DataSet, class_difference
from spiralrope_cli.core.config.models import DEIT_SIZES, SIZE, RopeConfig, format_size, size_of
from spiralrope_cli.core.config.option import PATH, SOURCE, Opt, check_fields, leaves, option
from spiralrope_cli.core.config.training import MachineConfig, OptimConfig
from spiralrope_cli.core.errors import ConfigError

MIX_GROUP = 8
"""Images that share one mixup or cutmix draw; fixed, so that it is the same for any split."""

RUN_FOLDER = Opt(
    "Run folder; by default COMMAND-ARCH-DATA-rROTATE[-NAME] in runs/.", "Run", **PATH, free=True
)
EMA = Opt("Start from the EMA or the raw weights.", "Model", flag="--ema/--no-ema")


def check_divides(image_size: tuple[int, int], patch_size: int) -> None:
    """Raises if a side of the image is not a positive multiple of the patch size."""
    for side in image_size:
        if patch_size < 1 or side < patch_size or side % patch_size:
            near = max(1, round(side / patch_size)) * patch_size if patch_size >= 1 else 0
            raise ConfigError(
                f"--image-size {side} is not a multiple of the patch size, {patch_size}",
                f"the nearest multiple: {near}" if near else "--patch-size must be 1 or more",
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of a classifier, besides those of its architecture."""

    image_size: tuple[int, int] = option("Side, or height x width, in pixels.", "Model", **SIZE)
    patch_size: int = option("Side of a patch in pixels.", "Model")
    in_chans: int
    num_classes: int = option(called="the number of classes")
    drop_path: float = option("Stochastic depth rate in [0, 1).", "Model", ge=0, lt=1)
    pretrain_grid: tuple[int, int] | None = None  # patch grid of pretraining, if not its own

    def __post_init__(self) -> None:
        check_fields(self)
        check_divides(self.image_size, self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches as (rows, columns)."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Preprocessing and augmentation of images."""

    panel = "Data and augmentation"
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]
    crop_ratio: float = option(
        "Validation: resize to image size / this, then centre crop.", gt=0, le=1
    )
    geometry: Literal["crop", "shift"] = option(
        "Random resized crop (crop), or small shifts and rotations (shift)."
    )
    crop_scale: float = option("Smallest area of a random crop, as a fraction.", gt=0, le=1)
    hflip: float = option("Probability of a horizontal flip.", ge=0, le=1)
    translate: float = option(
        "Largest shift in pixels, for --geometry shift.", ge=0, was="--max-shift"
    )
    degrees: float = option(
        "Largest rotation in degrees, for --geometry shift.", ge=0, was="--max-rotation"
    )
    auto_augment: str = option(
        "Policy of timm: 3a (3-Augment), rand-m9-mstd0.5-inc1 (RandAugment), ...; or none.",
        metavar="NAME",
        pattern=r"none|3a|(rand|augmix|original|originalr|v0|v0r)(-.+)?",
        expects="none, 3a, rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, original or v0, as timm "
        "names them",
    )
    color_jitter: float = option("Strength of color jitter; 0: none.", ge=0)
    augment_on: Literal["auto", "cpu", "device"] = option(
        "Where flip, 3-Augment and color jitter run: in the loader workers, or in batches on "
        "the device. auto: on a GPU where --auto-augment is 3a or none.",
        free=True,
        default="auto",
    )
    random_erasing: float = option("Probability of random erasing; 0: none.", ge=0, le=1)
    repeated_aug: int = option("Augmented copies per image; 1: off.", ge=1)
    mixup: float = option("Mixup alpha; 0: none.", ge=0)
    cutmix: float = option("CutMix alpha; 0: none.", ge=0)
    mixup_switch_prob: float  # probability of cutmix where both are on
    smoothing: float = option("Label smoothing in [0, 1).", ge=0, lt=1)

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.mixup_switch_prob <= 1:
            raise ConfigError(
                f"mixup_switch_prob is {self.mixup_switch_prob}; it must be in [0, 1]"
            )
        if self.augment_on == "device" and not self.runs_in_batches:
            raise ConfigError(
                f"--augment-on device: --auto-augment {self.auto_augment} runs on the CPU only",
                "use --augment-on auto, or --auto-augment 3a or none",
            )

    def check_data(self, data_set: DataSet) -> None:
        """Raises if an augmentation does not work with this kind of data set."""
        if data_set.kind == "folder" and self.geometry == "shift":
            raise ConfigError(
                "--geometry shift works with the built-in data sets only",
                "use --geometry crop for image folders",
            )
        for name, off in (("auto_augment", "none"), ("color_jitter", 0)):
            if data_set.kind == "memory" and (value := getattr(self, name)) != off:
                raise ConfigError(
                    f"{leaves(AugmentConfig)[name].called} {value} works on photographs, "
                    f"not on the grey images of {data_set.data}",
                    "use --translate, --degrees, --random-erasing, --mixup or --cutmix",
                )

    @property
    def runs_in_batches(self) -> bool:
        """Whether all that follows the crop can run in batches on a device."""
        return self.auto_augment in ("none", "3a")

    @property
    def mixes(self) -> bool:
        """Whether labels are mixed."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run logs, validates and saves."""

    panel = "Run"
    free = True
    # The loop waits for the device at log points only.
    log_every: int = option("Steps between log points.", ge=1)
    validate_every: int = option("Epochs between validations.", ge=1)
    save_every: int = option("Epochs between checkpoints.", ge=1)
    keep_last: int = option("Keep this number of newest checkpoints, and the best.", ge=1)
    keep_every: int = option("Also keep checkpoints at multiples of this step; 0: none.", ge=0)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What the configs of both kinds of training runs have."""

    command: str
    arch: str
    data: str
    out: str = option(RUN_FOLDER)
    seed: int
    num_train: int = option(called="the number of training images")
    source: str = ""
    ema: bool = option(EMA, default=True)
    rope: RopeConfig
    model: Any
    optim: OptimConfig
    checkpoint: Any
    class_names: tuple[str, ...] = ()  # by class number; earlier versions stored none

    of_classes = ""
    """The part of the network that has a row per class."""
    keeps_best = False
    """Whether the checkpoint of the best validation is kept too."""
    num_conditions = 0
    """Number of inputs per image besides the image."""
    positions = ""
    """Position embedding besides RoPE."""

    def __post_init__(self) -> None:
        check_fields(self)
        self.rope.check_head_dim(self.head_dim)
        self.optim.check_length(self.num_train, self.data)

    @property
    def head_dim(self) -> int:
        return size_of(self.arch).head_dim

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; an incomplete last batch is dropped."""
        return self.num_train // self.optim.batch_size

    @property
    def total_steps(self) -> int:
        return self.optim.max_steps or self.optim.epochs * self.steps_per_epoch

    def split_batch(self, world_size: int) -> tuple[int, int]:
        """Micro-batch size per process, and number of gradient accumulation steps."""
        return self.optim.split_batch(world_size, self.num_train)

    def misfits(self, before: dict[str, Any]) -> list[str]:
        """Notes on weights of other sizes or classes; `before` is name -> value of these."""
        was, now = before["num_classes"], self.model.num_classes
        other = class_difference(before["class_names"], self.class_names)
        other = f"{was} -> {now} classes" if was != now else other
        return [f"{self.of_classes} re-initialised: {other}"] if other else []


@dataclass(frozen=True, kw_only=True)
class ClassifierRun(RunConfig):
    arch: str = option(
        "deit-ti, deit-s, deit-b, deit-l, or by numbers: deit-WIDTHxDEPTHxHEADS.",
        "Model",
        metavar="NAME",
        complete=tuple(DEIT_SIZES),
    )
    data: str = option(
        f"{DATA_NAMES}, or a folder with train/ and val/ "
        "in class folders, tar or parquet files. "
        "By default $SPIRALROPE_DATA, else the bundled digits.",
        "Data and augmentation",
        metavar="NAME|FOLDER",
        complete=DATA_SETS,
    )
    seed: int = option("Seed of weights, data order and augmentation.", "Run", ge=0)
    num_val: int = option(called="the number of validation images")
    source: str = option(SOURCE, default="")
    model: ModelConfig
    augment: AugmentConfig
    optim: OptimConfig
    checkpoint: CheckpointConfig
    machine: MachineConfig = field(default_factory=MachineConfig)

    of_classes, positions, unit = "head", "learned absolute", "px"
    vae_in_loop = ""
    keeps_best = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not len(self.augment.mean) == len(self.augment.std) == self.model.in_chans:
            raise ConfigError(
                f"mean {self.augment.mean} and std {self.augment.std} need one value for each of "
                f"in_chans {self.model.in_chans}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        return self.model.grid

    def inert_options(self) -> list[tuple[str, str]]:
        augment, inert = self.augment, []
        if augment.geometry == "crop":
            inert += [(name, "--geometry is crop") for name in ("translate", "degrees")]
        else:
            inert += [("crop_scale", "--geometry is shift")]
        if augment.auto_augment not in ("none", "3a") and augment.color_jitter:
            inert += [("color_jitter", f"timm ignores it with {augment.auto_augment}")]
        return inert

    def split_batch(self, world_size: int) -> tuple[int, int]:
        micro, accumulation = super().split_batch(world_size)
        if self.augment.mixes and micro % MIX_GROUP:
            raise ConfigError(
                f"the micro-batch of {micro} images must be a multiple of {MIX_GROUP} "
                "for mixup and cutmix",
                "change --micro-batch-size, --batch-size or --nproc, or use --mixup 0 --cutmix 0",
            )
        return micro, accumulation

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
        """The data, for the plan."""
        return (
            f"{self.data}: {self.num_train} training and {self.num_val} validation images, "
            f"{self.model.num_classes} classes"
        )

    def misfits(self, before: dict[str, Any]) -> list[str]:
        notes = super().misfits(before)
        if before["image_size"] != self.model.image_size:
            was, now = map(format_size, (before["image_size"], self.model.image_size))
            notes.append(f"position embedding resampled: {was} -> {now} px")
        return notes

    @property
    def save_steps(self) -> int:
        """Optimizer steps between checkpoints."""
        return self.checkpoint.save_every * self.steps_per_epoch
