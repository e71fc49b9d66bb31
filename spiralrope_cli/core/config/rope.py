"""What a Spiral RoPE is: the published options, checked. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from spiralrope_cli.core.errors import ConfigError

FREQS_FOR = ("lang", "pixel")
PROJECTIONS = ("clamped", "exact")
SCALINGS = ("interpolate", "extrapolate")
MIN_FREQ_IS_SET = 1e-6
"""`min_freq_lang` below this means "not given": the lowest frequency then follows from theta."""


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Options of Spiral RoPE (arXiv 2602.03227) under their published names.

    Attributes:
        enabled: False trains the baseline without rotary embedding.
        rotate: half the number of directions, K = 2 * rotate; 0 and 1 are plain axial RoPE.
        theta: ratio that spans the geometric series of the frequencies (`lang`).
        freqs_for: `lang`, a geometric series, or `pixel`, a linear one.
        max_freq: highest frequency of `pixel`, in half turns per unit.
        truncate_percentage: share of the lowest frequencies set to 0, in [0, 1).
        max_freq_lang: highest frequency of `lang`, in radians per patch.
        min_freq_lang: lowest frequency of `lang`, in radians per patch; 0 takes it from theta.
        same_theta: all directions share one short series instead of dealing out a long one.
        projection: `clamped` cuts projected positions off at the grid's border, as the
            published models were trained; `exact` is the paper's formula.
        scaling: `interpolate` squeezes a larger grid into the trained range of positions,
            `extrapolate` counts on.
    """

    enabled: bool = True
    rotate: int = 2
    theta: float = 10000.0
    freqs_for: str = "lang"
    max_freq: float = 10.0
    truncate_percentage: float = 0.0
    max_freq_lang: float = 1.5
    min_freq_lang: float = 0.0
    same_theta: bool = False
    projection: str = "clamped"
    scaling: str = "interpolate"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("freqs_for", FREQS_FOR),
            ("projection", PROJECTIONS),
            ("scaling", SCALINGS),
        ):
            if getattr(self, name) not in allowed:
                raise _refused(name, getattr(self, name), " or ".join(allowed))
        if self.rotate < 0:
            raise _refused("rotate", self.rotate, "0 or more; it is half the number of directions")
        if not 0 <= self.truncate_percentage < 1:
            raise _refused("truncate_percentage", self.truncate_percentage, "in [0, 1)")
        if not 1 < self.theta < math.inf:
            raise _refused("theta", self.theta, "above 1")
        if not 0 < self.max_freq < math.inf:
            raise _refused("max_freq", self.max_freq, "above 0")
        if not 0 < self.max_freq_lang < math.inf:
            raise _refused("max_freq_lang", self.max_freq_lang, "above 0")
        if not 0 <= self.min_freq_lang <= self.max_freq_lang:
            raise _refused(
                "min_freq_lang",
                self.min_freq_lang,
                f"between 0 and --max-freq-lang, which is {self.max_freq_lang}",
            )
        if self.freqs_for == "pixel" and self.same_theta and self.rotate >= 2:
            raise ConfigError(
                f"--same-theta with --freqs-for pixel and --rotate {self.rotate} does not exist",
                "use --freqs-for lang, or --no-same-theta",
            )

    @property
    def num_directions(self) -> int:
        """K, the directions in the plane: 2 for plain axial RoPE."""
        return 2 * max(self.rotate, 1)

    def check_head_dim(self, head_dim: int) -> None:
        """Refuses a head size that these options cannot rotate.

        Raises:
            ConfigError: head_dim is not a multiple of 4, or same_theta does not fit into it.
        """
        if not self.enabled:
            return
        if head_dim < 4 or head_dim % 4:
            raise ConfigError(f"head dimension {head_dim} is not a multiple of 4")
        if self.same_theta and self.rotate >= 1 and self.freqs_for == "lang":
            fits = [r for r in range(1, head_dim // 8 + 1) if head_dim % (8 * r) == 0]
            if self.rotate not in fits:
                raise ConfigError(
                    f"--rotate {self.rotate} with --same-theta does not fit heads of {head_dim} "
                    "channels: half of them over rotate must be divisible by 4",
                    f"use --no-same-theta, or --rotate {', '.join(map(str, fits)) or '0'}",
                )

    def inert_options(self, given: set[str]) -> list[tuple[str, str]]:
        """Which of the `given` field names cannot act, each with the reason."""
        lang, one = self.freqs_for == "lang", self.rotate <= 1
        min_given = self.min_freq_lang >= MIN_FREQ_IS_SET
        reasons = [
            ("theta", not lang, "--freqs-for is pixel"),
            ("theta", lang and self.rotate >= 1 and min_given, "--min-freq-lang is given"),
            ("max_freq", lang, "--freqs-for is lang"),
            ("max_freq_lang", not lang, "--freqs-for is pixel"),
            ("min_freq_lang", not lang, "--freqs-for is pixel"),
            ("min_freq_lang", lang and self.rotate == 0, "--rotate is 0"),
            ("truncate_percentage", not lang, "--freqs-for is pixel"),
            ("truncate_percentage", lang and self.rotate == 0, "--rotate is 0"),
            ("same_theta", self.same_theta and one, f"--rotate is {self.rotate}"),
            ("projection", one, f"--rotate is {self.rotate}, which never leaves the grid"),
        ]
        if not self.enabled:
            mine = {field.name for field in fields(self)} - {"enabled"}
            return [(name, "RoPE is off") for name in sorted(given & mine)]
        return [(name, why) for name, inert, why in reasons if inert and name in given]


def check_given(options: dict[str, Any]) -> None:
    """Refuses given options that cannot work whatever the weights say; the rest is theirs.

    Args:
        options: field name -> value.

    Raises:
        ConfigError: names the option and what is allowed.
    """
    together = {"same_theta", "max_freq_lang", "min_freq_lang"}
    RopeConfig(**{name: value for name, value in options.items() if name not in together})


def _refused(name: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"--{name.replace('_', '-')} is {value}; it must be {allowed}")
