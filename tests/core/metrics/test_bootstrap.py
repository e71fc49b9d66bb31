from __future__ import annotations

import pytest
import torch

from spiralrope_cli.core.metrics import bootstrap
from spiralrope_cli.core.metrics.bootstrap import fid_spread


def test_the_spread_is_that_of_samples_drawn_again(monkeypatch):
    """In one dimension, against the spread over truly new samples."""
    monkeypatch.setattr(bootstrap, "BLOCK", 64)
    draw = torch.Generator().manual_seed(0)
    mean, covariance = torch.tensor([1.0]), torch.tensor([[1.0]])
    fresh = torch.randn(400, 200, 1, generator=draw, dtype=torch.float64)
    distances = (fresh.mean(1) - 1).square() + (fresh.std(1) - 1).square()
    spread = fid_spread(fresh[0].float(), mean, covariance, times=400, seed=0)
    assert spread == pytest.approx(distances.std().item(), rel=0.2)


def test_the_seed_decides():
    features = torch.rand(30, 4, generator=torch.Generator().manual_seed(0))
    one, same, other = (
        fid_spread(features, torch.zeros(4), torch.eye(4), times=3, seed=seed) for seed in (0, 0, 1)
    )
    assert one == same != other
