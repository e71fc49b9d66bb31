"""Config of `dit-encode`, and the VAEs that it takes. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from spiralrope_cli.core.config.models import SIZE, format_size
from spiralrope_cli.core.config.option import DATA, MACHINE, PATH, RUN, Opt, check_fields
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.errors import ConfigError

VAE_NAMES = ("ema", "mse")
VAE_FACTOR = 8
"""Side of an image in pixels over the side of its latents."""

LATENT_CHANNELS = 4
LATENT_SCALE = 0.18215
"""Factor of latents for a DiT."""

EXACT = "fp32"
"""Default precision: latents are computed once for all epochs, so fp32 is worth its time."""


@dataclass(frozen=True, kw_only=True)
class EncodeRun:
    """A run of `dit-encode`."""

    data: Annotated[
        str,
        Opt(
            "Folder with one folder of images per class, directly or in train/. "
            "By default $SPIRALROPE_DATA.",
            DATA,
            metavar="FOLDER",
        ),
    ]
    out: Annotated[str, Opt("Folder of the cache.", RUN, **PATH)] = "latents"
    vae: Annotated[
        str,
        Opt(
            "VAE: ema, mse, or a folder in diffusers' layout.",
            DATA,
            metavar="ema|mse|FOLDER",
            complete="vaes",
        ),
    ] = "ema"
    image_size: Annotated[
        tuple[int, int], Opt("Side, or height x width, after the centre crop.", DATA, **SIZE)
    ] = (256, 256)
    batch_size: Annotated[int, Opt("Images per batch and process.", MACHINE, ge=1)] = 16
    machine: MachineConfig = field(default_factory=MachineConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        nearest = [max(1, round(side / VAE_FACTOR)) * VAE_FACTOR for side in self.image_size]
        if nearest != [*self.image_size]:
            raise ConfigError(
                f"--image-size {format_size(self.image_size)}: the sides must be multiples of "
                f"{VAE_FACTOR} for the VAE",
                f"the nearest: {format_size(nearest)}",
            )
