"""The distance against closed forms; never against a matrix root of our own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spiralrope_cli.core.metrics import scores
from spiralrope_cli.core.metrics.scores import Moments, fid_spread, frechet_distance

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
    monkeypatch.setattr(distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(distributed, "all_reduce", lambda mine: mine.copy_(next(totals)))
    parts[0].merge_processes()
    assert parts[0].count == 50
    torch.testing.assert_close(parts[0].mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts[0].covariance(), whole.covariance(), rtol=1e-9, atol=1e-13)


D = 60
ZERO = torch.zeros(D, dtype=torch.float64)
ROTATION = torch.linalg.qr(
    torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
)[0]


def rotated(variances):
    return ROTATION @ torch.diag(variances) @ ROTATION.T


def spectrum(low, high):
    return torch.logspace(low, high, D, dtype=torch.float64)


def rank(count):
    return (torch.arange(D) < count).double()


CASES = {
    "well conditioned": (spectrum(-1, 1), spectrum(1, -1)),
    "ill conditioned": (spectrum(-12, 0), spectrum(0, -12)),
    "near equal": (spectrum(-6, 0), spectrum(-6, 0) * (1 + 1e-3)),
    "singular": (rank(20) * 3, spectrum(-2, 0)),
    "both singular": (rank(20), 5 * rank(50)),
    "no common direction": (rank(20), 1 - rank(20)),
    "no variance at all": (rank(0), spectrum(-2, 0)),
}


@pytest.mark.parametrize(("one", "other"), CASES.values(), ids=CASES)
def test_commuting_gaussians_have_a_closed_form(one, other):
    apart = spectrum(-3, 0)
    expected = (one.sqrt() - other.sqrt()).square().sum() + apart.square().sum()
    for first, second in ((one, other), (other, one)):
        found = frechet_distance(ZERO, rotated(first), apart, rotated(second))
        assert found == pytest.approx(expected.item(), rel=1e-7)


@pytest.mark.parametrize("variances", [spectrum(0, 1), spectrum(-12, 0), rank(20), rank(0)])
def test_a_gaussian_is_at_no_distance_from_itself(variances):
    found = frechet_distance(ZERO, rotated(variances), ZERO, rotated(variances))
    assert 0 <= found < 1e-7 * max(variances.sum().item(), 1)


def test_covariances_that_do_not_commute():
    """In two dimensions tr (AB)^1/2 = sqrt(tr AB + 2 sqrt(det AB))."""
    a = torch.tensor([[2.0, 0.7], [0.7, 1.0]], dtype=torch.float64)
    b = torch.tensor([[0.5, -0.3], [-0.3, 3.0]], dtype=torch.float64)
    product = a @ b
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = a.trace() + b.trace() - 2 * root
    found = frechet_distance(ZERO[:2], a, ZERO[:2], b)
    assert found == pytest.approx(expected.item(), rel=1e-12)


def test_fewer_images_than_features():
    """The trace of the root is the nuclear norm of the product of the centred features."""
    draw = torch.Generator().manual_seed(1)
    x, y = (torch.rand(n, D, dtype=torch.float64, generator=draw) for n in (12, 20))
    cx, cy = ((each - each.mean(0)) / (len(each) - 1) ** 0.5 for each in (x, y))
    expected = (
        (x.mean(0) - y.mean(0)).square().sum()
        + cx.square().sum()
        + cy.square().sum()
        - 2 * torch.linalg.svdvals(cx @ cy.T).sum()
    )
    found = frechet_distance(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert found == pytest.approx(expected.item(), rel=1e-10)


def test_statistics_that_were_stored_in_float32():
    one, other = rank(20) * 3, spectrum(-2, 0)
    expected = (one.sqrt() - other.sqrt()).square().sum().item()
    found = frechet_distance(ZERO, rotated(one).float(), ZERO, rotated(other).float())
    assert found == pytest.approx(expected, rel=1e-3)


def test_the_spread_is_that_of_samples_drawn_again(monkeypatch):
    """In one dimension, against the spread over truly new samples."""
    monkeypatch.setattr(scores, "DRAWN_ROWS", 64)
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
