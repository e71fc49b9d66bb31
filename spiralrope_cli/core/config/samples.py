"""What a run of sampling is. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from spiralrope_cli.core.config.checks import at_least, one_of
from spiralrope_cli.core.config.datasets import BUILT_IN, DataSet
from spiralrope_cli.core.config.diffusion import (
    NUM_TRAIN_STEPS,
    SAMPLERS,
    GuidanceConfig,
    spaced_timesteps,
)
from spiralrope_cli.core.config.dit_runs import NO_VAE
from spiralrope_cli.core.config.latents import VAE_FACTOR
from spiralrope_cli.core.config.runs import MachineConfig
from spiralrope_cli.core.errors import ConfigError

DEFAULTS: dict[str, Any] = {"steps": "250", "sampler": "ddpm", "seed": 100}
"""As the published figures were made."""

SAMPLING_VAE = "mse"


def num_samples(data: str) -> int:
    """How many images are drawn of weights that were trained on a data set, empty if unknown."""
    return BUILT_IN.get(data, DataSet).num_samples


def decoder_of(vae: str) -> str:
    """The VAE that decodes what was trained on latents of one."""
    # Trained with the encoder of `ema`, decoded by `mse`: so the published figures were made.
    return SAMPLING_VAE if vae == "ema" else vae


def check_chain(sampler: str, steps: str) -> None:
    """Refuses a chain that no sampler, or not this one, can walk.

    Raises:
        ConfigError: names the option and what is allowed.
    """
    one_of("sampler", sampler, SAMPLERS)
    count = len(spaced_timesteps(steps))
    if sampler == "dpm++" and not steps.isdecimal():
        raise ConfigError(f"--steps {steps}: dpm++ spaces its steps itself", "give their number")
    if sampler == "dpm++" and count >= NUM_TRAIN_STEPS:
        raise ConfigError(f"--steps {steps}: dpm++ takes at most {NUM_TRAIN_STEPS - 1}")


@dataclass(frozen=True, kw_only=True)
class SampleRun:
    """Images from one set of weights, complete.

    Attributes:
        source: as the user named the weights.
        file: that holds them.
        ema: averaged in place of raw ones.
        rope: field name -> value, options of the user over those of the weights.
        out: folder of the results.
        num: images.
        steps: of the chain, such as `250`, `10,15,20` or `ddim25`.
        sampler: `ddpm`, `ddim` or `dpm++`.
        guidance: scale, channels and interval.
        classes: dealt out in turn over the images; empty draws one for each.
        num_classes: classes of the weights.
        seed: of noise and drawn classes; image i follows from (seed, i) alone.
        vae: `mse`, `ema`, a folder, or `none` where the network draws pixels.
        image_size: (height, width) in pixels.
        batch_size: images at a time per process.
        png: writes every image as a file too.
        sha256: of the file that holds the weights.
        vae_sha256: of the VAE's, empty without one.
    """

    source: str
    file: str
    ema: bool
    rope: dict[str, Any]
    out: str
    num: int
    steps: str
    sampler: str
    guidance: GuidanceConfig
    classes: tuple[int, ...]
    num_classes: int
    seed: int
    vae: str
    image_size: tuple[int, int]
    batch_size: int
    png: bool
    sha256: str
    vae_sha256: str
    machine: MachineConfig = field(default_factory=MachineConfig)

    def __post_init__(self) -> None:
        check_chain(self.sampler, self.steps)
        for name in ("num", "batch_size"):
            at_least(name, getattr(self, name), 1)
        at_least("seed", self.seed, 0)
        wrong = [label for label in self.classes if not 0 <= label < self.num_classes]
        if wrong:
            raise ConfigError(
                f"--classes {','.join(map(str, wrong[:5]))}: the weights know "
                f"{self.num_classes} classes, 0 to {self.num_classes - 1}"
            )

    @property
    def factor(self) -> int:
        """Pixels along a side for each one that the network draws."""
        return 1 if self.vae == NO_VAE else VAE_FACTOR

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) that the network draws."""
        return self.image_size[0] // self.factor, self.image_size[1] // self.factor

    @property
    def num_bytes(self) -> int:
        """Of all images, 8 bits per channel."""
        return 3 * self.num * self.image_size[0] * self.image_size[1]

    def label(self, index: int) -> int | None:
        """The class of an image where classes were given, else None."""
        return self.classes[index % len(self.classes)] if self.classes else None
