"""What a training run of a diffusion transformer is. Standard library only.

As in `runs.py`, every field name is unique over all groups and is the option's name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from spiralrope_cli.core.config.checks import at_least, in_range, one_of
from spiralrope_cli.core.config.latents import VAE_FACTOR, VAE_NAMES
from spiralrope_cli.core.config.models import dit_size
from spiralrope_cli.core.config.optim import OptimConfig
from spiralrope_cli.core.config.rope import RopeConfig
from spiralrope_cli.core.config.runs import ClassifierRun, MachineConfig
from spiralrope_cli.core.errors import ConfigError

NO_VAE = "none"
DIT_SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True, kw_only=True)
class DiTModelConfig:
    """The network's sizes beyond its architecture.

    Attributes:
        input_size: (height, width) of the latents, or of the pixels without a VAE.
        in_chans: their channels.
        num_classes: classes, without the null class of guidance.
        label_dropout: share of labels that are made null in training.
        qk_norm: normalises queries and keys.
        pretrain_grid: patches as (rows, columns) that positions refer to, where it is not the
            model's own grid.
    """

    input_size: tuple[int, int]
    in_chans: int
    num_classes: int
    label_dropout: float
    qk_norm: bool
    pretrain_grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        in_range("label_dropout", self.label_dropout, 0, 1)

    def grid(self, arch: str) -> tuple[int, int]:
        """Patches as (rows, columns) of an architecture, which knows their side."""
        patch = dit_size(arch).patch_size
        return self.input_size[0] // patch, self.input_size[1] // patch


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """From a picture to what is noised.

    Attributes:
        image_size: (height, width) in pixels.
        hflip: probability of mirroring.
        vae: `ema`, `mse`, a folder, or `none` for pixels as they are, in [-1, 1].
        latents: folder of cached latents that replaces pictures and VAE, empty for none.
    """

    image_size: tuple[int, int]
    hflip: float
    vae: str
    latents: str = ""

    def __post_init__(self) -> None:
        in_range("hflip", self.hflip, 0, 1, closed=True)

    @property
    def in_latents(self) -> bool:
        """Whether the network sees latents of a VAE."""
        return self.vae != NO_VAE


@dataclass(frozen=True, kw_only=True)
class DiTCheckpointConfig:
    """When a run reports, draws samples and saves; all in steps.

    Attributes:
        log_every: steps between log points; the only moments that wait for the device.
        sample_every: steps between sample grids of the averaged weights; 0: at the end alone.
        save_every: steps between checkpoints.
        keep_last: newest checkpoints that are kept.
        keep_every: steps whose multiples are kept for good, 0 for none.
    """

    log_every: int
    sample_every: int
    save_every: int
    keep_last: int
    keep_every: int

    def __post_init__(self) -> None:
        for name in ("log_every", "save_every", "keep_last"):
            at_least(name, getattr(self, name), 1)
        for name in ("sample_every", "keep_every"):
            at_least(name, getattr(self, name), 0)


@dataclass(frozen=True, kw_only=True)
class DiTRun:
    """A training run of a diffusion transformer, complete.

    Attributes:
        command: the command that made it.
        arch: a row of the table of architectures, which says the patch side too.
        data: a built-in name or a folder of class folders.
        out: the run folder.
        seed: of initial weights, data order, mirroring, timesteps, noise and label dropout.
        num_train: training images, which fixes the steps of an epoch.
        source: whose weights it starts from, empty for fresh ones.
    """

    command: str
    arch: str
    data: str
    out: str
    seed: int
    num_train: int
    source: str = ""
    rope: RopeConfig
    model: DiTModelConfig
    pictures: PictureConfig
    optim: OptimConfig
    checkpoint: DiTCheckpointConfig
    machine: MachineConfig = field(default_factory=MachineConfig)

    def __post_init__(self) -> None:
        self.rope.check_head_dim(dit_size(self.arch).head_dim)
        at_least("seed", self.seed, 0)
        one_of("schedule", self.optim.schedule, DIT_SCHEDULES)
        one_of("freeze", self.optim.freeze, ("none",))
        self.optim.check_length(self.num_train, self.data)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches as (rows, columns)."""
        return self.model.grid(self.arch)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; what is left of a shuffled epoch is dropped."""
        return self.optim.steps_per_epoch(self.num_train)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.optim.total_steps(self.num_train)

    def samples_at(self, step: int) -> bool:
        """Whether a sample grid is drawn after a step, but for the last one."""
        every = self.checkpoint.sample_every
        return every > 0 and step % every == 0 and step < self.total_steps

    def split_batch(self, world_size: int) -> tuple[int, int]:
        """How a step is shared out.

        Returns:
            images at a time per process, and how many times before the optimizer steps.

        Raises:
            ConfigError: the total batch cannot be met exactly; the nearest that can are named.
        """
        return self.optim.split_batch(world_size, self.num_train)


TrainingRun = ClassifierRun | DiTRun


def full_vae_name(given: str) -> str:
    """A VAE's folder by its whole path, for commands that run elsewhere; names as they are."""
    folder = Path(given).expanduser()
    is_name = given in (NO_VAE, *VAE_NAMES)
    return given if is_name or not folder.is_dir() else str(folder.resolve())


def input_size(arch: str, image_size: tuple[int, int], vae: str) -> tuple[int, int]:
    """What a picture size is for the network: pixels, or an eighth of them through the VAE.

    Raises:
        ConfigError: it does not split into whole patches.
    """
    patch, factor = dit_size(arch).patch_size, 1 if vae == NO_VAE else VAE_FACTOR
    unit = patch * factor
    for side in image_size:
        if side < unit or side % unit:
            through = f" through the VAE, which divides by {factor}" if factor > 1 else ""
            raise ConfigError(
                f"--image-size {side} does not split into the patches of {patch} "
                f"of {arch}{through}",
                f"the nearest that does: {max(1, round(side / unit)) * unit}",
            )
    return image_size[0] // factor, image_size[1] // factor
