from __future__ import annotations

import pytest
import torch
from torch_fidelity.metric_prc import calculate_precision_recall_full

from spiralrope_cli.core.metrics.precision_recall import precision_recall


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
