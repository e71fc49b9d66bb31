from __future__ import annotations

import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from spiralrope_cli.core.metrics import inception_score
from spiralrope_cli.core.metrics.inception_score import InceptionScore

CPU = torch.device("cpu")
LOGITS = 3 * torch.randn(24, 11, generator=torch.Generator().manual_seed(0))


def score(batches):
    measure = InceptionScore(24, 11, CPU)
    for numbers in batches:
        measure.add(torch.tensor(numbers), LOGITS[numbers])
    return measure.result()


@pytest.mark.parametrize("splits", [1, 3])
def test_sums_over_splits_give_the_figure_of_torch_fidelity(splits, monkeypatch):
    monkeypatch.setattr(inception_score, "SPLIT_SIZE", 24 // splits)
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
