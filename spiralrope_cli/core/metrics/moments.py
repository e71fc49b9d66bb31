"""Mean and covariance of features as they come, in float64.

Legend: B batch, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spiralrope_cli.core.runtime import distributed


class Moments:
    """Count, mean [D] and centred sum of products [D, D] of all rows seen so far.

    Updated batch by batch and merged over processes by the formulas of Chan, Golub and LeVeque
    (1979), which never subtract two large sums.

    Args:
        size: D.
        device: where the features are; float64 is kept on the CPU for MPS, which lacks it.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        place = torch.device("cpu") if device.type == "mps" else device
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64, device=place)
        self.products = torch.zeros(size, size, dtype=torch.float64, device=place)

    def add(self, features: Tensor) -> None:
        """Takes in some rows [B, D]; no rows are allowed."""
        if not len(features):
            return
        rows = features.to(self.mean)
        batch_mean = rows.mean(0)
        total = self.count + len(rows)
        apart = batch_mean - self.mean
        # The distance of the means is one more row, so that the large matrix is gone through once.
        weight = (self.count * len(rows) / total) ** 0.5
        rows = torch.cat((rows - batch_mean, weight * apart[None]))
        self.products.addmm_(rows.T, rows)
        self.mean += apart * (len(rows) - 1) / total
        self.count = total

    def merge_processes(self) -> None:
        """Makes every process hold the moments of the rows of all."""
        if distributed.world_size() == 1:
            return
        count = torch.tensor(float(self.count), dtype=torch.float64, device=self.mean.device)
        total = int(distributed.total(count).item())
        mean = distributed.total(self.mean * self.count) / max(total, 1)
        apart = self.mean - mean
        self.products.addr_(apart, apart, alpha=self.count)
        distributed.total(self.products)
        self.mean, self.count = mean, total

    def covariance(self) -> Tensor:
        """[D, D], unbiased, as numpy.cov; needs two rows."""
        return self.products / (self.count - 1)
