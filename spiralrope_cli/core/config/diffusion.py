"""The words of the diffusion process: steps, samplers, guidance. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from spiralrope_cli.core.config.option import SAMPLING, Opt, check_fields, pair
from spiralrope_cli.core.errors import ConfigError

NUM_TRAIN_STEPS = 1000
Sampler = Literal["ddpm", "ddim", "dpm++"]
SAMPLERS: tuple[str, ...] = get_args(Sampler)


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """Classifier-free guidance, e = e_null + scale * (e_label - e_null)."""

    cfg_scale: Annotated[float, Opt("Guidance; 1 is none, and twice as fast.", SAMPLING, ge=1)] = (
        1.0
    )
    cfg_channels: Annotated[
        Literal["3", "all"],
        Opt("Noise channels that are guided; published figures: 3.", SAMPLING),
    ] = "3"
    # arXiv 2404.07724
    cfg_interval: Annotated[
        tuple[int, int],
        Opt(
            "Guide where LO <= timestep < HI alone, of 0 to 1000.",
            SAMPLING,
            metavar="LO,HI",
            read=pair,
            expects="LO,HI, as 0,600",
        ),
    ] = (0, NUM_TRAIN_STEPS)

    def __post_init__(self) -> None:
        check_fields(self)
        low, high = self.cfg_interval
        if not 0 <= low < high <= NUM_TRAIN_STEPS:
            raise ConfigError(
                f"--cfg-interval {low},{high}: it must be LO,HI with "
                f"0 <= LO < HI <= {NUM_TRAIN_STEPS}"
            )

    def acts_at(self, timestep: int) -> bool:
        """Whether a step, by its original number, is guided."""
        low, high = self.cfg_interval
        return self.cfg_scale != 1 and low <= timestep < high


def spaced_timesteps(steps: str | int) -> list[int]:
    """Which of the 1000 steps a shorter chain keeps, ascending.

    Args:
        steps: "250" spreads 250 steps evenly from first to last; "10,15,20" does so in each of
            three equal sections; "ddim25" takes every 40th.

    Raises:
        ConfigError: no such chain exists.
    """
    text = str(steps)
    if text.startswith("ddim"):
        return _strided(text)
    counts = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    size, longer = divmod(NUM_TRAIN_STEPS, len(counts))
    sizes = [size + (number < longer) for number in range(len(counts))]
    fits = all(1 <= count <= size for count, size in zip(counts, sizes, strict=True))
    if not fits or sum(counts) < 2:
        raise ConfigError(
            f"--steps {text}: it must be 2 to {NUM_TRAIN_STEPS}, "
            "counts per section such as 10,15,20, or ddim25"
        )
    chosen, start = [], 0
    for count, size in zip(counts, sizes, strict=True):
        # The place is summed up, not multiplied: its rounding is part of the published chains.
        stride, place = (size - 1) / (count - 1) if count > 1 else 1.0, 0.0
        for _ in range(count):
            chosen.append(start + round(place))
            place += stride
        start += size
    return chosen


def _strided(text: str) -> list[int]:
    count = int(text[4:]) if text[4:].isdecimal() else 0
    for stride in range(1, NUM_TRAIN_STEPS // 2 + 1):
        if len(range(0, NUM_TRAIN_STEPS, stride)) == count:
            return list(range(0, NUM_TRAIN_STEPS, stride))
    raise ConfigError(
        f"--steps {text}: no whole stride through {NUM_TRAIN_STEPS} takes so many steps",
        f"use --steps {count}" if 1 < count <= NUM_TRAIN_STEPS else "for example ddim25 or ddim50",
    )
