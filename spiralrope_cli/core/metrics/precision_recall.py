"""Precision and recall of generated images by nearest neighbours (arXiv 1904.06991).

Distances are computed in blocks: no N x N matrix is stored.

Legend: N images, D features, K neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 3
BLOCK = 2048
CLOSE = 1e-2
"""Below this fraction of the squared norms, a squared distance from the matrix product is mostly
rounding. Then it is computed from the difference, so that equal images have distance 0."""


def precision_recall(samples: Tensor, reference: Tensor, block: int = BLOCK) -> tuple[float, float]:
    """Precision: fraction of samples in the manifold of the reference. Recall: the reverse.

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
