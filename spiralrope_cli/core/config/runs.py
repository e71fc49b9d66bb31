"""What a run is: frozen, checked, and written to `config.yaml`. Standard library only.

Every field name is unique over all groups, and the command line option is that name with dashes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from spiralrope_cli.core.config.checks import at_least, in_range, one_of, share
from spiralrope_cli.core.config.models import check_divides, deit_size
from spiralrope_cli.core.config.optim import OptimConfig
from spiralrope_cli.core.config.rope import RopeConfig
from spiralrope_cli.core.errors import ConfigError

PRECISIONS = ("auto", "fp32", "bf16")
RESUME_MODES = ("auto", "must", "never")
TRACKERS = ("none", "tensorboard", "wandb")
DEVICES = ("auto", "cpu", "cuda", "mps")
GEOMETRIES = ("crop", "shift")
AUTO_AUGMENT_NAMES = r"none|3a|(rand|augmix|original|originalr|v0|v0r)(-.+)?"

MIX_GROUP = 8
"""Images that share one mixup or cutmix draw; fixed, so that it is the same for any split."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The classifier's sizes beyond its architecture; pixels and counts.

    Attributes:
        image_size: (height, width).
        patch_size: side of a patch.
        in_chans: channels of the images.
        num_classes: outputs.
        drop_path: stochastic depth rate, the same in every block.
        pretrain_grid: (rows, columns) that positions refer to, where it is not the own grid.
    """

    image_size: tuple[int, int]
    patch_size: int
    in_chans: int
    num_classes: int
    drop_path: float
    pretrain_grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_divides(self.image_size, self.patch_size)
        in_range("drop_path", self.drop_path, 0, 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches as (rows, columns)."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """From a decoded picture to what the network sees, in training and in evaluation.

    Attributes:
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
        crop_ratio: evaluation resizes the shorter side to image size / crop_ratio.
        geometry: `crop`, random resized crop, or `shift`, small shifts and rotations.
        crop_scale: smallest share of the area that `crop` keeps.
        hflip: probability of mirroring.
        max_shift: `shift` moves by up to this many pixels.
        max_rotation: `shift` turns by up to this many degrees.
        auto_augment: timm's name, such as `3a` or `rand-m9-mstd0.5-inc1`, or `none`.
        color_jitter: strength, 0 for none.
        random_erasing: probability.
        repeated_aug: how often a step's epoch holds each picture; 1 is plain shuffling.
        mixup: alpha, 0 for none.
        cutmix: alpha, 0 for none.
        mixup_switch_prob: probability of cutmix where both are on.
        smoothing: label smoothing.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_ratio: float
    geometry: str
    crop_scale: float
    hflip: float
    max_shift: float
    max_rotation: float
    auto_augment: str
    color_jitter: float
    random_erasing: float
    repeated_aug: int
    mixup: float
    cutmix: float
    mixup_switch_prob: float
    smoothing: float

    def __post_init__(self) -> None:
        one_of("geometry", self.geometry, GEOMETRIES)
        for name in ("hflip", "random_erasing", "mixup_switch_prob"):
            in_range(name, getattr(self, name), 0, 1, closed=True)
        for name in ("color_jitter", "mixup", "cutmix", "max_shift", "max_rotation"):
            at_least(name, getattr(self, name), 0)
        in_range("smoothing", self.smoothing, 0, 1)
        at_least("repeated_aug", self.repeated_aug, 1)
        if not re.fullmatch(AUTO_AUGMENT_NAMES, self.auto_augment):
            raise ConfigError(
                f"--auto-augment {self.auto_augment} is no policy of timm",
                "there are none, 3a, rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, original and v0",
            )
        share("crop_scale", self.crop_scale)
        share("crop_ratio", self.crop_ratio)

    @property
    def mixes(self) -> bool:
        """Whether labels are mixed."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run reports, validates and saves.

    Attributes:
        log_every: steps between log points; the only moments that wait for the device.
        validate_every: epochs between validations.
        save_every: epochs between checkpoints.
        keep_last: newest checkpoints that are kept beside the best one.
        keep_every: steps whose multiples are kept for good, 0 for none.
    """

    log_every: int
    validate_every: int
    save_every: int
    keep_last: int
    keep_every: int

    def __post_init__(self) -> None:
        for name in ("log_every", "validate_every", "save_every", "keep_last"):
            at_least(name, getattr(self, name), 1)
        at_least("keep_every", self.keep_every, 0)


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """Where and how a run is executed. Of these only `precision` changes its numbers.

    Attributes:
        nproc: worker processes on this machine; 0 takes one per GPU, and one on CPU.
        nnodes: machines.
        rdzv_endpoint: host:port where several machines meet.
        device: `auto`, `cpu`, `cuda` or `mps`.
        precision: `auto`, `fp32` or `bf16`.
        compile: through torch.compile.
        grad_checkpointing: computes activations twice in place of keeping them.
        workers: loader processes per process, for image folders; -1 takes up to 4, by cores.
        skip_bad: goes on without images that cannot be decoded, and counts them.
        resume: `auto`, `must` or `never`.
        tracker: `none`, `tensorboard` or `wandb`.
    """

    nproc: int = 0
    nnodes: int = 1
    rdzv_endpoint: str = ""
    device: str = "auto"
    precision: str = "auto"
    compile: bool = False
    grad_checkpointing: bool = False
    workers: int = -1
    skip_bad: bool = False
    resume: str = "auto"
    tracker: str = "none"

    def __post_init__(self) -> None:
        one_of("precision", self.precision, PRECISIONS)
        one_of("resume", self.resume, RESUME_MODES)
        one_of("tracker", self.tracker, TRACKERS)
        one_of("device", self.device, DEVICES)
        at_least("nproc", self.nproc, 0)
        at_least("nnodes", self.nnodes, 1)
        at_least("workers", self.workers, -1)
        if self.rdzv_endpoint and not re.fullmatch(r".+:\d+", self.rdzv_endpoint):
            raise ConfigError(f"--rdzv-endpoint is {self.rdzv_endpoint}; it must be HOST:PORT")
        if self.nnodes > 1 and not self.rdzv_endpoint:
            raise ConfigError(
                f"--nnodes is {self.nnodes} without --rdzv-endpoint",
                "name the first machine, such as --rdzv-endpoint host:29500",
            )


@dataclass(frozen=True, kw_only=True)
class ClassifierRun:
    """A training run of a classifier, complete.

    Attributes:
        command: the command that made it.
        arch: a row of the table of architectures.
        data: a built-in name or a folder.
        out: the run folder.
        seed: of initial weights, data order, augmentation and stochastic depth.
        num_train: training images, which fixes the steps of an epoch.
        num_val: validation images.
        source: whose weights it starts from, empty for fresh ones.
    """

    command: str
    arch: str
    data: str
    out: str
    seed: int
    num_train: int
    num_val: int
    source: str = ""
    rope: RopeConfig
    model: ModelConfig
    augment: AugmentConfig
    optim: OptimConfig
    checkpoint: CheckpointConfig
    machine: MachineConfig = field(default_factory=MachineConfig)

    def __post_init__(self) -> None:
        self.rope.check_head_dim(deit_size(self.arch).head_dim)
        at_least("seed", self.seed, 0)
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
