"""Config of a DiT's training run, frozen and checked. Standard library only.

Field names are unique over all groups; the option is the name with dashes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from spiralrope_cli.core.config.datasets import DATA_NAMES, DATA_SETS
from spiralrope_cli.core.config.fid import TrainingFid
from spiralrope_cli.core.config.models import SIZE, dit_size, format_size
from spiralrope_cli.core.config.option import check_fields, folder, option
from spiralrope_cli.core.config.runs import ClassifierRun, RunConfig
from spiralrope_cli.core.config.training import MachineConfig, OptimConfig
from spiralrope_cli.core.errors import ConfigError

NO_VAE = "none"
VAE_NAMES = ("ema", "mse")
VAE_FACTOR = 8
"""Side of an image in pixels over the side of its latents."""

LATENT_CHANNELS = 4
LATENT_SCALE = 0.18215
"""Factor of latents for a DiT."""
GRID_COLUMNS, GRID_ROWS = 10, 4
"""Of the grids of samples: one column per class, and images of each."""
DIT_WORDS = {
    "rotate": "Half the number of directions, K = 2 * rotate; 0 (as published): plain axial RoPE.",
    "lr": "Learning rate.",
}
"""Help of shared options that differs for a DiT."""


@dataclass(frozen=True, kw_only=True)
class DiTModelConfig:
    """Sizes of a DiT, besides those of its architecture."""

    input_size: tuple[int, int]  # of the latents; without a VAE of the image
    in_chans: int
    num_classes: int = option(called="the number of classes")  # without the null class
    class_dropout_prob: float = option(
        "Probability of dropping the class label, for classifier-free guidance.",
        "Recipe",
        ge=0,
        lt=1,
        was="--label-dropout",
    )
    qk_norm: bool = option("Normalise queries and keys (QK norm).", "Model")
    pretrain_grid: tuple[int, int] | None = None  # patch grid of pretraining, if not its own

    def __post_init__(self) -> None:
        check_fields(self)

    def grid(self, arch: str) -> tuple[int, int]:
        patch = dit_size(arch).patch_size
        return self.input_size[0] // patch, self.input_size[1] // patch


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Preprocessing of images: size, flip, VAE."""

    panel = "Data and augmentation"
    image_size: tuple[int, int] = option("Side, or height x width, in pixels.", "Model", **SIZE)
    hflip: float = option("Probability of a horizontal flip.", ge=0, le=1)
    vae: str = option(
        "VAE: ema, mse, a folder in diffusers' layout, hf:OWNER/NAME, or none for pixels.",
        metavar="NAME|FOLDER",
        complete=(*VAE_NAMES, NO_VAE),
    )
    latents: str = option(
        "Folder of cached latents from dit-encode, instead of --data.",
        metavar="FOLDER",
        read=folder,
        expects="a folder",
        default="",
    )

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def in_latents(self) -> bool:
        """Whether the network takes latents of a VAE."""
        return self.vae != NO_VAE


@dataclass(frozen=True, kw_only=True)
class DiTCheckpointConfig:
    """When a run logs, samples and saves; all in steps."""

    panel = "Run"
    free = True
    # The loop waits for the device at log points only.
    log_every: int = option("Steps between log points.", ge=1)
    sample_every: int = option("Steps between sample grids; 0: only at the end.", ge=0)
    save_every: int = option("Steps between checkpoints.", ge=1)
    keep_last: int = option("Keep this number of newest checkpoints.", ge=1)
    keep_every: int = option("Also keep checkpoints at multiples of this step; 0: none.", ge=0)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class DiTOptimConfig(OptimConfig):
    """Optimizer, schedule and EMA; there is no `published` schedule for a DiT."""

    schedule: Literal["cosine", "constant"] = option("Learning rate schedule.", "Recipe")


@dataclass(frozen=True, kw_only=True)
class DiTRun(RunConfig):
    arch: str = option(
        "dit-ti2 to dit-xl8 (the digit is the patch side), DiT-XL/2, "
        "or by numbers: dit-WIDTHxDEPTHxHEADS-PATCH.",
        "Model",
        metavar="NAME",
        complete="dit_archs",
    )
    data: str = option(
        f"{DATA_NAMES}, or a folder: of classes, or with train/ "
        "in class folders, tar or parquet files. "
        "By default $SPIRALROPE_DATA, else the bundled digits.",
        "Data and augmentation",
        metavar="NAME|FOLDER",
        complete=DATA_SETS,
    )
    seed: int = option("Seed of weights, data order, timesteps and noise.", "Run", ge=0)
    source: str = option(
        "Start from the EMA weights of a run, a file, a published name or hf:OWNER/NAME.",
        "Model",
        flag="--init-from",
        was="--init",
        metavar="SOURCE",
        complete="sources",
        default="",
    )
    model: DiTModelConfig
    images: ImageConfig = field(metadata={"was": "pictures"})
    optim: DiTOptimConfig
    checkpoint: DiTCheckpointConfig
    fid: TrainingFid = field(default_factory=TrainingFid)
    machine: MachineConfig = field(default_factory=MachineConfig)

    of_classes, positions = "label table", "fixed sin-cos"
    num_conditions = 2  # timestep and label

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optim.freeze != "none":
            raise ConfigError(f"--freeze is {self.optim.freeze}; it must be none")

    @property
    def grid(self) -> tuple[int, int]:
        return self.model.grid(self.arch)

    def inert_options(self) -> list[tuple[str, str]]:
        inert = [] if self.source else [("ema", "--init-from is not given")]
        inert += self.fid.inert_options()
        if self.images.latents:
            inert += [(name, "--latents is given") for name in ("data", "skip_bad")]
        return inert

    @property
    def vae_in_loop(self) -> str:
        """The VAE that encodes images in every step; empty if there is none."""
        return self.images.vae if self.images.in_latents and not self.images.latents else ""

    def fid_at(self, step: int) -> bool:
        """Whether the FID is computed after a step."""
        every = self.fid.fid_every
        return every > 0 and step > 0 and (step % every == 0 or step == self.total_steps)

    def samples_at(self, step: int) -> bool:
        """Whether a sample grid is made after a step, except after the last."""
        every = self.checkpoint.sample_every
        return every > 0 and step % every == 0 and step < self.total_steps

    @property
    def image_size(self) -> tuple[int, int]:
        return self.images.image_size

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.model.in_chans, *self.model.input_size

    @property
    def grid_classes(self) -> list[int]:
        """The class of each column of the grid of samples."""
        classes = self.model.num_classes
        columns = min(GRID_COLUMNS, classes)
        return [column * classes // columns for column in range(columns)]

    @property
    def unit(self) -> str:
        return "latents" if self.images.in_latents else "px"

    @property
    def data_line(self) -> str:
        images = self.images
        seen = "as pixels, in [-1, 1]"
        if images.in_latents:
            seen = f"through the VAE {images.vae}"
        if images.latents:
            seen = f"as latents of the VAE {images.vae}, cached in {images.latents}"
        mirrored = f"flipped with p = {images.hflip:g}" if images.hflip else "never flipped"
        return (
            f"{self.data}: {self.num_train} training images, {self.model.num_classes} classes; "
            f"{format_size(images.image_size)} px, {mirrored}, {seen}"
        )

    def misfits(self, before: dict[str, Any]) -> list[str]:
        notes = super().misfits(before)
        if not self.rope.enabled and before["input_size"] != self.model.input_size:
            notes.append("fixed positions recomputed for this size")
        return notes

    @property
    def save_steps(self) -> int:
        return self.checkpoint.save_every


TrainingRun = ClassifierRun | DiTRun
RUN_KINDS: dict[str, type[TrainingRun]] = {
    **dict.fromkeys(("pretrain", "finetune"), ClassifierRun),
    "dit-train": DiTRun,
}


def full_vae_name(given: str) -> str:
    """The absolute path of a VAE's folder; names are unchanged."""
    folder = Path(os.path.expanduser(given))
    is_name = given in (NO_VAE, *VAE_NAMES)
    return given if is_name or not folder.is_dir() else str(folder.resolve())


def input_size(arch: str, image_size: tuple[int, int], vae: str) -> tuple[int, int]:
    """Input size of the network: that of the image, or an eighth of it with a VAE."""
    patch, factor = dit_size(arch).patch_size, 1 if vae == NO_VAE else VAE_FACTOR
    unit = patch * factor
    for side in image_size:
        if side < unit or side % unit:
            through = f" through the VAE, which divides by {factor}" if factor > 1 else ""
            raise ConfigError(
                f"--image-size {side} does not split into patches of {patch} for {arch}{through}",
                f"the nearest that does: {max(1, round(side / unit)) * unit}",
            )
    return image_size[0] // factor, image_size[1] // factor
