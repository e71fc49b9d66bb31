"""Random numbers that belong to a (seed, purpose, step or index), never to a process."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence

import numpy as np
import torch


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed that is the same on every machine for the same parts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_for(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by the parts."""
    return torch.Generator().manual_seed(seed_for(*parts))


def seed_everything(*parts: int | str) -> None:
    """Seeds torch, numpy and random, for library code that draws from the global ones."""
    seed = seed_for(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # timm draws from the global state
    torch.manual_seed(seed)


def drawn_class(seed: int, num_classes: int, index: int) -> int:
    """The class of a sampled image if none was asked for."""
    return int(torch.randint(num_classes, (), generator=generator_for(seed, "label", index)))


class NoisePerImage:
    """Normal noise of a batch in which every image has its own generator.

    The noise of image i follows from (seed, purpose, i), whatever the batch and the process it is
    in. Each draw advances the generators: the first one starts a trajectory, the next ones are its
    steps. It is drawn on the CPU, so that it is the same on all devices.
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
