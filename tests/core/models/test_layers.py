from __future__ import annotations

import torch

from spiralrope_cli.core.models.layers import Attention, RMSNorm


def test_the_small_constant_of_rms_norm_lies_outside_the_root():
    norm = RMSNorm(4)
    norm.scale.data.fill_(3.0)
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    torch.testing.assert_close(norm(x * 1e-6), x * 3 / 2)
    assert not norm(torch.zeros(1, 4)).any()


def test_rms_norm_of_half_precision_takes_its_statistic_in_float32():
    x = torch.full((1, 4), 300.0, dtype=torch.float16)
    torch.testing.assert_close(RMSNorm(4)(x), torch.ones(1, 4))


def test_normalised_heads_have_length_one_per_channel():
    torch.manual_seed(0)
    attention, seen = Attention(16, 2, qk_norm=True), []
    for norm in (attention.q_norm, attention.k_norm):
        norm.register_forward_hook(lambda *args: seen.append(args[2]))
    attention(torch.randn(2, 3, 16) * 50, None)
    for heads in seen:
        assert heads.shape == (2, 3, 2, 8)
        torch.testing.assert_close(heads.square().mean(-1), torch.ones(2, 3, 2))
