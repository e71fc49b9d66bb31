"""Sizes of the networks, one row each. Standard library only."""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

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


def deit_size(arch: str) -> TransformerSize:
    """Size of a DeiT by name, or by numbers: `deit-256x8x4` is WIDTHxDEPTHxHEADS.

    Raises:
        ConfigError: no such architecture; the nearest name is suggested.
    """
    if numbers := re.fullmatch(r"deit-(\d+)x(\d+)x(\d+)", arch):
        size = TransformerSize(*map(int, numbers.groups()))
        if min(size) < 1 or size.dim % size.heads:
            raise ConfigError(
                f"--arch {arch}: a width of {size.dim} does not split into {size.heads} heads "
                f"in {size.depth} blocks"
            )
        return size
    if arch not in DEIT_SIZES:
        near = difflib.get_close_matches(arch.lower(), DEIT_SIZES, n=1, cutoff=0.5)
        guess = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"--arch {arch} is not known", f"{guess}there are {', '.join(DEIT_SIZES)}"
        )
    return DEIT_SIZES[arch]


def deit_name(size: TransformerSize) -> str:
    """The `--arch` of a size, which `deit_size` reads back."""
    named = {known: name for name, known in DEIT_SIZES.items()}
    return named.get(size, f"deit-{size.dim}x{size.depth}x{size.heads}")


def check_divides(image_size: tuple[int, int], patch_size: int) -> None:
    """Refuses an image size that does not split into whole patches.

    Raises:
        ConfigError: a side is not a multiple of the patch, or not positive.
    """
    for side in image_size:
        if patch_size < 1 or side < patch_size or side % patch_size:
            near = max(1, round(side / patch_size)) * patch_size if patch_size >= 1 else 0
            raise ConfigError(
                f"--image-size {side} is not a multiple of --patch-size {patch_size}",
                f"the nearest that is: {near}" if near else "--patch-size must be 1 or more",
            )
