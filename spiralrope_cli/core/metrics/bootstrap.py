"""How far the FID would move with other samples.

Legend: N images, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spiralrope_cli.core.metrics.frechet import frechet_distance
from spiralrope_cli.core.runtime.seeds import generator_for

BLOCK = 4096


def fid_spread(
    features: Tensor, mean: Tensor, covariance: Tensor, *, times: int, seed: int
) -> float:
    """Standard deviation of the FID over samples drawn anew with replacement.

    Their mean would mislead: a set with repetitions has fewer images, and so a larger FID.

    Args:
        features: [N, D] of the samples.
        mean: [D] of the reference.
        covariance: [D, D] of the reference.
        times: how often the samples are drawn.
        seed: of the draws.
    """
    values = []
    for number in range(times):
        draw = torch.randint(
            len(features), (len(features),), generator=generator_for(seed, "bootstrap", number)
        )
        weights = torch.bincount(draw, minlength=len(features)).double()
        values.append(frechet_distance(*_weighted(features, weights), mean, covariance))
    return torch.tensor(values, dtype=torch.float64).std().item()


def _weighted(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of rows that occur `weights` [N] times each."""
    weights = weights.to(features.device)[:, None]
    total = weights.sum()
    mean = features.new_zeros(features.shape[1], dtype=torch.float64)
    for rows, some in zip(features.split(BLOCK), weights.split(BLOCK), strict=True):
        mean += (rows * some).sum(0) / total
    products = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=mean.device)
    for rows, some in zip(features.split(BLOCK), weights.split(BLOCK), strict=True):
        apart = rows - mean
        products.addmm_((apart * some).T, apart)
    return mean, products / (total - 1)
