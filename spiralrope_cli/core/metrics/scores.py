"""Inception Score, KID, precision and recall, from Inception features and logits in batches.

Legend: N images, B batch, D features, K classes or neighbours, S splits, M images per subset.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spiralrope_cli.core.runtime import distributed

SPLIT_SIZE = 5000
"""Images per split of the Inception Score, as in ADM."""

NEIGHBOURS = 3
BLOCK = 2048
CLOSE = 1e-2
"""Below this fraction of the squared norms, a squared distance from the matrix product is mostly
rounding. Then it is computed from the difference, so that equal images have distance 0."""


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
        self.sums.index_add_(0, numbers.to(self.sums.device) // SPLIT_SIZE, rows)

    def result(self) -> tuple[float, float | None]:
        """Mean and standard deviation over the splits; the latter is None for one split."""
        sums = distributed.all_reduce_sum(self.sums).cpu()
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
