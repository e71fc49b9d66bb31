from __future__ import annotations

import numpy as np
import pytest
import torch

from spiralrope_cli.core.metrics.moments import Moments

CPU = torch.device("cpu")
ROWS = torch.rand(50, 7, generator=torch.Generator().manual_seed(0)) + 1000


def moments_of(*batches):
    moments = Moments(7, CPU)
    for batch in batches:
        moments.add(batch)
    return moments


@pytest.mark.parametrize("sizes", [[50], [1] * 50, [49, 1], [1, 49], [20, 0, 30]])
def test_any_batches_give_what_numpy_gives_for_all_rows(sizes):
    moments = moments_of(*ROWS.split(sizes))
    assert moments.count == 50
    np.testing.assert_allclose(moments.mean, ROWS.double().numpy().mean(0), rtol=1e-12)
    expected = np.cov(ROWS.double().numpy(), rowvar=False)
    np.testing.assert_allclose(moments.covariance(), expected, rtol=1e-9, atol=1e-13)


def test_a_far_origin_loses_no_digits():
    near, far = moments_of(ROWS[:25].double(), ROWS[25:].double()), Moments(7, CPU)
    for batch in ROWS.double().split(10):
        far.add(batch + 1e6)
    np.testing.assert_allclose(far.covariance(), near.covariance(), rtol=1e-6)


def test_processes_merge_to_the_whole(monkeypatch):
    """Every process sums up its part; the sums over processes are played by hand."""
    from spiralrope_cli.core.runtime import distributed

    parts = [moments_of(*ROWS[:30].split(7)), moments_of(), moments_of(ROWS[30:])]
    whole = moments_of(ROWS)
    mean = sum(part.mean * part.count for part in parts) / 50
    products = sum(
        part.products + part.count * torch.outer(part.mean - mean, part.mean - mean)
        for part in parts
    )
    totals = iter([torch.tensor(50.0), mean * 50, products])
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed, "total", lambda mine: mine.copy_(next(totals)))
    parts[0].merge_processes()
    assert parts[0].count == 50
    torch.testing.assert_close(parts[0].mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts[0].covariance(), whole.covariance(), rtol=1e-9, atol=1e-13)
