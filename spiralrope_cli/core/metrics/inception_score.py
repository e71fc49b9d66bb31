"""Inception Score from logits in batches.

Legend: B batch, S splits, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spiralrope_cli.core.runtime import distributed

SPLIT_SIZE = 5000


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
