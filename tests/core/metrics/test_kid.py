from __future__ import annotations

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
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-5)
    assert spread == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-4)


def test_sets_of_one_kind_are_close_and_others_are_not():
    x, y = torch.rand(2, 400, 16, generator=torch.Generator().manual_seed(0))
    same, other = (
        kernel_distance(x, each, num_subsets=20, subset_size=200, seed=0)[0]
        for each in (y, y + 0.2)
    )
    assert abs(same) < 0.005 < 0.1 < other
