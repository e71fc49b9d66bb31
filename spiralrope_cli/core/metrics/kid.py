"""Kernel Inception Distance, arXiv 1801.01401.

Legend: N images, D features, M images of a subset.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def kernel_distance(
    features: Tensor, features2: Tensor, *, num_subsets: int, subset_size: int, seed: int
) -> tuple[float, float]:
    """Mean and standard deviation, over subsets, of the unbiased squared MMD.

    The kernel is (x·y / D + 1)³. The subsets are those of torch-fidelity for the same seed. All is
    in float64: the distance can be 100,000 times smaller than the means of kernels whose difference
    it is; in float32 their rounding alone would be half a percent of it.

    Args:
        features: [N, D] float32.
        features2: [N2, D], of the other set.
        num_subsets: number of draws.
        subset_size: M, at most N and N2.
        seed: of the draws.
    """
    draw = np.random.RandomState(seed)
    place = "cpu" if features.device.type == "mps" else features.device
    # All subsets use the same memory: new memory each time would leave half a gigabyte of holes.
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
    """Sum over all pairs of rows; [M, M] of memory is handed in."""
    torch.mm(x, y.T, out=kernel).div_(x.shape[1]).add_(1).pow_(3)
    return kernel.sum() if diagonal else kernel.sum() - kernel.diagonal().sum()
