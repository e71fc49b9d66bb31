"""How fast this machine multiplies matrices: the ceiling of every train step."""

from __future__ import annotations

import time

import torch

SIDE = {"cpu": 1024, "cuda": 8192}
SECONDS = 0.3


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations per second of square products, the best of a short while."""
    side = SIDE.get(device.type, 2048)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best, begun = float("inf"), time.perf_counter()
    a @ b  # the first one also sets up
    while best == float("inf") or time.perf_counter() - begun < SECONDS:
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
