"""Sizes of the networks, one row each. Standard library only."""

from __future__ import annotations

import difflib
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
    """Size of a DeiT by name.

    Raises:
        ConfigError: no such architecture; the nearest name is suggested.
    """
    if arch not in DEIT_SIZES:
        near = difflib.get_close_matches(arch.lower(), DEIT_SIZES, n=1, cutoff=0.5)
        guess = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"--arch {arch} is not known", f"{guess}there are {', '.join(DEIT_SIZES)}"
        )
    return DEIT_SIZES[arch]


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
