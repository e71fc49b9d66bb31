from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from spiralrope_cli.core.models.layers import Attention, Linear, RMSNorm, gelu_tanh


def test_the_small_constant_of_rms_norm_lies_outside_the_root():
    norm = RMSNorm(4)
    norm.scale.data.fill_(3.0)
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    torch.testing.assert_close(norm(x * 1e-6), x * 3 / 2)
    assert not norm(torch.zeros(1, 4)).any()


def test_rms_norm_of_half_precision_takes_its_statistic_in_float32():
    x = torch.full((1, 4), 300.0, dtype=torch.float16)
    torch.testing.assert_close(RMSNorm(4)(x), torch.ones(1, 4))


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 0.02)]
)
def test_our_gelu_is_pytorchs_tanh_gelu(dtype, atol):
    grid = torch.cat((torch.linspace(-12, 12, 2001), torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])))
    x, same = (grid.to(dtype).requires_grad_() for _ in range(2))
    ours, theirs = gelu_tanh(x), F.gelu(same, approximate="tanh")
    assert ours.dtype == dtype
    torch.testing.assert_close(
        ours, theirs, rtol=0.005 if dtype == torch.bfloat16 else 0, atol=atol
    )
    ours.backward(torch.ones_like(ours))
    theirs.backward(torch.ones_like(theirs))
    assert torch.equal(x.grad, same.grad)
    assert torch.equal(gelu_tanh(x.detach()), ours)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_what_inference_computes_can_be_counted_and_traced():
    layer, x = Linear(48, 32).eval(), torch.randn(2, 5, 48)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        wanted = layer(x, "tanh")
    assert counter.get_total_flops() == 2 * (2 * 5) * 48 * 32
    with torch.no_grad():
        traced = torch.jit.trace(layer, x)
        exported = torch.export.export(layer, (x, "tanh")).module()
        torch.testing.assert_close(traced(x), layer(x))
        torch.testing.assert_close(exported(x, "tanh"), wanted)


def test_normalised_heads_have_length_one_per_channel():
    torch.manual_seed(0)
    attention, seen = Attention(16, 2, qk_norm=True), []
    for norm in (attention.q_norm, attention.k_norm):
        norm.register_forward_hook(lambda *args: seen.append(args[2]))
    attention(torch.randn(2, 3, 16) * 50, None)
    for heads in seen:
        assert heads.shape == (2, 3, 2, 8)
        torch.testing.assert_close(heads.square().mean(-1), torch.ones(2, 3, 2))


@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_a_linear_layer_infers_what_it_trains(gelu, dtype, rtol):
    torch.manual_seed(0)
    layer, x = Linear(48, 32), torch.randn(2, 5, 48)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        trained = layer(x, gelu)
        with torch.no_grad():
            inferred = layer(x, gelu)
    assert trained.requires_grad
    assert inferred.shape == trained.shape
    assert inferred.dtype == trained.dtype == dtype
    torch.testing.assert_close(inferred, trained.detach(), rtol=rtol, atol=rtol)


def test_a_linear_layer_infers_without_onednn_and_in_float64_too(monkeypatch):
    torch.manual_seed(0)
    layer, x = Linear(48, 32), torch.randn(7, 48)
    with torch.no_grad():
        fast = layer(x, "tanh")
        with monkeypatch.context() as without:
            without.setattr(torch.backends.mkldnn, "is_available", lambda: False)
            torch.testing.assert_close(layer(x, "tanh"), fast)
        layer, x = layer.double(), x.double()
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.float64
        with pytest.raises(RuntimeError, match="dtype"):
            layer(x.float())
        assert layer(x[:0]).shape == (0, 32)
