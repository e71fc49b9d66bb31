from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from comparing import casts_of_weights
from safetensors.torch import load_file

from spiralrope_cli import RopeConfig, create_model
from spiralrope_cli.core.config.models import DEIT_SIZES
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.models.deit import (
    Attention,
    Block,
    DeiT,
    RMSNorm,
    resize_pos_embed,
)
from spiralrope_cli.core.models.factory import cast_matmuls
from spiralrope_cli.core.rope import build_angles, frequencies

GOLDEN = Path(__file__).parents[2] / "golden"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
TINY = MANIFEST["deit_tiny"]
TINY_ROPE = RopeConfig(
    **{
        name: TINY[name]
        for name in (
            "rotate",
            "theta",
            "max_freq_lang",
            "min_freq_lang",
            "same_theta",
            "truncate_percentage",
        )
    }
)


def published_weights():
    tensors = load_file(GOLDEN / "deit/deit_tiny_weights.safetensors")
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def tiny_deit(rope=TINY_ROPE, **more):
    model = DeiT(
        TINY["embed_dim"],
        TINY["depth"],
        TINY["num_heads"],
        rope=rope,
        image_size=TINY["img_size"],
        patch_size=TINY["patch_size"],
        in_chans=TINY["in_chans"],
        num_classes=TINY["num_classes"],
        mlp_ratio=TINY["mlp_ratio"],
        **more,
    )
    weights = published_weights()
    model.load_state_dict({k: v for k, v in weights.items() if not k.endswith(".rope.freqs")})
    return model


def small_deit(image_size=(8, 12), patch_size=4, **more):
    """Random weights, with branches that count: a fresh layer scale nearly shuts them off."""
    torch.manual_seed(0)
    options = {"rope": RopeConfig(), "num_classes": 3, **more}
    model = DeiT(32, 3, 2, image_size=image_size, patch_size=patch_size, **options)
    for block in model.blocks:
        block.gamma_1.data.fill_(0.5)
        block.gamma_2.data.fill_(0.5)
    return model


def pictures(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def io():
    return load_file(GOLDEN / "deit/deit_tiny_io.safetensors")


# ---- the published numbers


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_logits_features_and_loss_are_the_published_ones(io, mode):
    model = getattr(tiny_deit(), mode)()
    logits = model(io["images"])
    features = model.forward_features(io["images"])[:, 0]
    loss = F.cross_entropy(logits, io["labels"])
    torch.testing.assert_close(logits, io["logits"], rtol=0, atol=3e-5)
    torch.testing.assert_close(features, io["features"], rtol=0, atol=3e-5)
    torch.testing.assert_close(loss, io["loss"].squeeze(), rtol=0, atol=3e-5)


def test_the_network_runs_in_float64_too(io):
    logits = tiny_deit().double()(io["images"].double())
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, io["logits_f64"], rtol=0, atol=3e-6)


@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_gradients_are_the_published_ones(io, grad_checkpointing):
    model = tiny_deit().train()
    model.grad_checkpointing = grad_checkpointing
    F.cross_entropy(model(io["images"]), io["labels"]).backward()
    expected = load_file(GOLDEN / "deit/deit_tiny_grads.safetensors")
    assert {f"grad.{name}" for name, _ in model.named_parameters()} == expected.keys()
    for name, parameter in model.named_parameters():
        published = expected[f"grad.{name}"]
        assert (parameter.grad - published).norm() <= 2e-5 * published.norm(), name


def test_the_published_frequency_buffers_are_our_frequencies():
    ours = frequencies(TINY_ROPE, TINY["head_dim"])
    buffers = [v for k, v in published_weights().items() if k.endswith(".rope.freqs")]
    assert len(buffers) == TINY["depth"]
    for buffer in buffers:
        torch.testing.assert_close(buffer.double(), ours, rtol=1e-6, atol=0)


def test_position_embeddings_are_resized_as_published():
    sizes = MANIFEST["pos_embed_resize"]
    tensors = load_file(GOLDEN / "deit/pos_embed_resize.safetensors")
    ours = resize_pos_embed(tensors["pos_embed"], sizes["old_grid"], sizes["new_grid"])
    torch.testing.assert_close(ours, tensors["resized"], rtol=0, atol=1e-5)


def test_position_embeddings_are_resized_along_each_axis_alone():
    rows = torch.arange(3.0).repeat_interleave(2).view(1, 6, 1)
    wider = resize_pos_embed(rows, (3, 2), (3, 5))
    torch.testing.assert_close(wider, torch.arange(3.0).repeat_interleave(5).view(1, 15, 1))
    assert resize_pos_embed(rows, (3, 2), (3, 2)) is rows


@pytest.mark.parametrize(("arch", "count"), MANIFEST["parameter_counts"].items())
def test_parameter_counts_are_the_published_ones(arch, count):
    with torch.device("meta"):
        model = create_model(arch)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_the_state_dict_is_the_published_one_without_frequencies():
    with torch.device("meta"):
        ours = {name: list(t.shape) for name, t in create_model("deit-b").state_dict().items()}
    published = MANIFEST["deit_b_state_dict"]
    assert ours == {k: v for k, v in published.items() if not k.endswith(".rope.freqs")}


# ---- sizes


@pytest.mark.parametrize("arch", DEIT_SIZES)
@pytest.mark.parametrize("in_chans", [1, 3])
def test_every_architecture_learns_on_a_tiny_image(arch, in_chans, monkeypatch):
    # Two blocks stand for all: the counts above see the full depth.
    monkeypatch.setitem(DEIT_SIZES, arch, DEIT_SIZES[arch]._replace(depth=2))
    torch.manual_seed(0)
    model = create_model(arch, num_classes=5, image_size=16, patch_size=8, in_chans=in_chans)
    logits = model(pictures(2, in_chans, 16, 16))
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()
    F.cross_entropy(logits, torch.tensor([1, 4])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize(
    ("image_size", "patch_size", "grid"),
    [
        (8, 1, (8, 8)),
        (8, 8, (1, 1)),
        ((6, 10), 2, (3, 5)),
        ((21, 7), 7, (3, 1)),
        ((3, 9), 3, (1, 3)),
        ((16, 64), 16, (1, 4)),
    ],
)
def test_any_rectangle_and_patch_size(image_size, patch_size, grid):
    model = small_deit(image_size, patch_size)
    assert model.grid == grid
    assert model.pos_embed.shape == (1, grid[0] * grid[1], 32)
    logits = model(pictures(2, 3, *model.image_size))
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()


def test_tokens_are_turned_by_their_own_row_and_column():
    model = small_deit((8, 12), 4)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    model(pictures(1, 3, 8, 12))
    angle = build_angles((2, 3), 16, RopeConfig(), (2, 3))
    expected = torch.stack((angle.cos(), angle.sin()), dim=-1).float()
    assert torch.equal(seen[0][1:], expected)
    assert torch.equal(seen[0][0], torch.tensor([1.0, 0.0]).expand(8, 2))


def test_positions_refer_to_the_models_own_grid_unless_told():
    x = pictures(1, 3, 8, 12)
    own, same, other = (small_deit(pretrain_grid=grid)(x) for grid in (None, (2, 3), (4, 6)))
    assert torch.equal(own, same)
    assert (own - other).abs().max() > 1e-4
    extrapolated = [
        small_deit(pretrain_grid=grid, rope=RopeConfig(scaling="extrapolate"))(x)
        for grid in (None, (4, 6))
    ]
    assert torch.equal(*extrapolated)


def test_the_baseline_without_rope_has_the_same_weights_and_other_logits(io):
    baseline = tiny_deit(dataclasses.replace(TINY_ROPE, enabled=False))
    assert baseline.rope is None
    assert baseline.state_dict().keys() == tiny_deit().state_dict().keys()
    assert (baseline(io["images"]) - io["logits"]).abs().max() > 0.1
    odd_heads = DeiT(
        30, 1, 3, rope=RopeConfig(enabled=False), image_size=8, patch_size=4, num_classes=2
    )
    assert odd_heads(pictures(1, 3, 8, 8)).shape == (1, 2)


@pytest.mark.parametrize("change", [{"rotate": 4}, {"projection": "exact"}, {"max_freq_lang": 1.0}])
def test_rope_options_reach_the_logits(io, change):
    other = tiny_deit(dataclasses.replace(TINY_ROPE, **change))
    assert (other(io["images"]) - io["logits"]).abs().max() > 0.01


def test_matmuls_that_are_cast_once_give_autocasts_numbers():
    model, x = small_deit().eval(), pictures(2, 3, 8, 12)
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16), casts_of_weights(model) as of_autocast:
            expected = model(x)
        cast_matmuls(model, torch.bfloat16)
        with casts_of_weights(model) as casts:
            assert torch.equal(model(x), expected)
    assert len(of_autocast) >= 8 * len(model.blocks)
    assert not casts
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert all(name.endswith(("scale", "token", "pos_embed")) or "gamma" in name for name in kept)


def test_without_classes_it_gives_features():
    model = small_deit(num_classes=0)
    x = pictures(2, 3, 8, 12)
    assert torch.equal(model(x), model.forward_features(x)[:, 0])
    assert not any(name.startswith("head") for name in model.state_dict())


# ---- initial weights


def test_initial_weights_follow_the_recipe():
    torch.manual_seed(0)
    model = create_model("deit-ti", image_size=64, patch_size=4)
    for name, tensor in model.state_dict().items():
        if name.endswith(("gamma_1", "gamma_2")):
            assert (tensor == 1e-4).all(), name
        elif name.endswith("scale"):
            assert (tensor == 1).all(), name
        elif name.endswith("bias") and "patch_embed" not in name:
            assert not tensor.any(), name
        elif "patch_embed" not in name:
            few = tensor.numel() < 1000
            assert tensor.std().item() == pytest.approx(0.02, rel=0.2 if few else 0.03), name
            assert abs(tensor.mean().item()) < 0.01, name


# ---- stochastic depth


def test_drawn_branches_are_kept_at_the_asked_rate_without_bias():
    model = small_deit(drop_path=0.25)
    drop_path_mask = model.drop_path_mask(20_000, torch.Generator().manual_seed(0))
    assert drop_path_mask.shape == (3, 2, 20_000)
    assert drop_path_mask.dtype == torch.float32
    assert drop_path_mask.unique().tolist() == pytest.approx([0, 4 / 3])
    per_branch = (drop_path_mask == 0).double().mean(dim=2)
    torch.testing.assert_close(per_branch, torch.full_like(per_branch, 0.25), rtol=0, atol=0.02)
    assert drop_path_mask.mean().item() == pytest.approx(1, abs=0.01)
    both = (drop_path_mask[:, 0] == 0) & (drop_path_mask[:, 1] == 0)
    assert both.double().mean().item() == pytest.approx(0.25**2, abs=0.01)


def test_drawn_branches_belong_to_the_generator():
    model = small_deit(drop_path=0.5)
    first, again, other = (
        model.drop_path_mask(64, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert small_deit().drop_path_mask(64, torch.Generator()) is None


def test_a_branch_that_is_not_kept_is_skipped():
    torch.manual_seed(0)
    block = Block(16, 2, 4.0, init_scale=0.5)
    x = pictures(2, 5, 16)
    assert torch.equal(block(x, None, torch.zeros(2, 2)), x)
    whole = block(x, None, None)
    torch.testing.assert_close(block(x, None, torch.ones(2, 2)), whole)
    # Rows are the two branches, columns the samples.
    mixed = block(x, None, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    torch.testing.assert_close(mixed[0], whole[0])
    assert torch.equal(mixed[1], x[1])
    attention_alone = block(x, None, torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    expected = x + block.gamma_1 * block.attn(block.norm1(x), None)
    torch.testing.assert_close(attention_alone, expected)
    doubled = block(x, None, torch.tensor([[2.0, 2.0], [0.0, 0.0]]))
    torch.testing.assert_close(doubled - x, 2 * (expected - x))


def test_each_block_takes_its_own_draws():
    model = small_deit()
    x, drop_path_mask = pictures(2, 3, 8, 12), torch.zeros(3, 2, 2)
    embedded = model.patch_embed(x) + model.pos_embed
    skipped = model.forward_features(x, drop_path_mask)
    torch.testing.assert_close(skipped[:, 1:], model.norm(embedded))
    drop_path_mask[1] = 1
    with_the_second = model.forward_features(x, drop_path_mask)
    del model.blocks[2], model.blocks[0]
    torch.testing.assert_close(with_the_second, model.forward_features(x))


def test_gradient_checkpointing_changes_no_gradient():
    x = pictures(4, 3, 8, 12)
    gradients = []
    for checkpointing in (False, True):
        model = small_deit(drop_path=0.5).train()
        model.grad_checkpointing = checkpointing
        drop_path_mask = model.drop_path_mask(4, torch.Generator().manual_seed(0))
        model(x, drop_path_mask).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


# ---- what cannot work


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("deit-bb", "deit-b"), ("DeiT-S", "deit-s"), ("deit_l", "deit-l")]
)
def test_an_unknown_architecture_suggests_the_nearest(wrong, nearest):
    with pytest.raises(ConfigError) as caught:
        create_model(wrong)
    assert wrong in caught.value.message
    assert f"did you mean {nearest}?" in caught.value.hint


def test_an_architecture_like_none_lists_them_all():
    with pytest.raises(ConfigError) as caught:
        create_model("resnet50")
    assert "did you mean" not in caught.value.hint
    assert all(arch in caught.value.hint for arch in DEIT_SIZES)


@pytest.mark.parametrize(
    ("image_size", "patch_size", "nearest"), [(30, 16, 32), ((32, 20), 16, 16), (4, 16, 16)]
)
def test_an_image_that_is_no_whole_number_of_patches_is_refused(image_size, patch_size, nearest):
    with pytest.raises(
        ConfigError, match=rf"not a multiple of the patch size, {patch_size}"
    ) as caught:
        create_model("deit-ti", image_size=image_size, patch_size=patch_size)
    assert str(nearest) in caught.value.hint


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(12, 8\), not \(8, 12\)"):
        small_deit()(pictures(1, 3, 12, 8))


@pytest.mark.parametrize("enabled", [True, False])
def test_a_width_that_does_not_divide_into_heads_is_refused(enabled):
    with pytest.raises(ConfigError):
        DeiT(34, 1, 4, rope=RopeConfig(enabled=enabled), image_size=8, patch_size=4)


def test_heads_that_rope_cannot_turn_are_refused():
    with pytest.raises(ConfigError, match="head dimension 10 is not a multiple of 4"):
        DeiT(30, 1, 3, rope=RopeConfig(), image_size=8, patch_size=4)


# ---- parts


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
