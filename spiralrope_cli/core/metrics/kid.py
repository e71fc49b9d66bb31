"""Kernel Inception Distance, arXiv 1801.01401.

Legend: N images, D features, M images per subset.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def kernel_distance(
    features: Tensor, features2: Tensor, *, num_subsets: int, subset_size: int, seed: int
) -> tuple[float, float]:
    """Mean and standard deviation of the unbiased squared MMD over random subsets.

    The kernel is (x·y / D + 1)³. For the same seed the subsets are those of torch-fidelity.
    Computed in float64: the result is a difference of means that can be 100,000 times larger; in
    float32 their rounding would be half a percent of it.

    Args:
        features: [N, D] float32.
        features2: [N2, D] float32, of the other set.
        num_subsets: number of subsets.
        subset_size: M, at most N and N2.
        seed: seed of the subsets.
    """
    draw = np.random.RandomState(seed)
    place = "cpu" if features.device.type == "mps" else features.device
    # Buffers for all subsets: allocating them anew fragments half a gigabyte of memory.
    columns = (features.shape[1], features.shape[1], subset_size)
    x, y, kernel = (torch.empty(subset_size, n, dtype=torch.float64, device=place) for n in columns)
    values = []
    for _ in range(num_subsets):
        for part, each in ((x, features), (y, features2)):
            chosen = draw.choice(len(each), subset_size, replace=False)
            part.copy_(each[torch.from_numpy(chosen)])
        within = sum(_kernel_sum(part, part, kernel, diagonal=False) for part in (x, y))
        across = _kernel_sum(x, y, kernel)
        values.append(within / (subset_size * (subset_size - 1)) - 2 * across / subset_size**2)
    result = torch.stack(values)
    return result.mean().item(), result.std(correction=0).item()


def _kernel_sum(x: Tensor, y: Tensor, kernel: Tensor, *, diagonal: bool = True) -> Tensor:
    """Sum of the kernel over all pairs of rows; `kernel` is a buffer [M, M]."""
    torch.mm(x, y.T, out=kernel).div_(x.shape[1]).add_(1).pow_(3)
    return kernel.sum() if diagonal else kernel.sum() - kernel.diagonal().sum()
