"""FID: mean and covariance of features in batches, Fréchet distance, bootstrap error.

Legend: B batch, N images, D features, R rank.
"""

from __future__ import annotations

import torch
from scipy.linalg.lapack import dpstrf
from torch import Tensor

from spiralrope_cli.core.runtime import distributed
from spiralrope_cli.core.runtime.seeds import generator_for

LEFT_OVER = 1e-9
"""Fraction of the trace by which a factorisation may differ."""
BLOCK = 4096
"""Rows at a time of a resampled set."""


class Moments:
    """Count, mean [D] and centred sum of products [D, D] of all rows so far, in float64.

    Batches and processes are merged by the formulas of Chan, Golub and LeVeque (1979), which do
    not subtract large sums from each other.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        place = torch.device("cpu") if device.type == "mps" else device  # MPS lacks float64
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64, device=place)
        self.products = torch.zeros(size, size, dtype=torch.float64, device=place)

    def add(self, features: Tensor) -> None:
        """Adds rows [B, D]; B may be 0."""
        if not len(features):
            return
        rows = features.to(self.mean)
        batch_mean = rows.mean(0)
        count = self.count + len(rows)
        delta = batch_mean - self.mean
        # The difference of the means is appended as one more row: one update of the [D, D] matrix.
        weight = (self.count * len(rows) / count) ** 0.5
        rows = torch.cat((rows - batch_mean, weight * delta[None]))
        self.products.addmm_(rows.T, rows)
        self.mean += delta * (len(rows) - 1) / count
        self.count = count

    def merge_processes(self) -> None:
        """Replaces the moments by those of the rows of all processes."""
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

    For any A with Σ1 = AAᵀ, the nonzero eigenvalues of Σ1Σ2 are those of AᵀΣ2A, which is symmetric
    and positive semidefinite. So no matrix square root is needed (`scipy.linalg.sqrtm` is slower,
    and its result can be complex).

    Args:
        mean: [D], finite.
        covariance: [D, D], finite, symmetric, positive semidefinite up to rounding.
        mean2: mean of the other set.
        covariance2: covariance of the other set.

    Returns:
        the squared distance, as papers report it; at least 0.
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
    """A [D, R] with AAᵀ = covariance [D, D], of rank R."""
    # Cholesky with pivoting stops when only rounding is left.
    factor, order, rank, _ = dpstrf(covariance.numpy(), lower=1)
    root = torch.empty(len(covariance), rank, dtype=covariance.dtype)
    root[torch.from_numpy(order).long() - 1] = torch.from_numpy(factor).tril()[:, :rank]
    if (covariance.trace() - root.square().sum()).abs() <= LEFT_OVER * covariance.trace():
        return root
    # Statistics stored in float32 can have negative eigenvalues, where Cholesky stops too early.
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt()


def fid_spread(
    features: Tensor, mean: Tensor, covariance: Tensor, *, times: int, seed: int
) -> float:
    """Standard deviation of the FID over bootstrap samples (with replacement).

    Their mean is not reported: it is biased, as repeated images are fewer different ones.

    Args:
        features: [N, D] of the samples.
        mean: [D] of the reference.
        covariance: [D, D] of the reference.
        times: number of bootstrap samples.
        seed: seed of the bootstrap samples.
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
    """Mean and covariance, where row i occurs `weights[i]` times."""
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
