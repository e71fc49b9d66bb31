"""What a Spiral RoPE is: the published options, checked. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from spiralrope_cli.core.config.option import ROPE, Opt, check_fields, document
from spiralrope_cli.core.errors import ConfigError

Scaling = Literal["interpolate", "extrapolate"]
MIN_FREQ_IS_SET = 1e-6
"""`min_freq_lang` below this means "not given": the lowest frequency then follows from theta."""


@document
@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Options of Spiral RoPE (arXiv 2602.03227) under their published names."""

    enabled: Annotated[
        bool, Opt("Rotary embedding, or none; `enabled` in YAML.", ROPE, flag="--rope/--no-rope")
    ] = True
    rotate: Annotated[
        int,
        Opt(
            "Half the number of directions, K = 2 * rotate; 0 and 1 are plain axial RoPE.",
            ROPE,
            ge=0,
            expects="a whole number, 0 or more; it is half the number of directions",
        ),
    ] = 2
    theta: Annotated[
        float, Opt("Ratio that spans the geometric series of frequencies (lang).", ROPE, gt=1)
    ] = 10000.0
    freqs_for: Annotated[
        Literal["lang", "pixel"], Opt("Geometric or linear series of frequencies.", ROPE)
    ] = "lang"
    max_freq: Annotated[
        float, Opt("Highest frequency (pixel), in half turns per unit.", ROPE, gt=0)
    ] = 10.0
    truncate_percentage: Annotated[
        float, Opt("Fraction of the lowest frequencies set to 0, in [0, 1).", ROPE, ge=0, lt=1)
    ] = 0.0
    max_freq_lang: Annotated[
        float, Opt("Highest frequency in radians per patch (lang).", ROPE, gt=0)
    ] = 1.5
    min_freq_lang: Annotated[
        float, Opt("Lowest frequency (lang); 0 takes it from theta.", ROPE)
    ] = 0.0
    same_theta: Annotated[
        bool,
        Opt(
            "All directions share one short series of frequencies.",
            ROPE,
            flag="--same-theta/--no-same-theta",
        ),
    ] = False
    projection: Annotated[
        Literal["clamped", "exact"],
        Opt(
            "Positions clamped to the grid, as in the published models, or the paper's formula.",
            ROPE,
        ),
    ] = "clamped"
    scaling: Annotated[
        Scaling,
        Opt("Positions on larger grids: interpolated to the trained range, or extrapolated.", ROPE),
    ] = "interpolate"

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.min_freq_lang <= self.max_freq_lang:
            raise ConfigError(
                f"--min-freq-lang is {self.min_freq_lang}; it must be between 0 and "
                f"--max-freq-lang, which is {self.max_freq_lang}"
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

    @property
    def summary(self) -> str:
        """Directions and how they are fed, in words."""
        between = f"every {180 / self.num_directions:g} degrees"
        return (
            f"rotate {self.rotate}: K = {self.num_directions} directions, {between}; "
            f"{self.freqs_for}, {self.projection}, {self.scaling}"
        )


BY_WEIGHTS = dict.fromkeys(RopeConfig.__dataclass_fields__, "")
"""What the help shows as defaults where the weights decide: nothing."""


def given_rope(given: dict[str, Any]) -> dict[str, Any]:
    """The RoPE options among those that the user gave, refused where no weights could have them.

    Args:
        given: field name -> value.

    Raises:
        ConfigError: names the option and what is allowed.
    """
    chosen = {name: given[name] for name in RopeConfig.__dataclass_fields__ if name in given}
    together = {"same_theta", "max_freq_lang", "min_freq_lang"}  # the weights may say the other one
    RopeConfig(**{name: value for name, value in chosen.items() if name not in together})
    return chosen
