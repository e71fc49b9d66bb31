"""What a training run of a diffusion transformer is. Standard library only.

As in `runs.py`, every field name is unique over all groups and is the option's name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from spiralrope_cli.core.config.latents import VAE_FACTOR, VAE_NAMES
from spiralrope_cli.core.config.models import SIZE, RopeConfig, dit_size, format_size
from spiralrope_cli.core.config.option import (
    DATA,
    MODEL,
    PATH,
    RECIPE,
    RUN,
    Opt,
    check_fields,
    folder,
)
from spiralrope_cli.core.config.runs import ClassifierRun
from spiralrope_cli.core.config.training import MachineConfig, OptimConfig
from spiralrope_cli.core.errors import ConfigError

NO_VAE = "none"
DIT_WORDS = {
    "rotate": "Half the number of directions; as published: 0, plain axial RoPE.",
    "lr": "Learning rate.",
}
"""Help of shared options where a diffusion transformer's differs."""


@dataclass(frozen=True, kw_only=True)
class DiTModelConfig:
    """The network's sizes beyond its architecture."""

    input_size: tuple[int, int]  # of the latents, or of the pixels without a VAE
    in_chans: int
    num_classes: Annotated[int, "the number of classes"]  # without the null class of guidance
    class_dropout_prob: Annotated[
        float,
        Opt(
            "Probability of dropping the class label, for guidance.",
            RECIPE,
            ge=0,
            lt=1,
            was="--label-dropout",
        ),
    ]
    qk_norm: Annotated[bool, Opt("Normalise queries and keys (QK norm).", MODEL)]
    pretrain_grid: tuple[int, int] | None = None  # patches that positions refer to, if not its own

    def __post_init__(self) -> None:
        check_fields(self)

    def grid(self, arch: str) -> tuple[int, int]:
        """Patches as (rows, columns) of an architecture, which knows their side."""
        patch = dit_size(arch).patch_size
        return self.input_size[0] // patch, self.input_size[1] // patch


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """From an image to the input of the diffusion process."""

    image_size: Annotated[
        tuple[int, int], Opt("Side, or height x width, in pixels.", MODEL, **SIZE)
    ]
    hflip: Annotated[float, Opt("Probability of a horizontal flip.", DATA, ge=0, le=1)]
    vae: Annotated[
        str,
        Opt(
            "ema, mse, a folder in diffusers' layout, or none: pixels.",
            DATA,
            metavar="NAME|FOLDER",
            complete="vaes_or_none",
        ),
    ]
    latents: Annotated[
        str,
        Opt(
            "Train from a folder of dit-encode, in place of --data.",
            DATA,
            metavar="FOLDER",
            read=folder,
            expects="a folder",
        ),
    ] = ""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def in_latents(self) -> bool:
        """Whether the network sees latents of a VAE."""
        return self.vae != NO_VAE


@dataclass(frozen=True, kw_only=True)
class DiTCheckpointConfig:
    """When a run reports, draws samples and saves; all in steps."""

    # Log points are the only moments that wait for the device.
    log_every: Annotated[int, Opt("Steps between log points.", RUN, ge=1, free=True)]
    sample_every: Annotated[
        int, Opt("Steps between sample grids; 0: only at the end.", RUN, ge=0, free=True)
    ]
    save_every: Annotated[int, Opt("Steps between checkpoints.", RUN, ge=1, free=True)]
    keep_last: Annotated[int, Opt("Newest checkpoints to keep.", RUN, ge=1, free=True)]
    keep_every: Annotated[
        int, Opt("Keep checkpoints at multiples of this; 0: none.", RUN, ge=0, free=True)
    ]

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class DiTOptimConfig(OptimConfig):
    """Optimizer, schedule and averages; no run of the published code had another schedule."""

    schedule: Annotated[Literal["cosine", "constant"], Opt("Cosine per step, or constant.", RECIPE)]


@dataclass(frozen=True, kw_only=True)
class DiTRun:
    """A training run of a diffusion transformer, complete."""

    command: str
    arch: Annotated[
        str,
        Opt(
            "dit-ti2 to dit-xl8 (the digit is the patch side), DiT-XL/2, "
            "or by numbers: dit-WIDTHxDEPTHxHEADS-PATCH.",
            MODEL,
            metavar="NAME",
            complete="dit_archs",
        ),
    ]
    data: Annotated[
        str,
        Opt(
            "digits, fashion-mnist, or a folder of class folders, or one with train/. "
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
    seed: Annotated[int, Opt("Seed of weights, data order, timesteps and noise.", RUN, ge=0)]
    num_train: Annotated[int, "the number of training images"]
    source: Annotated[
        str,
        Opt(
            "Start from the EMA weights of a run, a file or a published name.",
            MODEL,
            flag="--init-from",
            was="--init",
            metavar="SOURCE",
            complete="sources",
        ),
    ] = ""
    rope: RopeConfig
    model: DiTModelConfig
    images: ImageConfig = field(metadata={"was": "pictures"})
    optim: DiTOptimConfig
    checkpoint: DiTCheckpointConfig
    machine: MachineConfig = field(default_factory=MachineConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        self.rope.check_head_dim(dit_size(self.arch).head_dim)
        if self.optim.freeze != "none":
            raise ConfigError(f"--freeze is {self.optim.freeze}; it must be none")
        self.optim.check_length(self.num_train, self.data)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches as (rows, columns)."""
        return self.model.grid(self.arch)

    def inert_options(self) -> list[tuple[str, str]]:
        """Fields of a diffusion transformer that cannot act in this run, each with the reason."""
        if not self.images.latents:
            return []
        return [(name, "--latents is given") for name in ("data", "workers", "skip_bad")]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; what is left of a shuffled epoch is dropped."""
        return self.optim.steps_per_epoch(self.num_train)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.optim.total_steps(self.num_train)

    @property
    def vae_in_loop(self) -> str:
        """The VAE that images go through in every step, empty for none."""
        return self.images.vae if self.images.in_latents and not self.images.latents else ""

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

    keeps_best = False
    """Whether the checkpoint of the best validation stays beside the newest."""
    num_conditions = 2
    """Numbers per image that the network takes beside it: timestep and label."""
    positions = "fixed sin-cos"
    """The kind of positions beside RoPE."""

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return dit_size(self.arch).head_dim

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.images.image_size

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the network's input."""
        return self.model.in_chans, *self.model.input_size

    @property
    def unit(self) -> str:
        """Of the sides of the network's input."""
        return "latents" if self.images.in_latents else "px"

    @property
    def data_line(self) -> str:
        """What it learns from, in words."""
        images = self.images
        seen = "as pixels, in [-1, 1]"
        if images.in_latents:
            seen = f"through the VAE {images.vae}"
        if images.latents:
            seen = f"as latents of the VAE {images.vae}, cached in {images.latents}"
        mirrored = f"mirrored with p = {images.hflip:g}" if images.hflip else "never mirrored"
        return (
            f"{self.data}: {self.num_train} training images, {self.model.num_classes} classes; "
            f"{format_size(images.image_size)} px, {mirrored}, {seen}"
        )

    def misfits(self, before: dict[str, Any]) -> list[str]:
        """What of weights with other sizes does not fit this run, in words.

        Args:
            before: name -> value, sizes of the weights that it starts from.
        """
        messages = []
        if before["num_classes"] != self.model.num_classes:
            messages.append(
                f"label table re-initialised: {before['num_classes']} -> "
                f"{self.model.num_classes} classes"
            )
        if not self.rope.enabled and before["input_size"] != self.model.input_size:
            messages.append("fixed positions made anew for this size")
        return messages

    @property
    def save_steps(self) -> int:
        """Optimizer steps between checkpoints."""
        return self.checkpoint.save_every


TrainingRun = ClassifierRun | DiTRun


def full_vae_name(given: str) -> str:
    """A VAE's folder by its whole path, for commands that run elsewhere; names as they are."""
    folder = Path(given).expanduser()
    is_name = given in (NO_VAE, *VAE_NAMES)
    return given if is_name or not folder.is_dir() else str(folder.resolve())


def input_size(arch: str, image_size: tuple[int, int], vae: str) -> tuple[int, int]:
    """What an image size is for the network: pixels, or an eighth of them through the VAE.

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
