from __future__ import annotations

import math

import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from spiralrope_cli.core.metrics.kid import kernel_distance


@pytest.mark.parametrize("seed", [2020, 5])
def test_the_same_seed_gives_the_subsets_and_figures_of_torch_fidelity(seed):
    draw = torch.Generator().manual_seed(0)
    x, y = torch.rand(50, 32, generator=draw), torch.rand(40, 32, generator=draw) + 0.1
    expected = kid_features_to_metric(
        x.double(), y.double(), kid_subsets=7, kid_subset_size=20, rng_seed=seed, verbose=False
    )
    mean, spread = kernel_distance(x, y, num_subsets=7, subset_size=20, seed=seed)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-10)
    assert spread == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-10)


def exact_distance(x, y):
    """Products of float32 numbers are exact in float64, and fsum rounds a sum once."""
    x, y, n = x.double(), y.double(), len(x)
    xx, yy, xy = (((a @ b.T / x.shape[1] + 1) ** 3) for a, b in ((x, x), (y, y), (x, y)))
    within = math.fsum(torch.cat((xx, yy)).flatten().tolist())
    within -= math.fsum(torch.cat((xx.diagonal(), yy.diagonal())).tolist())
    return within / (n * (n - 1)) - 2 * math.fsum(xy.flatten().tolist()) / n**2


@pytest.mark.parametrize("seed", range(3))
def test_a_small_difference_of_large_sums_is_better_rounded_than_in_float32(seed):
    """As Inception's, features lie close together and far from 0.

    In float32 the last subtraction alone leaves steps of some 1e-4 of the result, in whatever order
    the sums before it were taken.
    """
    draw = torch.Generator().manual_seed(seed)
    x, y = 1 + 0.2 * torch.randn(2, 300, 256, generator=draw)
    y += 0.02
    exact = exact_distance(x, y)
    found = kernel_distance(x, y, num_subsets=1, subset_size=300, seed=0)[0]
    theirs = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=300, verbose=False)
    off = abs(theirs["kernel_inception_distance_mean"] - exact)
    assert found == pytest.approx(exact, rel=1e-10)
    assert off > 1e-5 * exact


def test_sets_of_one_kind_are_close_and_others_are_not():
    x, y = torch.rand(2, 400, 16, generator=torch.Generator().manual_seed(0))
    same, other = (
        kernel_distance(x, each, num_subsets=20, subset_size=200, seed=0)[0]
        for each in (y, y + 0.2)
    )
    assert abs(same) < 0.005 < 0.1 < other
