"""Random numbers that belong to a (seed, purpose, step or index), never to a process."""

from __future__ import annotations

import hashlib
import random

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
