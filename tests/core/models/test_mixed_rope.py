"""RoPE-Mixed: its formula in float64, timm's module, and a parameter like any other."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from timm.layers import apply_rot_embed_cat
from torch._dynamo.testing import CompileCounter

from spiralrope_cli import RopeConfig, create_model
from spiralrope_cli.core.config.models import override_rope
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.models.mixed_rope import MixedRoPE
from spiralrope_cli.core.rope import SpiralRoPE, apply_rotary, mixed_angles
from spiralrope_cli.core.training.step import freeze_but, parameter_groups

MIXED = RopeConfig(rope_kind="mixed")
CPU = torch.device("cpu")


def mixed(head_dim=16, depth=3, num_heads=2, grid=(4, 6), seed=0, **options):
    torch.manual_seed(seed)
    config = RopeConfig(rope_kind="mixed", **options)
    return MixedRoPE(head_dim, depth, num_heads, config, grid)


def deit(rope=MIXED, **options):
    torch.manual_seed(0)
    sizes = {"image_size": (16, 24), "patch_size": 4, "num_classes": 5, **options}
    model = create_model("deit-32x3x2", rope=rope, **sizes)
    for block in model.blocks:
        torch.nn.init.ones_(block.gamma_1)
    return model


def dit(rope=MIXED, **options):
    torch.manual_seed(0)
    model = create_model("dit-32x3x2-2", rope=rope, input_size=8, num_classes=5, **options)
    for parameter in model.parameters():
        if not parameter.any():  # adaLN-Zero
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def run(model):
    generator = torch.Generator().manual_seed(1)
    if hasattr(model, "x_embedder"):
        x = torch.randn(2, 4, 8, 8, generator=generator)
        return model(
            x.to(model.x_embedder.proj.weight.dtype), torch.tensor([3, 900]), torch.arange(2)
        )
    x = torch.randn(2, 3, *model.image_size, generator=generator)
    return model(x.to(model.cls_token.dtype))


@pytest.mark.parametrize(
    ("grid", "scaling", "factor"),
    [
        ((4, 6), "interpolate", (1, 1)),
        ((8, 3), "interpolate", (0.5, 2)),
        ((8, 3), "extrapolate", (1, 1)),
    ],
)
def test_queries_rotate_by_the_formula(grid, scaling, factor):
    """exp(i (fx x + fy y)) in float64, pair by pair."""
    rope = mixed(scaling=scaling)
    prefix, (rows, columns) = 1, grid
    x = torch.randn(2, prefix + rows * columns, 2, 16, dtype=torch.float64)
    fx, fy = rope.freqs.detach().double().numpy()
    pairs = x.numpy()[..., ::2] + 1j * x.numpy()[..., 1::2]
    expected = pairs.copy()
    for row in range(rows):
        for column in range(columns):
            token = prefix + row * columns + column
            phase = fx[2] * column * factor[1] + fy[2] * row * factor[0]
            expected[:, token] = pairs[:, token] * np.exp(1j * phase)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        cos_sin = rope.to(dtype).cos_sin(grid, prefix, CPU)[2]
        found = apply_rotary(x, cos_sin).detach().numpy()
        np.testing.assert_allclose(found[..., ::2], expected.real, rtol=0, atol=tolerance)
        np.testing.assert_allclose(found[..., 1::2], expected.imag, rtol=0, atol=tolerance)


def test_first_frequencies_are_those_of_the_paper():
    """theta^(-4j/D) along two perpendicular directions, at an angle of each head's own."""
    fx, fy = mixed(head_dim=64, depth=4, num_heads=3).freqs.detach().double()
    magnitude = 10 ** -(torch.arange(16).double() * 4 / 64)
    torch.testing.assert_close(
        torch.hypot(fx, fy), magnitude.repeat(2).expand(4, 3, 32), rtol=1e-6, atol=0
    )
    (ax, bx), (ay, by) = (part.chunk(2, dim=-1) for part in (fx, fy))
    torch.testing.assert_close(torch.stack((-ay, ax)), torch.stack((bx, by)), rtol=0, atol=1e-6)
    angle = torch.atan2(ay, ax)
    torch.testing.assert_close(angle, angle[..., :1].expand_as(angle), rtol=0, atol=1e-5)
    assert len(angle[..., 0].flatten().round(decimals=3).unique()) == 12


def test_it_is_that_of_timm():
    if not hasattr(timm.layers, "RotaryEmbeddingMixed"):
        pytest.skip("this timm is older than its RoPE-Mixed")
    ours, theirs = mixed(64, 4, 3, (14, 14)), timm.layers.RotaryEmbeddingMixed(192, 4, 3)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 10 * 7, 64)
    rope = MixedRoPE(64, 4, 3, RopeConfig(rope_kind="mixed", scaling="extrapolate"), 14)
    rope.load_state_dict(ours.state_dict())
    for layer, cos_sin in enumerate(rope.cos_sin((10, 7), 0, CPU)):
        found = apply_rotary(x.transpose(1, 2), cos_sin).transpose(1, 2)
        expected = apply_rot_embed_cat(x, theirs.get_embed([10, 7])[layer])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("network", [deit, dit])
def test_kinds_share_all_other_weights_of_a_seed(network):
    spiral, other = (
        network(RopeConfig(rope_kind=kind)).state_dict() for kind in ("spiral", "mixed")
    )
    assert other.keys() - spiral.keys() == {"rope.freqs"}
    assert all(torch.equal(spiral[name], other[name]) for name in spiral)
    assert other["rope.freqs"].shape == (2, 3, 2, 8)


def test_axial_is_rotate_0_and_its_networks_are_equal():
    axial = RopeConfig(rope_kind="axial")
    assert (axial.rotate, axial.name) == (0, "axial")
    assert RopeConfig(rope_kind="axial", rotate=2) == axial  # the default of another kind
    with pytest.raises(ConfigError, match="--rotate 4 does not fit --rope-kind axial"):
        RopeConfig(rope_kind="axial", rotate=4)
    assert override_rope(RopeConfig(rotate=4), {"rope_kind": "axial"}) == axial
    tables = [SpiralRoPE(16, each).tables(5)[0] for each in (axial, RopeConfig(rotate=0))]
    assert torch.equal(*tables)
    with pytest.raises(ConfigError, match="no learned frequencies"):
        SpiralRoPE(16, MIXED)


def test_gradients_are_those_of_the_formula():
    freqs = mixed(8, 2, 2, (2, 3)).freqs.detach().double().requires_grad_()
    x = torch.randn(1, 6, 2, 8, dtype=torch.float64, requires_grad=True)

    def rotated(x, freqs):
        angle = mixed_angles(freqs, (2, 3), MIXED, (2, 3))[1]
        return apply_rotary(x, torch.stack((angle.cos(), angle.sin()), dim=-1))

    assert torch.autograd.gradcheck(rotated, (x, freqs))


@pytest.mark.parametrize("network", [deit, dit])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_every_layer_and_head_learns(network, checkpointing):
    grads = []
    for on in (False, checkpointing):
        model = network().train()
        model.grad_checkpointing = on
        run(model).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        grads.append(model.rope.freqs.grad)
    assert grads[1].abs().sum((0, 3)).min() > 0
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("network", [deit, dit])
def test_angles_are_fp32_in_low_precision(network):
    exact = network().rope.cos_sin((4, 6), 1, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        inside = network().rope.cos_sin((4, 6), 1, CPU)
    assert all(
        a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(inside, exact, strict=True)
    )
    half = network().bfloat16()
    assert half.rope.cos_sin((4, 6), 1, CPU)[0].dtype == torch.float32
    assert run(half).isfinite().all()


def test_the_frequencies_have_no_weight_decay_and_train_with_the_attention():
    model = deit()
    decayed, free = (group["params"] for group in parameter_groups(model, 0.1))
    assert any(each is model.rope.freqs for each in free)
    assert not any(each is model.rope.freqs for each in decayed)
    freeze_but(model, "attn-only")
    assert model.rope.freqs.requires_grad
    freeze_but(model, "head-only")
    assert not model.rope.freqs.requires_grad


@pytest.mark.parametrize("network", [deit, dit])
def test_blocks_share_one_graph(network):
    torch._dynamo.reset()
    counter = CompileCounter()
    plain, model = network(), network()
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        loss = run(model).square().mean()
        loss.backward()
    torch.testing.assert_close(loss, run(plain).square().mean(), rtol=1e-5, atol=0)
    assert counter.frame_count == 1
    with torch.no_grad():
        run(model)
    assert counter.frame_count == 2, "one for training, one for evaluation"
    whole = torch.compile(network(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(whole), run(plain), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
