from __future__ import annotations

import torch

from spiralrope_cli.core.models.layers import RMSNorm


def test_the_small_constant_of_rms_norm_lies_outside_the_root():
    norm = RMSNorm(4)
    norm.scale.data.fill_(3.0)
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    torch.testing.assert_close(norm(x * 1e-6), x * 3 / 2)
    assert not norm(torch.zeros(1, 4)).any()


def test_rms_norm_of_half_precision_takes_its_statistic_in_float32():
    x = torch.full((1, 4), 300.0, dtype=torch.float16)
    torch.testing.assert_close(RMSNorm(4)(x), torch.ones(1, 4))
