from __future__ import annotations

import math

import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full

from spiralrope_cli.core.metrics import scores
from spiralrope_cli.core.metrics.scores import InceptionScore, kernel_distance, precision_recall

CPU = torch.device("cpu")
LOGITS = 3 * torch.randn(24, 11, generator=torch.Generator().manual_seed(0))


def score(batches):
    measure = InceptionScore(24, 11, CPU)
    for numbers in batches:
        measure.add(torch.tensor(numbers), LOGITS[numbers])
    return measure.result()


@pytest.mark.parametrize("splits", [1, 3])
def test_sums_over_splits_give_the_figure_of_torch_fidelity(splits, monkeypatch):
    monkeypatch.setattr(scores, "SPLIT_SIZE", 24 // splits)
    expected = isc_features_to_metric(LOGITS, splits, shuffle=False)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1)).tolist()
    mean, spread = score([order[:5], order[5:6], order[6:]])
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert spread == pytest.approx(expected["inception_score_std"], rel=1e-9) or splits == 1


def test_one_split_has_no_spread():
    assert score([list(range(24))])[1] is None


def test_sure_and_different_is_best_and_equal_is_worst():
    best, worst = InceptionScore(11, 11, CPU), InceptionScore(11, 11, CPU)
    best.add(torch.arange(11), 1e4 * torch.eye(11))
    worst.add(torch.arange(11), torch.zeros(11, 11))
    assert best.result()[0] == pytest.approx(11)
    assert worst.result()[0] == pytest.approx(1)


# --- KID


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


# --- Precision and recall


def cloud(count, seed, spread=1.0):
    return spread * torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)) + 5


@pytest.mark.parametrize("block", [1, 7, 64, 4096])
def test_any_block_gives_the_figures_of_torch_fidelity(block):
    samples, reference = cloud(60, 0, 1.3), cloud(45, 1)
    expected = calculate_precision_recall_full(samples, reference)
    assert precision_recall(samples, reference, block) == pytest.approx(expected, rel=1e-6)


def test_precision_is_of_the_samples_and_recall_of_the_reference():
    """Samples that all look like a part of the reference: each is real, most real ones lack."""
    real = torch.cat((cloud(20, 0, 0.1), cloud(60, 1, 0.1) + 100))
    precision, recall = precision_recall(cloud(30, 2, 0.05), real)
    assert precision > 0.9
    assert recall <= 0.25
    assert precision_recall(real, cloud(30, 2, 0.05)) == (recall, precision)


def test_a_set_covers_itself():
    features = cloud(40, 0)
    assert precision_recall(features, features.clone()) == (1, 1)


def test_images_that_occur_many_times_cover_themselves_exactly():
    repeated = cloud(3, 0).repeat_interleave(6, 0) * 100
    assert precision_recall(repeated, repeated.flip(0), block=5) == (1, 1)
    assert precision_recall(repeated + 0.5, repeated) == (0, 0)
