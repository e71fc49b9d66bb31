"""The distance against closed forms; never against a matrix root of our own."""

from __future__ import annotations

import pytest
import torch

from spiralrope_cli.core.metrics.frechet import frechet_distance

D = 60
ZERO = torch.zeros(D, dtype=torch.float64)
TURN = torch.linalg.qr(
    torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
)[0]


def turned(variances):
    return TURN @ torch.diag(variances) @ TURN.T


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
        found = frechet_distance(ZERO, turned(first), apart, turned(second))
        assert found == pytest.approx(expected.item(), rel=1e-7)


@pytest.mark.parametrize("variances", [spectrum(0, 1), spectrum(-12, 0), rank(20), rank(0)])
def test_a_gaussian_is_at_no_distance_from_itself(variances):
    found = frechet_distance(ZERO, turned(variances), ZERO, turned(variances))
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
    found = frechet_distance(ZERO, turned(one).float(), ZERO, turned(other).float())
    assert found == pytest.approx(expected, rel=1e-3)
