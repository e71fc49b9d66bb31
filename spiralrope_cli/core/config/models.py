"""Sizes of networks by name, and options of Spiral RoPE. Standard library only."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

from spiralrope_cli.core.config.option import Opt, check_fields, leaves, option
from spiralrope_cli.core.errors import ConfigError


class TransformerSize(NamedTuple):
    """Width, depth and heads of a transformer; of a DiT the patch side too."""

    dim: int
    depth: int
    heads: int
    patch_size: int = 0

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


DEIT_SIZES = {
    "deit-ti": TransformerSize(192, 12, 3),
    "deit-s": TransformerSize(384, 12, 6),
    "deit-b": TransformerSize(768, 12, 12),
    "deit-l": TransformerSize(1024, 24, 16),
}

DIT_SIZES = {
    "dit-ti2": TransformerSize(192, 12, 3, 2),
    "dit-ti4": TransformerSize(192, 12, 3, 4),
    "dit-s2": TransformerSize(384, 12, 6, 2),
    "dit-s4": TransformerSize(384, 12, 6, 4),
    "dit-s8": TransformerSize(384, 12, 6, 8),
    "dit-b2": TransformerSize(768, 12, 12, 2),
    "dit-b4": TransformerSize(768, 12, 12, 4),
    "dit-b8": TransformerSize(768, 12, 12, 8),
    "dit-l2": TransformerSize(1024, 24, 16, 2),
    "dit-l4": TransformerSize(1024, 24, 16, 4),
    "dit-l8": TransformerSize(1024, 24, 16, 8),
    "dit-xl2": TransformerSize(1152, 28, 16, 2),
    "dit-xl4": TransformerSize(1152, 28, 16, 4),
    "dit-xl8": TransformerSize(1152, 28, 16, 8),
}


MOST_BLOCKS = 1000


def deit_size(arch: str) -> TransformerSize:
    """Size of a DeiT by name, or by numbers: `deit-256x8x4` is WIDTHxDEPTHxHEADS."""
    return _size(arch, r"deit-(\d+)x(\d+)x(\d+)", DEIT_SIZES)


def dit_size(arch: str) -> TransformerSize:
    """Size of a DiT by name, or by numbers: `dit-256x8x4-2` is WIDTHxDEPTHxHEADS-PATCH.

    `DiT-B/4`, as papers write it, is the same as `dit-b4`.
    """
    return _size(arch, r"dit-(\d+)x(\d+)x(\d+)[-/](\d+)", DIT_SIZES)


def is_dit(arch: str) -> bool:
    """Whether a name begins like that of a DiT, known or not; else it is a DeiT."""
    return arch.lower().startswith("dit")


def size_of(arch: str) -> TransformerSize:
    """Size of a DeiT or DiT; for an unknown name the error suggests the nearest."""
    return dit_size(arch) if is_dit(arch) else deit_size(arch)


def arch_name(of: str | TransformerSize) -> str:
    """The name of an architecture, as we write it, from any spelling or its size."""
    size = size_of(of) if isinstance(of, str) else of
    named = {known: name for name, known in (DEIT_SIZES | DIT_SIZES).items()}
    numbers = f"{size.dim}x{size.depth}x{size.heads}"
    by_numbers = f"dit-{numbers}-{size.patch_size}" if size.patch_size else f"deit-{numbers}"
    return named.get(size, by_numbers)


ARCH_OF_SOURCE = Opt(
    "Architecture of SOURCE, if its number of heads is unknown: deit-WIDTHxDEPTHxHEADS or "
    "dit-WIDTHxDEPTHxHEADS-PATCH.",
    "Model",
    metavar="NAME",
    complete="archs",
    read=arch_name,
    expects="a name as deit-s, or deit-WIDTHxDEPTHxHEADS or dit-WIDTHxDEPTHxHEADS-PATCH",
)


def _size(arch: str, numbers: str, sizes: Mapping[str, TransformerSize]) -> TransformerSize:
    """The size of `arch`; `numbers` is the pattern of a size by numbers."""
    name = arch.lower() if sizes is DIT_SIZES else arch
    if not (found := re.fullmatch(numbers, name)):
        name = name.replace("/", "")
        if name not in sizes:
            raise _unknown(arch, sizes)
        return sizes[name]
    size = TransformerSize(*map(int, found.groups()))
    if min(map(int, found.groups())) < 1 or size.dim % size.heads or size.depth > MOST_BLOCKS:
        raise ConfigError(
            f"--arch {arch}: {size.depth} blocks of width {size.dim} with {size.heads} heads "
            "are not possible",
            "the width must be a multiple of the number of heads, no number may be 0, and at most "
            f"{MOST_BLOCKS} blocks are allowed",
        )
    return size


def _unknown(arch: str, sizes: Collection[str]) -> ConfigError:
    other, trains = (
        ("DiT", "dit-train or run dit") if sizes is DEIT_SIZES else ("DeiT", "pretrain or run deit")
    )
    if arch.lower().startswith(f"{other.lower()}-"):
        return ConfigError(f"--arch {arch} is a {other}", f"use spiralrope {trains}")
    near = difflib.get_close_matches(arch.lower().replace("/", ""), sizes, n=1, cutoff=0.5)
    guess = f"did you mean {near[0]}? " if near else ""
    numbers = "deit-WIDTHxDEPTHxHEADS" if sizes is DEIT_SIZES else "dit-WIDTHxDEPTHxHEADS-PATCH"
    return ConfigError(
        f"--arch {arch} is unknown", f"{guess}known: {', '.join(sizes)}, or by numbers: {numbers}"
    )


def size(text: str) -> tuple[int, int]:
    """`224` or `224x448` (height x width) as (height, width)."""
    found = re.fullmatch(r"(\d+)(?:[xX](\d+))?", text.strip())
    if not found:
        raise ValueError
    return int(found[1]), int(found[2] or found[1])


def numbers(text: str) -> tuple[int, ...]:
    """`207,88` -> (207, 88)."""
    if not re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", text):
        raise ValueError
    return tuple(int(number) for number in text.split(","))


def pair(text: str) -> tuple[int, ...]:
    """`0,600` -> (0, 600)."""
    if len(found := numbers(text)) != 2:
        raise ValueError
    return found


def format_size(size: Sequence[int]) -> str:
    """(height, width) as `size` reads it: `224`, or `224x448`."""
    height, width = size
    return str(height) if height == width else f"{height}x{width}"


SIZE: dict[str, Any] = {
    **{"metavar": "N|HxW", "read": size},
    "expects": "a side, as 224, or HxW, as 224x448",
}
"""Common arguments of `Opt` for sizes."""

# --- Options of Spiral RoPE

Scaling = Literal["interpolate", "extrapolate"]
MIN_FREQ_IS_SET = 1e-6
"""`min_freq_lang` below this means "not given": the lowest frequency then follows from theta."""


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Options of Spiral RoPE (arXiv 2602.03227), with their published names."""

    panel = "Spiral RoPE"
    enabled: bool = option(
        "Use the rotary embedding; `enabled` in YAML.", flag="--rope/--no-rope", default=True
    )
    rope_kind: Literal["spiral", "axial", "mixed"] = option(
        "Kind of RoPE; mixed: learned frequencies for each head and block.", default="spiral"
    )
    rotate: int = option(
        "Half the number of directions, K = 2 * rotate; 0 and 1 are plain axial RoPE.",
        ge=0,
        expects="a whole number, 0 or more; it is half the number of directions",
        default=2,
    )
    theta: float = option(
        "Base of the geometric series of frequencies (lang).", gt=1, default=10000.0
    )
    freqs_for: Literal["lang", "pixel"] = option(
        "Series of frequencies: geometric (lang) or linear (pixel).", default="lang"
    )
    max_freq: float = option(
        "Highest frequency (pixel), in units of pi/2 radians per patch.", gt=0, default=10.0
    )
    truncate_percentage: float = option(
        "Fraction of the lowest frequencies set to 0, in [0, 1).", ge=0, lt=1, default=0.0
    )
    max_freq_lang: float = option(
        "Highest frequency in radians per patch (lang).", gt=0, default=1.5
    )
    min_freq_lang: float = option(
        "Lowest frequency in radians per patch (lang); 0: from theta.", default=0.0
    )
    same_theta: bool = option(
        "Use the same, shorter series of frequencies for all directions.",
        flag="--same-theta/--no-same-theta",
        default=False,
    )
    projection: Literal["clamped", "exact"] = option(
        "Clamp positions to the grid, as in the published models, or not, as in the paper.",
        default="clamped",
    )
    scaling: Scaling = option(
        "Positions on other grids: interpolate into the trained range, or extrapolate.",
        default="interpolate",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rope_kind != "spiral":  # so that equal networks are equal
            if self.rotate != RopeConfig.rotate:
                check_rotate({"rotate": self.rotate}, self.rope_kind)
            object.__setattr__(self, "rotate", 0)
        if not 0 <= self.min_freq_lang <= self.max_freq_lang:
            raise ConfigError(
                f"--min-freq-lang is {self.min_freq_lang}; it must be between 0 and "
                f"--max-freq-lang, which is {self.max_freq_lang}"
            )
        if self.freqs_for == "pixel" and self.same_theta and self.rotate >= 2:
            raise ConfigError(
                f"--same-theta with --freqs-for pixel and --rotate {self.rotate} is not possible",
                "use --freqs-for lang, or --no-same-theta",
            )

    @property
    def num_directions(self) -> int:
        """K, the number of directions in the image plane; 2 for plain axial RoPE."""
        return 2 * max(self.rotate, 1)

    def check_head_dim(self, head_dim: int) -> None:
        """Raises `ConfigError` if head_dim is not a multiple of 4, or does not fit same_theta."""
        if not self.enabled:
            return
        if head_dim < 4 or head_dim % 4:
            raise ConfigError(f"head dimension {head_dim} is not a multiple of 4")
        if self.same_theta and self.rotate >= 1 and self.freqs_for == "lang":
            fits = [r for r in range(1, head_dim // 8 + 1) if head_dim % (8 * r) == 0]
            if self.rotate not in fits:
                raise ConfigError(
                    f"--rotate {self.rotate} with --same-theta does not fit heads of {head_dim} "
                    "channels: channels / (2 * rotate) must be a multiple of 4",
                    f"use --no-same-theta, or --rotate {', '.join(map(str, fits)) or '0'}",
                )

    @property
    def mixed(self) -> bool:
        """Whether the network learns its frequencies (RoPE-Mixed, arXiv 2403.13298)."""
        return self.enabled and self.rope_kind == "mixed"

    def inert_options(self, given: set[str]) -> list[tuple[str, str]]:
        """The `given` fields that have no effect, with the reason."""
        lang, one, spiral = self.freqs_for == "lang", self.rotate <= 1, self.rope_kind == "spiral"
        kind = f"--rotate is {self.rotate}" if spiral else f"--rope-kind is {self.rope_kind}"
        min_given = self.min_freq_lang >= MIN_FREQ_IS_SET
        reasons = [
            ("theta", not lang, "--freqs-for is pixel"),
            ("theta", lang and self.rotate >= 1 and min_given, "--min-freq-lang is given"),
            ("max_freq", lang, "--freqs-for is lang"),
            ("max_freq_lang", not lang, "--freqs-for is pixel"),
            ("min_freq_lang", not lang, "--freqs-for is pixel"),
            ("min_freq_lang", lang and self.rotate == 0, kind),
            ("truncate_percentage", not lang, "--freqs-for is pixel"),
            ("truncate_percentage", lang and self.rotate == 0, kind),
            ("same_theta", self.same_theta and one, kind),
            ("projection", one, f"with {kind.replace(' is', '')} no position is outside the grid"),
            ("rotate", not spiral, kind),
        ]
        mine = {field.name for field in fields(self)} - {"enabled"}
        if not self.enabled:
            return [(name, "RoPE is off") for name in sorted(given & mine)]
        if self.mixed:
            return [(name, kind) for name in sorted(given & mine - {"rope_kind", "scaling"})]
        return [(name, why) for name, inert, why in reasons if inert and name in given]

    @property
    def name(self) -> str:
        """`rotate N`, the kind, or `no RoPE`."""
        if not self.enabled:
            return "no RoPE"
        return f"rotate {self.rotate}" if self.rope_kind == "spiral" else self.rope_kind

    @property
    def summary(self) -> str:
        """Directions and series, for the plan."""
        if self.mixed:
            return f"mixed: learned frequencies per head and block; {self.scaling}"
        between = f"every {180 / self.num_directions:g} degrees"
        return (
            f"{self.name}: K = {self.num_directions} directions, {between}; "
            f"{self.freqs_for}, {self.projection}, {self.scaling}"
        )


RopeConfig.__doc__ = f"{RopeConfig.__doc__}\n\nAttributes:\n" + "\n".join(
    f"    {name} ({opt.default!r}): {opt.help}" for name, opt in leaves(RopeConfig).items()
)
BY_WEIGHTS = dict.fromkeys(RopeConfig.__dataclass_fields__, "")
"""Defaults in the help of commands where the weights decide: none."""


def given_rope(given: dict[str, Any]) -> dict[str, Any]:
    """The RoPE options among the given ones (field name -> value), checked."""
    chosen = {name: given[name] for name in RopeConfig.__dataclass_fields__ if name in given}
    # These are valid or not depending on others, which may come from the weights.
    together = {"same_theta", "max_freq_lang", "min_freq_lang"}
    RopeConfig(**{name: value for name, value in chosen.items() if name not in together})
    check_rotate(chosen, chosen.get("rope_kind", RopeConfig.rope_kind))
    return chosen


def check_rotate(given: dict[str, Any], kind: str) -> None:
    """Raises if `rotate` is given for a kind that has no choice of directions."""
    if kind != "spiral" and given.get("rotate", 0) > 1:
        raise ConfigError(
            f"--rotate {given['rotate']} does not fit --rope-kind {kind}",
            "leave --rotate out, or use --rope-kind spiral",
        )


def override_rope(trained: RopeConfig, given: dict[str, Any]) -> RopeConfig:
    """The RoPE options of weights with those of the user (field name -> value)."""
    kind = given.get("rope_kind", trained.rope_kind)
    check_rotate(given, kind)
    if {kind, trained.rope_kind} != {"spiral"}:
        given = {"rotate": RopeConfig.rotate, **given}  # that of the weights says nothing
    return replace(trained, **given)
