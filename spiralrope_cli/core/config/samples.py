"""Configs of `dit-encode`, and of `dit-sample`: steps, guidance, images. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from spiralrope_cli.core.config.datasets import BUILT_IN, DataSet
from spiralrope_cli.core.config.dit_runs import (
    LATENT_CHANNELS,
    NO_VAE,
    VAE_FACTOR,
    VAE_NAMES,
    input_size,
)
from spiralrope_cli.core.config.fid import NUM_SAMPLING_STEPS
from spiralrope_cli.core.config.hub import HUB
from spiralrope_cli.core.config.models import ARCH_OF_SOURCE, SIZE, format_size, numbers, pair
from spiralrope_cli.core.config.option import PATH, SOURCE, Opt, check_fields, option
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.storage import check_writable

EXACT = "fp32"
"""Default precision: latents are computed once for all epochs, so fp32 is worth its time."""
NUM_TRAIN_STEPS = 1000
BETA_FIRST, BETA_LAST = 1e-4, 0.02
SamplerName = Literal["ddpm", "ddim", "dpm++"]
SAMPLERS: tuple[str, ...] = get_args(SamplerName)
SAMPLING_VAE = "mse"
NUM_SAMPLES = Opt(
    "Number of images; by default 50000, or 200 for a built-in data set.",
    "Sampling",
    ge=1,
    was="--num",
)


@dataclass(frozen=True, kw_only=True)
class EncodeRun:
    panel = "Data and augmentation"
    data: str = option(
        "Folder with one folder of images per class, directly or in train/. "
        "By default $SPIRALROPE_DATA.",
        metavar="FOLDER",
    )
    out: str = option("Folder of the cache.", "Run", **PATH, default="latents")
    vae: str = option(
        "VAE: ema, mse, a folder in diffusers' layout, or hf:OWNER/NAME.",
        metavar="NAME|FOLDER",
        complete=VAE_NAMES,
        default="ema",
    )
    image_size: tuple[int, int] = option(
        "Side, or height x width, after the centre crop.", **SIZE, default=(256, 256)
    )
    batch_size: int = option("Images per batch and process.", "Machine", ge=1, default=16)
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
        check_writable(self.out, folder=True)


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """Classifier-free guidance: e = e_null + scale * (e_label - e_null)."""

    panel = "Sampling"
    cfg_scale: float = option("Guidance scale; 1: no guidance (twice as fast).", ge=1, default=1.0)
    cfg_channels: Literal["3", "all"] = option(
        "Number of guided noise channels; 3 as published.", default="3"
    )
    # arXiv 2404.07724
    cfg_interval: tuple[int, int] = option(
        "Guidance only at timesteps LO <= t < HI, within 0 to 1000.",
        metavar="LO,HI",
        read=pair,
        expects="LO,HI in timesteps of 0 to 1000, as 100,750 for the fractions 0.1 to 0.75",
        default=(0, NUM_TRAIN_STEPS),
    )

    def __post_init__(self) -> None:
        check_fields(self)
        low, high = self.cfg_interval
        if not 0 <= low < high <= NUM_TRAIN_STEPS:
            raise ConfigError(
                f"--cfg-interval {low},{high}: it must be LO,HI with "
                f"0 <= LO < HI <= {NUM_TRAIN_STEPS}"
            )

    @property
    def summary(self) -> str:
        """Guidance, for the plan."""
        if self.cfg_scale == 1:
            return "none"
        low, high = self.cfg_interval
        channels = "all channels" if self.cfg_channels == "all" else "3 channels"
        return f"{self.cfg_scale:g} on {channels}, timesteps {low} to {high}"

    def notes(self) -> list[str]:
        """Options that have no effect."""
        if self.cfg_scale > 1 or self == GuidanceConfig():
            return []
        return ["--cfg-channels and --cfg-interval have no effect: --cfg-scale is 1"]


def space_timesteps(steps: str | int) -> list[int]:
    """The timesteps of a chain, ascending, out of 0 to 999.

    Args:
        steps: "250": 250 evenly spaced steps; "10,15,20": evenly spaced in each of three equal
            sections; "ddim25": every 40th step.
    """
    text = str(steps)
    if text.startswith("ddim"):
        wanted = int(text[4:]) if text[4:].isdecimal() else 0
        for step in range(1, NUM_TRAIN_STEPS // 2 + 1):
            if len(chosen := range(0, NUM_TRAIN_STEPS, step)) == wanted:
                return list(chosen)
        raise ConfigError(
            f"--num-sampling-steps {text}: no integer stride over {NUM_TRAIN_STEPS} steps gives "
            "this number",
            f"use --num-sampling-steps {wanted}"
            if 1 < wanted <= NUM_TRAIN_STEPS
            else "for example ddim25 or ddim50",
        )
    counts = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    size, longer = divmod(NUM_TRAIN_STEPS, len(counts))
    sizes = [size + (number < longer) for number in range(len(counts))]
    fits = all(1 <= count <= size for count, size in zip(counts, sizes, strict=True))
    if not fits or sum(counts) < 2:
        raise ConfigError(
            f"--num-sampling-steps {text}: it must be 2 to {NUM_TRAIN_STEPS}, "
            "counts per section such as 10,15,20, or ddim25"
        )
    kept, start = [], 0
    for count, size in zip(counts, sizes, strict=True):
        # Summed, not multiplied, as published: the rounding errors decide which steps are chosen.
        stride, place = (size - 1) / (count - 1) if count > 1 else 1.0, 0.0
        for _ in range(count):
            kept.append(start + round(place))
            place += stride
        start += size
    return kept


def default_num_samples(data: str) -> int:
    """Default number of images for weights trained on `data`, which is empty if unknown."""
    return BUILT_IN.get(data, DataSet).num_samples


def default_batch_size(image_size: tuple[int, int]) -> int:
    """64 for 256 px; for other sizes the same number of pixels, at most 100 images."""
    return max(1, min(100, 64 * 256 * 256 // (image_size[0] * image_size[1])))


def decoder_of(vae: str) -> str:
    """The default VAE to decode, for a DiT that was trained with latents of `vae`."""
    # The published metrics: latents encoded by `ema`, samples decoded by `mse`.
    return SAMPLING_VAE if vae == "ema" else vae


def resolve_vae(source: str, channels: int, *, trained: str | None, given: str | None) -> str:
    """The VAE to decode: `given`, or the default for that of the training, if known."""
    if trained is None:
        trained = SAMPLING_VAE if channels == LATENT_CHANNELS else NO_VAE
    vae = decoder_of(trained) if given is None else given
    a_folder = vae not in (NO_VAE, *VAE_NAMES) and not vae.startswith(HUB)
    if vae == trained and a_folder and not Path(vae).is_dir():
        raise ConfigError(
            f"{source} was trained with the VAE {vae}, which does not exist here",
            "use --vae with the folder of that VAE",
        )
    if vae == NO_VAE and channels not in (1, 3):
        raise ConfigError(
            f"--vae none: {source} generates {channels} channels; only a VAE decodes these",
            "use --vae mse, ema or a folder",
        )
    if vae != NO_VAE and channels != LATENT_CHANNELS:
        raise ConfigError(
            f"--vae {vae}: {source} generates pixels ({channels} channel(s))", "use --vae none"
        )
    return vae


def resolve_image_size(
    arch: str, vae: str, *, trained: tuple[int, int], given: tuple[int, int] | None, rope: bool
) -> tuple[int, int]:
    """(height, width) in pixels: `given`, or the size of images in training."""
    factor = 1 if vae == NO_VAE else VAE_FACTOR
    own = factor * trained[0], factor * trained[1]
    image_size = own if given is None else given
    input_size(arch, image_size, vae)
    if image_size != own and not rope:
        raise ConfigError(
            f"--image-size {'x'.join(map(str, image_size))}: these weights have no RoPE, so they "
            f"generate {'x'.join(map(str, own))} only"
        )
    return image_size


def null_label_notes(source: str, trained: dict[str, Any], scale: float) -> list[str]:
    """A note where the null label is of other weights; raises where it was never trained."""
    if scale == 1 or trained.get("model", {}).get("class_dropout_prob") != 0:
        return []
    if first := trained.get("source"):
        return [f"the null label of {source} is that of {first}: --class-dropout-prob was 0"]
    raise ConfigError(
        f"--cfg-scale {scale:g}: {source} has no null label to guide by, as it was trained with "
        "--class-dropout-prob 0",
        "use --cfg-scale 1, or train with --class-dropout-prob 0.1",
    )


def check_chain(sampler: str, steps: str) -> None:
    """Raises if the number of steps is not possible with this sampler."""
    count = len(space_timesteps(steps))
    if sampler == "dpm++" and not steps.isdecimal():
        raise ConfigError(
            f"--num-sampling-steps {steps}: dpm++ chooses the timesteps itself",
            "use a plain number of steps",
        )
    if sampler == "dpm++" and count >= NUM_TRAIN_STEPS:
        raise ConfigError(
            f"--num-sampling-steps {steps}: dpm++ takes at most {NUM_TRAIN_STEPS - 1}"
        )


@dataclass(frozen=True, kw_only=True)
class SampleRun:
    panel = "Sampling"
    source: str = option(SOURCE)
    file: str  # that holds the weights
    sha256: str  # of it
    arch: str = option(ARCH_OF_SOURCE)
    vae_sha256: str  # empty without a VAE
    rope: dict[str, Any]  # options of the user over those of the weights
    num_classes: int = option(called="the number of classes")
    num_samples: int = option(NUM_SAMPLES)
    # Defaults of steps and sampler: those of the published metrics.
    num_sampling_steps: str = option(
        "Number of steps; or per section, as 10,15,20; or ddim25.",
        was="--steps",
        metavar="N|N,...|ddimN",
        default=str(NUM_SAMPLING_STEPS),
    )
    sampler: SamplerName = option("Sampler.", default="ddpm")
    guidance: GuidanceConfig
    classes: tuple[int, ...] = option(
        "Class labels, repeated in this order; by default random per image.",
        metavar="N,N,...",
        read=numbers,
        expects="a list of class numbers, as 207,88",
        default=(),
    )
    ema: bool = option("Use EMA weights.", flag="--ema/--no-ema", default=True)
    image_size: tuple[int, int] = option(
        "Side, or height x width, in pixels; by default as trained.", "Images", **SIZE
    )
    vae: str = option(
        "VAE: mse, ema, a folder in diffusers' layout, hf:OWNER/NAME, or none for pixels.",
        "Images",
        metavar="NAME|FOLDER",
        complete=(*VAE_NAMES, NO_VAE),
    )
    png: bool = option("Also write every image as a .png.", "Images", default=False)
    out: str = option("Output folder; by default runs/dit-sample-...", "Run", **PATH)
    seed: int = option("Seed; image i depends only on the seed and i.", "Run", ge=0, default=100)
    batch_size: int = option("Images per batch and process.", "Run", ge=1)
    machine: MachineConfig = field(default_factory=MachineConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        check_chain(self.sampler, self.num_sampling_steps)
        wrong = [label for label in self.classes if not 0 <= label < self.num_classes]
        if wrong:
            raise ConfigError(
                f"--classes {','.join(map(str, wrong[:5]))}: the weights have "
                f"{self.num_classes} classes, 0 to {self.num_classes - 1}"
            )

    @property
    def input_size(self) -> tuple[int, int]:
        factor = 1 if self.vae == NO_VAE else VAE_FACTOR
        return self.image_size[0] // factor, self.image_size[1] // factor
