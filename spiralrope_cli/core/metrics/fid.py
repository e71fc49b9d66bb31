"""FID: mean and covariance of features in batches, the Fréchet distance, its error bar.

Legend: B batch, N images, D features, R rank.
"""

from __future__ import annotations

import torch
from scipy.linalg.lapack import dpstrf
from torch import Tensor

from spiralrope_cli.core.runtime import distributed
from spiralrope_cli.core.runtime.seeds import generator_for

LEFT_OVER = 1e-9
"""Fraction of the variance that a factorisation may miss."""
BLOCK = 4096
"""Rows at a time of a resampled set."""


class Moments:
    """Count, mean [D] and centred sum of products [D, D] of all rows seen so far, in float64.

    Updated batch by batch and merged over processes by the formulas of Chan, Golub and LeVeque
    (1979), which never subtract two large sums.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        place = torch.device("cpu") if device.type == "mps" else device  # MPS lacks float64
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64, device=place)
        self.products = torch.zeros(size, size, dtype=torch.float64, device=place)

    def add(self, features: Tensor) -> None:
        """Takes in rows [B, D]; B may be 0."""
        if not len(features):
            return
        rows = features.to(self.mean)
        batch_mean = rows.mean(0)
        count = self.count + len(rows)
        delta = batch_mean - self.mean
        # The difference of the means is one more row, so that the [D, D] matrix is updated once.
        weight = (self.count * len(rows) / count) ** 0.5
        rows = torch.cat((rows - batch_mean, weight * delta[None]))
        self.products.addmm_(rows.T, rows)
        self.mean += delta * (len(rows) - 1) / count
        self.count = count

    def merge_processes(self) -> None:
        """Makes every process hold the moments of the rows of all."""
        if distributed.get_world_size() == 1:
            return
        count = int(distributed.all_reduce_sum(self.mean.new_tensor(self.count)).item())
        mean = distributed.all_reduce_sum(self.mean * self.count) / max(count, 1)
        delta = self.mean - mean
        self.products.addr_(delta, delta, alpha=self.count)
        distributed.all_reduce_sum(self.products)
        self.mean, self.count = mean, count

    def covariance(self) -> Tensor:
        """[D, D], unbiased, as numpy.cov; needs two rows."""
        return self.products / (self.count - 1)


def frechet_distance(mean: Tensor, covariance: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """|μ1−μ2|² + tr Σ1 + tr Σ2 − 2 tr (Σ1Σ2)^½, arXiv 1706.08500, equation 6.

    With any root Σ1 = AAᵀ the nonzero eigenvalues of Σ1Σ2 are those of AᵀΣ2A. That matrix is
    symmetric and positive semidefinite: no matrix root is formed, and nothing becomes complex, as
    with `scipy.linalg.sqrtm`.

    Args:
        mean: [D] finite.
        covariance: [D, D] finite, symmetric, without negative eigenvalues beyond rounding.
        mean2: as `mean`, of the other set.
        covariance2: as `covariance`, of the other set.

    Returns:
        the squared distance, as papers report it; 0 where rounding makes it negative.
    """
    mean, mean2, first, second = (
        part.to("cpu", torch.float64) for part in (mean, mean2, covariance, covariance2)
    )
    root, other = _root(first), second
    if root.shape[1] == len(first) and (root2 := _root(second)).shape[1] < len(first):
        root, other = root2, first
    eigenvalues = torch.linalg.eigvalsh(root.T @ other @ root)
    trace_of_root = eigenvalues.clamp_min(0).sqrt().sum()
    delta = mean - mean2
    distance = delta @ delta + first.trace() + second.trace() - 2 * trace_of_root
    return max(distance.item(), 0.0)


def _root(covariance: Tensor) -> Tensor:
    """A [D, R] with AAᵀ the covariance [D, D] of rank R."""
    # Cholesky with pivots stops where nothing but rounding is left.
    factor, order, rank, _ = dpstrf(covariance.numpy(), lower=1)
    root = torch.empty(len(covariance), rank, dtype=covariance.dtype)
    root[torch.from_numpy(order).long() - 1] = torch.from_numpy(factor).tril()[:, :rank]
    if (covariance.trace() - root.square().sum()).abs() <= LEFT_OVER * covariance.trace():
        return root
    # float32 statistics may have negative eigenvalues, at which Cholesky stops too early.
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt()


def fid_spread(
    features: Tensor, mean: Tensor, covariance: Tensor, *, times: int, seed: int
) -> float:
    """Standard deviation of the FID over bootstrap samples (drawn with replacement).

    Their mean would mislead: a set with repetitions has fewer images, and so a larger FID.

    Args:
        features: [N, D] of the samples.
        mean: [D] of the reference.
        covariance: [D, D] of the reference.
        times: number of bootstrap samples.
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
        centred = rows - mean
        products.addmm_((centred * some).T, centred)
    return mean, products / (total - 1)
