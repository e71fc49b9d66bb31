"""Sizes of the networks, one row each. Standard library only."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from spiralrope_cli.core.errors import ConfigError


class TransformerSize(NamedTuple):
    """Width, depth and heads of a transformer."""

    dim: int
    depth: int
    heads: int

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.dim // self.heads


DEIT_SIZES = {
    "deit-ti": TransformerSize(192, 12, 3),
    "deit-s": TransformerSize(384, 12, 6),
    "deit-b": TransformerSize(768, 12, 12),
    "deit-l": TransformerSize(1024, 24, 16),
}


class DiTSize(NamedTuple):
    """Width, depth, heads and patch side of a diffusion transformer."""

    dim: int
    depth: int
    heads: int
    patch_size: int

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.dim // self.heads


DIT_SIZES = {
    "dit-ti2": DiTSize(192, 12, 3, 2),
    "dit-ti4": DiTSize(192, 12, 3, 4),
    "dit-s2": DiTSize(384, 12, 6, 2),
    "dit-s4": DiTSize(384, 12, 6, 4),
    "dit-s8": DiTSize(384, 12, 6, 8),
    "dit-b2": DiTSize(768, 12, 12, 2),
    "dit-b4": DiTSize(768, 12, 12, 4),
    "dit-b8": DiTSize(768, 12, 12, 8),
    "dit-l2": DiTSize(1024, 24, 16, 2),
    "dit-l4": DiTSize(1024, 24, 16, 4),
    "dit-l8": DiTSize(1024, 24, 16, 8),
    "dit-xl2": DiTSize(1152, 28, 16, 2),
    "dit-xl4": DiTSize(1152, 28, 16, 4),
    "dit-xl8": DiTSize(1152, 28, 16, 8),
}


def deit_size(arch: str) -> TransformerSize:
    """Size of a DeiT by name, or by numbers: `deit-256x8x4` is WIDTHxDEPTHxHEADS.

    Raises:
        ConfigError: no such architecture; the nearest name is suggested.
    """
    if numbers := re.fullmatch(r"deit-(\d+)x(\d+)x(\d+)", arch):
        size = TransformerSize(*map(int, numbers.groups()))
        _check_heads(arch, size)
        return size
    if arch not in DEIT_SIZES:
        raise _unknown(arch, DEIT_SIZES)
    return DEIT_SIZES[arch]


def deit_name(size: TransformerSize) -> str:
    """The `--arch` of a size, which `deit_size` reads back."""
    named = {known: name for name, known in DEIT_SIZES.items()}
    return named.get(size, f"deit-{size.dim}x{size.depth}x{size.heads}")


def dit_size(arch: str) -> DiTSize:
    """Size of a DiT by name, or by numbers: `dit-256x8x4-2` ends with the patch side.

    `DiT-B/4`, as the papers write it, and `dit-b4` are the same.

    Raises:
        ConfigError: no such architecture; the nearest name is suggested.
    """
    if numbers := re.fullmatch(r"dit-(\d+)x(\d+)x(\d+)[-/](\d+)", arch.lower()):
        size = DiTSize(*map(int, numbers.groups()))
        _check_heads(arch, size)
        return size
    name = arch.lower().replace("/", "")
    if name not in DIT_SIZES:
        raise _unknown(arch, DIT_SIZES)
    return DIT_SIZES[name]


def dit_name(size: DiTSize | str) -> str:
    """Our name of a DiT by its size, or by a name that people may write otherwise.

    Raises:
        ConfigError: no such architecture; the nearest name is suggested.
    """
    size = dit_size(size) if isinstance(size, str) else size
    named = {known: name for name, known in DIT_SIZES.items()}
    return named.get(size, f"dit-{size.dim}x{size.depth}x{size.heads}-{size.patch_size}")


def is_dit(arch: str) -> bool:
    """Whether a name is meant as that of a DiT, known or not; else it is a DeiT's."""
    return arch.lower().startswith("dit")


def _check_heads(arch: str, size: TransformerSize | DiTSize) -> None:
    if min(size) < 1 or size.dim % size.heads:
        raise ConfigError(
            f"--arch {arch}: {size.depth} blocks of width {size.dim} with {size.heads} heads "
            "do not exist",
            "the width must be a multiple of the heads, and nothing 0",
        )


def _unknown(arch: str, sizes: Collection[str]) -> ConfigError:
    near = difflib.get_close_matches(arch.lower().replace("/", ""), sizes, n=1, cutoff=0.5)
    guess = f"did you mean {near[0]}? " if near else ""
    return ConfigError(f"--arch {arch} is not known", f"{guess}there are {', '.join(sizes)}")


def check_divides(image_size: tuple[int, int], patch_size: int) -> None:
    """Refuses an image size that does not split into whole patches.

    Raises:
        ConfigError: a side is not a multiple of the patch, or not positive.
    """
    for side in image_size:
        if patch_size < 1 or side < patch_size or side % patch_size:
            near = max(1, round(side / patch_size)) * patch_size if patch_size >= 1 else 0
            raise ConfigError(
                f"--image-size {side} is not a multiple of the patch size, {patch_size}",
                f"the nearest that is: {near}" if near else "--patch-size must be 1 or more",
            )


def size(text: str) -> tuple[int, int]:
    """`224` or `224x448` (height x width) as (height, width)."""
    found = re.fullmatch(r"(\d+)(?:[xX](\d+))?", text.strip())
    if not found:
        raise ValueError
    return int(found[1]), int(found[2] or found[1])


def format_size(size: Sequence[int]) -> str:
    """(height, width) as `size` reads it: `224`, or `224x448`."""
    height, width = size
    return str(height) if height == width else f"{height}x{width}"


SIZE: dict[str, Any] = {
    **{"metavar": "N|HxW", "read": size},
    "expects": "a side, as 224, or HxW, as 224x448",
}
"""What options of a size have in common."""
