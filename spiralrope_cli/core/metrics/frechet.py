"""Fréchet distance between two Gaussians, the FID's.

Legend: D features, R rank.
"""

from __future__ import annotations

import torch
from scipy.linalg.lapack import dpstrf
from torch import Tensor

LEFT_OVER = 1e-9
"""Share of the variance that a factorisation may miss."""


def frechet_distance(mean: Tensor, covariance: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """|μ1−μ2|² + tr Σ1 + tr Σ2 − 2 tr (Σ1Σ2)^½, arXiv 1706.08500, equation 6.

    With any root Σ1 = AAᵀ the product Σ1Σ2 has the eigenvalues of AᵀΣ2A besides zeros. That matrix
    is symmetric and has no negative ones, so no root of a matrix is ever formed, and nothing can
    become complex.

    Args:
        mean: [D] finite.
        covariance: [D, D] finite, symmetric, without negative eigenvalues beyond rounding.
        mean2: of the other one.
        covariance2: of the other one.

    Returns:
        the distance, squared as the field reports it; what rounding makes negative is 0.
    """
    mean, mean2, first, second = (
        part.to("cpu", torch.float64) for part in (mean, mean2, covariance, covariance2)
    )
    root, other = _root(first), second
    if root.shape[1] == len(first) and (root2 := _root(second)).shape[1] < len(first):
        root, other = root2, first
    eigenvalues = torch.linalg.eigvalsh(root.T @ other @ root)
    trace_of_root = eigenvalues.clamp_min(0).sqrt().sum()
    apart = mean - mean2
    distance = apart @ apart + first.trace() + second.trace() - 2 * trace_of_root
    return max(distance.item(), 0.0)


def _root(covariance: Tensor) -> Tensor:
    """[D, R] whose product with its transpose is the covariance [D, D] of rank R."""
    # Cholesky with pivots stops by itself where nothing but rounding is left.
    factor, order, rank, _ = dpstrf(covariance.numpy(), lower=1)
    root = torch.empty(len(covariance), rank, dtype=covariance.dtype)
    root[torch.from_numpy(order).long() - 1] = torch.from_numpy(factor).tril()[:, :rank]
    if (covariance.trace() - root.square().sum()).abs() <= LEFT_OVER * covariance.trace():
        return root
    # Coarser rounding, as of float32, made negative eigenvalues, which Cholesky cannot pass over.
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt()
