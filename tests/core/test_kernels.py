"""Every kernel beside the plain expression that it equals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from spiralrope_cli.core import kernels
from spiralrope_cli.core.kernels import (
    Linear,
    add_scaled,
    apply_rotary_complex,
    attention,
    fp32_on_cpu,
    gelu_tanh,
    layer_norm,
    rms_norm,
)


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- linear layers and GELU


@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_a_linear_layer_infers_what_it_trains(gelu, dtype, rtol):
    torch.manual_seed(0)
    layer, x = Linear(48, 32), torch.randn(2, 5, 48)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        trained = layer(x, gelu)
        plain = F.linear(x, layer.weight, layer.bias)
        plain = plain if gelu is None else F.gelu(plain, approximate=gelu)
        with torch.no_grad():
            inferred = layer(x, gelu)
    assert trained.requires_grad
    assert inferred.shape == trained.shape
    assert inferred.dtype == trained.dtype == dtype
    torch.testing.assert_close(inferred, trained.detach(), rtol=rtol, atol=rtol)
    torch.testing.assert_close(trained, plain, rtol=rtol, atol=rtol)


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


def test_the_gelu_that_a_gpu_fuses_keeps_shapes_and_is_counted(monkeypatch):
    """The operator exists on a CPU too, with the exact GELU."""
    monkeypatch.setattr(kernels, "_onednn_dtype", lambda *given: None)
    monkeypatch.setattr(kernels, "_cublas_fuses_gelu", lambda *given: True)
    layer, x = Linear(48, 32), gaussian(2, 5, 48)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        fused = layer(x, "tanh")
    assert counter.get_total_flops() == 2 * (2 * 5) * 48 * 32
    exact = F.gelu(F.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(fused, exact.detach())
    with torch.no_grad():
        assert layer(x[:0], "tanh").shape == (0, 5, 32)
        assert torch.equal(layer(x[0], "tanh"), layer(x[:1], "tanh")[0])


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


# ---- norm and attention


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_layer_norm_is_pytorchs_without_parameters(dtype):
    x, same = (gaussian(2, 5, 32).to(dtype).requires_grad_() for _ in range(2))
    ours, theirs = layer_norm(x, 1e-6), F.layer_norm(same, (32,), eps=1e-6)
    torch.testing.assert_close(ours, theirs)
    weight = gaussian(2, 5, 32, seed=1).to(dtype)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    torch.testing.assert_close(x.grad, same.grad)


# Of GPUs; any device computes them.


def gradients(call, *inputs, seed=9):
    """The output, and the gradients of the inputs for a random gradient of the output."""
    inputs = [each.detach().clone().requires_grad_() for each in inputs]
    out = call(*inputs)
    out.backward(gaussian(*out.shape, seed=seed).to(out.dtype))
    return [out.detach(), *(each.grad for each in inputs)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_our_backward_pass_of_the_rms_norm_is_autograds(dtype):
    exact = torch.promote_types(dtype, torch.float32)
    x, scale = gaussian(3, 5, 32).to(exact), gaussian(32, seed=1).to(exact)
    x[0, 1] = 0  # a token of zeros

    def ours(x, scale):
        return kernels._RMSNorm.apply(x, scale, 1e-6, dtype)

    found = gradients(ours, x, scale)
    assert [each.dtype for each in found] == [dtype, exact, exact]
    plain = gradients(lambda *given: rms_norm(*given, 1e-6, dtype), x, scale)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, gradients(ours, x, scale), found))
    halved = gradients(ours, x, scale.bfloat16())
    torch.testing.assert_close(halved[1].float(), found[1].float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("scale_shape", [(32,), (3, 1, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_backward_pass_of_a_scaled_branch_is_autograds(scale_shape, dtype):
    x, branch = gaussian(3, 5, 32), gaussian(3, 5, 32, seed=1).to(dtype)
    scale = gaussian(*scale_shape, seed=2)
    found = gradients(kernels._AddScaled.apply, x, branch, scale)
    assert [each.dtype for each in found] == [torch.float32, torch.float32, dtype, torch.float32]
    torch.testing.assert_close(found, gradients(add_scaled, x, branch, scale), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_only_bf16_is_widened_for_attention(dtype):
    qkv = gaussian(2, 5, 3, 2, 8).to(dtype)
    assert fp32_on_cpu(qkv) is qkv
    assert torch.equal(fp32_on_cpu(qkv.bfloat16()), qkv.bfloat16().float())
    assert fp32_on_cpu(qkv.bfloat16().to("meta")).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_pytorchs_and_keeps_fp32_under_autocast(dtype):
    q, k, v = (gaussian(2, 3, 5, 8, seed=seed).to(dtype) for seed in range(3))
    plain = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(attention(q, k, v), plain)
    with torch.autocast("cpu", torch.bfloat16):
        wide = attention(*(fp32_on_cpu(each) for each in (q, k, v)))
    assert wide.dtype == torch.float32
    torch.testing.assert_close(
        wide, plain.float(), rtol=0, atol=0 if dtype == torch.float32 else 0.02
    )


# ---- rotation


def rotated(x, cos_sin):
    """The formula, in the dtype of the table."""
    (a, b), (cos, sin) = x.to(cos_sin.dtype).unflatten(-1, (-1, 2)).unbind(-1), cos_sin.unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)


def layouts(x):
    yield x
    yield x.transpose(1, 2).contiguous().transpose(1, 2)
    yield x.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield torch.cat((x[..., :1], x), dim=-1)[..., 1:]
    yield x[:1, :1].expand_as(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_complex_products_are_the_formula_of_the_rotation(dtype):
    angle = gaussian(5, 4, seed=3, dtype=torch.float64)
    cos_sin = torch.stack((angle.cos(), angle.sin()), dim=-1)
    cos_sin = cos_sin if dtype == torch.float64 else cos_sin.float()
    weight = gaussian(2, 3, 5, 8, seed=4).to(dtype)
    for x in layouts(gaussian(2, 3, 5, 8, dtype=torch.float64).to(dtype)):
        x, same = (x.detach().requires_grad_() for _ in range(2))
        ours, plain = apply_rotary_complex(x, cos_sin), rotated(same, cos_sin)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, plain)
        (ours * weight).sum().backward()
        (plain * weight).sum().backward()
        torch.testing.assert_close(x.grad, same.grad)
