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
    computed in float64: the distance can be a 100,000th of the means of kernels that it is the
    difference of, and one unit of float32 in those half a percent of it.

    Args:
        features: [N, D] float32.
        features2: [N2, D], of the other set.
        num_subsets: how often subsets are drawn.
        subset_size: M, at most N and N2.
        seed: of the draws.
    """
    draw = np.random.RandomState(seed)
    place = "cpu" if features.device.type == "mps" else features.device
    values = []
    for _ in range(num_subsets):
        x, y = (
            each[torch.from_numpy(draw.choice(len(each), subset_size, replace=False))].to(
                place, torch.float64
            )
            for each in (features, features2)
        )
        within = (_kernel_sum(x, x, diagonal=False) + _kernel_sum(y, y, diagonal=False)) / (
            subset_size * (subset_size - 1)
        )
        values.append(within - 2 * _kernel_sum(x, y) / subset_size**2)
    result = torch.stack(values)
    return result.mean().item(), result.std(correction=0).item()


def _kernel_sum(x: Tensor, y: Tensor, *, diagonal: bool = True) -> Tensor:
    """Sum over all pairs of rows."""
    kernel = (x @ y.T / x.shape[1] + 1) ** 3
    return kernel.sum() if diagonal else kernel.sum() - kernel.diagonal().sum()
