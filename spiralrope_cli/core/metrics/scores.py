"""FID, Inception Score, KID, precision and recall, from Inception features and logits in batches.

Legend: N images, B batch, D features, R rank, K classes or neighbours, S splits, M images per
subset.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg.lapack import dpstrf
from torch import Tensor

from spiralrope_cli.core.runtime import distributed
from spiralrope_cli.core.runtime.seeds import generator_for

LEFT_OVER = 1e-9
"""Fraction of the trace by which a factorisation may differ."""
DRAWN_ROWS = 4096
"""Of a resampled set."""

SPLIT_SIZE = 5000
"""Images per split of the Inception Score, as in ADM."""

NEIGHBOURS = 3
BLOCK = 2048
CLOSE = 1e-2
"""Below this fraction of the squared norms, a squared distance from the matrix product is mostly
rounding. Then it is computed from the difference, so that equal images have distance 0."""


# --- FID


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
        count = int(distributed.all_reduce(self.mean.new_tensor(self.count)).item())
        mean = distributed.all_reduce(self.mean * self.count) / max(count, 1)
        delta = self.mean - mean
        self.products.addr_(delta, delta, alpha=self.count)
        distributed.all_reduce(self.products)
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
    for rows, some in zip(features.split(DRAWN_ROWS), weights.split(DRAWN_ROWS), strict=True):
        mean += (rows * some).sum(0) / total
    products = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=mean.device)
    for rows, some in zip(features.split(DRAWN_ROWS), weights.split(DRAWN_ROWS), strict=True):
        centred = rows - mean
        products.addmm_((centred * some).T, centred)
    return mean, products / (total - 1)


# --- Other scores


class InceptionScore:
    """exp of the mean KL divergence between p(y|x) and p(y), per split (arXiv 1606.03498).

    Over a split the mean of KL(p(y|x) ‖ p(y)) equals the mean of Σ p log p, minus Σ q log q, where
    q is the mean of p. So sums over batches are enough.

    Args:
        num_images: number of images over all processes; image i is in split i // 5000, as in ADM.
        num_classes: K.
        device: device of the logits.
    """

    def __init__(self, num_images: int, num_classes: int, device: torch.device) -> None:
        place = torch.device("cpu") if device.type == "mps" else device
        num_splits = -(-num_images // SPLIT_SIZE)
        # Per split: the sum of p, the sum of p log p, the number of images.
        self.sums = torch.zeros(num_splits, num_classes + 2, dtype=torch.float64, device=place)

    def add(self, numbers: Tensor, logits: Tensor) -> None:
        """Adds logits [B, K] of the images with indices [B] in the set."""
        log_p = logits.to(self.sums).log_softmax(1)
        p = log_p.exp()
        rows = torch.cat((p, (p * log_p).sum(1, keepdim=True), torch.ones_like(p[:, :1])), 1)
        splits = (numbers // SPLIT_SIZE).to(self.sums.device, non_blocking=True)
        self.sums.index_add_(0, splits, rows)

    def result(self) -> tuple[float, float | None]:
        """Mean and standard deviation over the splits; the latter is None for one split."""
        sums = distributed.all_reduce(self.sums).cpu()
        sums = sums[sums[:, -1] > 0]
        count = sums[:, -1]
        q = sums[:, :-2] / count[:, None]
        scores = (sums[:, -2] / count - torch.special.xlogy(q, q).sum(1)).exp()
        spread = scores.std(correction=0).item() if len(scores) > 1 else None
        return scores.mean().item(), spread


def kernel_distance(
    features: Tensor, features2: Tensor, *, num_subsets: int, subset_size: int, seed: int
) -> tuple[float, float]:
    """Kernel Inception Distance (arXiv 1801.01401): unbiased squared MMD over random subsets.

    The kernel is (x·y / D + 1)³. For the same seed the subsets are those of torch-fidelity.
    Computed in float64: the result is a difference of means that can be 100,000 times larger; in
    float32 their rounding would be half a percent of it.

    Args:
        features: [N, D] float32.
        features2: [N2, D] float32, of the other set.
        num_subsets: number of subsets.
        subset_size: M, at most N and N2.
        seed: seed of the subsets.

    Returns:
        mean and standard deviation over the subsets.
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


def precision_recall(samples: Tensor, reference: Tensor, block: int = BLOCK) -> tuple[float, float]:
    """Precision and recall by nearest neighbours (arXiv 1904.06991), without an N x N matrix.

    Precision is the fraction of samples in the manifold of the reference; recall is the reverse.
    The manifold of a set is the union of balls around its images; the radius is the distance to
    the third nearest neighbour in the set.

    Args:
        samples: [N, D] float32, N > 3.
        reference: [N2, D] float32, on the same device.
        block: rows at a time; has no effect on the result.
    """
    # Subtracting a centre does not change distances, but reduces their rounding error.
    centre = reference[:block].mean(0)
    radii, radii2 = (_squared_radii(each, centre, block) for each in (samples, reference))
    inside, inside2 = (torch.zeros_like(each, dtype=torch.bool) for each in (radii, radii2))
    for rows in _blocks(samples, block):
        some = samples[rows] - centre
        for columns in _blocks(reference, block):
            distances = _squared_distances(some, reference[columns] - centre)
            inside[rows] |= (distances <= radii2[columns]).any(1)
            inside2[columns] |= (distances <= radii[rows, None]).any(0)
    return inside.sum().item() / len(inside), inside2.sum().item() / len(inside2)


def _squared_radii(features: Tensor, centre: Tensor, block: int) -> Tensor:
    """[N]: squared distance of each image to its third nearest neighbour in the set."""
    # The nearest one is the image itself, at distance 0.
    nearest = features.new_full((len(features), NEIGHBOURS + 1), torch.inf)
    for rows in _blocks(features, block):
        some = features[rows] - centre
        for columns in _blocks(features, block):
            if columns.start < rows.start:
                continue  # these pairs were in an earlier block
            distances = _squared_distances(some, features[columns] - centre)
            nearest[rows] = _smallest(nearest[rows], distances)
            if columns.start > rows.start:
                nearest[columns] = _smallest(nearest[columns], distances.T)
    return nearest[:, -1]


def _smallest(nearest: Tensor, distances: Tensor) -> Tensor:
    """[N, K]: the K smallest of [N, K] so far and [N, M] more."""
    more = distances.topk(min(nearest.shape[1], distances.shape[1]), largest=False).values
    return torch.cat((nearest, more), 1).topk(nearest.shape[1], largest=False).values


def _squared_distances(some: Tensor, others: Tensor) -> Tensor:
    """[N, D] and [M, D] -> [N, M]."""
    lengths = some.square().sum(1)[:, None] + others.square().sum(1)
    distances = torch.addmm(lengths, some, others.T, alpha=-2)
    for pairs in (distances < CLOSE * lengths).nonzero().split(BLOCK):
        row, column = pairs.unbind(1)
        distances[row, column] = (some[row] - others[column]).square().sum(1)
    return distances


def _blocks(features: Tensor, block: int) -> list[slice]:
    return [slice(at, at + block) for at in range(0, len(features), block)]
