"""Random numbers as functions of (seed, purpose, step or index), the same for any process."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence

import numpy as np
import torch

CPU = torch.device("cpu")


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed: a hash of the parts, the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_for(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by the parts."""
    return torch.Generator().manual_seed(seed_for(*parts))


def seed_everything(*parts: int | str, device: torch.device = CPU) -> None:
    """Seeds the global generators of random, numpy and torch, for library code that uses them.

    Of torch, those of the CPU and of `device`: `torch.manual_seed` looks for every kind of device,
    which takes 0.2 ms, as long as the decoding of a few rows of an image.
    """
    seed = seed_for(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # timm uses numpy's global generator
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device != CPU:
        torch.manual_seed(seed)


def drawn_class(seed: int, num_classes: int, index: int) -> int:
    """The random class of a sampled image, if `--classes` is not given."""
    return int(torch.randint(num_classes, (), generator=generator_for(seed, "label", index)))


class NoisePerImage:
    """Standard normal noise for a batch, with one generator per image.

    The noise of image i depends on (seed, purpose, i) only, not on its batch or process. The first
    call gives the initial noise, the next ones that of each step. The generators are on the CPU,
    so that the noise is the same for all devices.
    """

    def __init__(
        self,
        seed: int,
        indices: Iterable[int],
        shape: Sequence[int],
        device: torch.device,
        purpose: str = "image",
    ) -> None:
        self._generators = [generator_for(seed, purpose, index) for index in indices]
        self._shape, self._device = tuple(shape), device

    def draw(self) -> torch.Tensor:
        """[B, *shape] float32."""
        size = (len(self._generators), *self._shape)
        noise = torch.empty(size, pin_memory=self._device.type == "cuda")
        for row, generator in zip(noise, self._generators, strict=True):
            row.normal_(generator=generator)
        return noise.to(self._device, non_blocking=True)
