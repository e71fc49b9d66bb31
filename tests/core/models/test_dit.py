from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comparing import casts_of_weights
from safetensors.torch import load_file

from spiralrope_cli import RopeConfig, create_model
from spiralrope_cli.core.config.models import DIT_SIZES
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.models.dit import DiT, sincos_pos_embed
from spiralrope_cli.core.models.factory import cast_matmuls
from spiralrope_cli.core.rope import build_angles, frequencies

GOLDEN = Path(__file__).parents[2] / "golden"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
CASES = ("dit_rope", "dit_sincos")
CHECKED_ROPE = RopeConfig(rotate=2, theta=10000, max_freq_lang=1.5)


def published_weights(case):
    tensors = load_file(GOLDEN / f"dit/{case}_weights.safetensors")
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def published_dit(case, **more):
    sizes = MANIFEST["dit"][case]
    model = DiT(
        sizes["hidden_size"],
        sizes["depth"],
        sizes["num_heads"],
        rope=CHECKED_ROPE if sizes["use_rope"] else RopeConfig(enabled=False),
        input_size=sizes["input_size"],
        patch_size=sizes["patch_size"],
        in_chans=sizes["in_channels"],
        num_classes=sizes["num_classes"],
        mlp_ratio=sizes["mlp_ratio"],
        **more,
    )
    weights = published_weights(case)
    weights.pop("rope_embedder.freqs", None)
    model.load_state_dict(weights)
    return model.eval()


def small_dit(input_size=(4, 6), patch_size=2, **more):
    """Random weights, with branches and outputs that count: a fresh model gives zeros."""
    torch.manual_seed(0)
    options = {"rope": RopeConfig(), "num_classes": 3, "in_chans": 2, **more}
    model = DiT(32, 2, 2, input_size=input_size, patch_size=patch_size, **options)
    for name, parameter in model.named_parameters():
        if "adaLN" in name or name.startswith("final_layer"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs(model, batch_size=2):
    """Latents, steps and labels."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(batch_size, model.in_chans, *model.input_size, generator=draw)
    t = torch.randint(0, 1000, (batch_size,), generator=draw)
    return x, t, torch.arange(batch_size) % model.num_classes


# ---- the published numbers


@pytest.fixture(params=CASES, scope="module")
def case(request):
    return request.param


@pytest.fixture(scope="module")
def io(case):
    return load_file(GOLDEN / f"dit/{case}_io.safetensors")


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_output_is_the_published_one(case, io, mode):
    out = getattr(published_dit(case), mode)()(io["x"], io["t"], io["y"])
    torch.testing.assert_close(out, io["out"], rtol=0, atol=2e-4)


def test_the_network_runs_in_float64_too(case, io):
    out = published_dit(case).double()(io["x"].double(), io["t"], io["y"])
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, io["out_f64"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_gradients_are_the_published_ones(case, io, grad_checkpointing):
    model = published_dit(case).train()
    model.grad_checkpointing = grad_checkpointing
    (model(io["x"], io["t"], io["y"]) * io["probe"]).sum().backward()
    expected = load_file(GOLDEN / f"dit/{case}_grads.safetensors")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {f"grad.{name}" for name in trained} == expected.keys()
    for name, parameter in trained.items():
        published = expected[f"grad.{name}"]
        assert (parameter.grad - published).norm() <= 1e-4 * published.norm(), name


@pytest.mark.parametrize("scale", ["1.5", "4.0"])
def test_the_guided_output_is_the_published_one(case, io, scale):
    model = published_dit(case)
    out = model.forward_with_cfg(io["x"], io["cfg_t"], io["cfg_y"], float(scale))
    torch.testing.assert_close(out, io[f"cfg{scale}_out"], rtol=0, atol=5e-4)


def test_the_published_frequency_buffer_is_ours():
    buffer = published_weights("dit_rope")["rope_embedder.freqs"]
    torch.testing.assert_close(buffer.double(), frequencies(CHECKED_ROPE, 24), rtol=1e-6, atol=0)


def test_the_published_fixed_positions_are_ours():
    published = published_weights("dit_sincos")["pos_embed"]
    torch.testing.assert_close(sincos_pos_embed((4, 4), 48), published, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("arch", "count"), MANIFEST["dit_parameter_counts"].items())
def test_parameter_counts_are_the_published_ones(arch, count):
    with torch.device("meta"):
        model = create_model(arch)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_the_state_dict_is_the_published_one_without_frequencies():
    with torch.device("meta"):
        ours = {name: list(t.shape) for name, t in create_model("dit-s2").state_dict().items()}
    published = dict(MANIFEST["dit_s2_state_dict"])
    del published["rope_embedder.freqs"]
    assert ours == published


# ---- sizes


@pytest.mark.parametrize("arch", DIT_SIZES)
@pytest.mark.parametrize("enabled", [True, False])
def test_every_architecture_learns_a_small_latent(arch, enabled, monkeypatch):
    # One block and few channels stand for all: the counts above see the full size.
    size = DIT_SIZES[arch]
    monkeypatch.setitem(DIT_SIZES, arch, size._replace(dim=2 * size.head_dim, heads=2, depth=1))
    torch.manual_seed(0)
    model = create_model(
        arch, rope=RopeConfig(enabled=enabled, rotate=4), num_classes=5, input_size=(8, 16)
    )
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    x, t, y = inputs(model)
    out = model(x, t, y)
    assert out.shape == (2, 8, 8, 16)
    out.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
    assert ("pos_embed" in model.state_dict()) is not enabled


@pytest.mark.parametrize(
    ("input_size", "patch_size", "grid"),
    [(8, 1, (8, 8)), (8, 8, (1, 1)), ((6, 10), 2, (3, 5)), ((4, 16), 4, (1, 4))],
)
@pytest.mark.parametrize("enabled", [True, False])
def test_any_rectangle_and_patch_size(input_size, patch_size, grid, enabled):
    model = small_dit(input_size, patch_size, rope=RopeConfig(enabled=enabled))
    assert model.grid == grid
    x, t, y = inputs(model)
    assert model(x, t, y).shape == (2, 4, *model.input_size)


def test_patches_come_out_where_they_went_in():
    model = small_dit((4, 6), 2)
    tokens = model.grid[0] * model.grid[1]
    values = torch.arange(tokens * 2 * 2 * 4).view(1, tokens, 16)  # row, column, channel
    out = model.unpatchify(values, model.grid)
    assert out.shape == (1, 4, 4, 6)
    # Token 4 is in row 1, column 1; of its 16 values, number 13 is row 1, column 1, channel 1.
    assert out[0, 1, 3, 3] == 4 * 16 + 13


def test_fixed_positions_tell_rows_from_columns():
    table = sincos_pos_embed((2, 3), 8).view(2, 3, 8)
    assert torch.equal(table[0, :, :4], table[1, :, :4])
    assert torch.equal(table[:, 0, 4:], table[:, 1, 4:])
    place = torch.tensor(2.0)
    expected = torch.stack([place.sin(), (place / 100).sin(), place.cos(), (place / 100).cos()])
    torch.testing.assert_close(table[0, 2, :4], expected)


def test_tokens_are_turned_by_their_own_row_and_column():
    model, seen = small_dit((4, 6), 2), []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    model(*inputs(model))
    angle = build_angles((2, 3), 16, RopeConfig(), (2, 3))
    assert torch.equal(seen[0], torch.stack((angle.cos(), angle.sin()), dim=-1).float())


def test_positions_refer_to_the_models_own_grid_unless_told():
    own, same, other = (small_dit(pretrain_grid=grid) for grid in (None, (2, 3), (4, 6)))
    given = inputs(own)
    assert torch.equal(own(*given), same(*given))
    assert (own(*given) - other(*given)).abs().max() > 1e-4


def test_with_rope_one_network_takes_any_latent():
    model = small_dit((4, 6))
    taller = small_dit((8, 2), pretrain_grid=(2, 3))
    assert torch.equal(model(*inputs(taller)), taller(*inputs(taller)))


# ---- initial weights


def test_initial_weights_follow_the_recipe():
    torch.manual_seed(0)
    for name, tensor in create_model("dit-ti2", num_classes=200).state_dict().items():
        spread = tensor.std().item()
        if name.endswith("bias") or "adaLN" in name or name.startswith("final_layer"):
            assert not tensor.any(), name
        elif name.startswith(("t_embedder", "y_embedder")):
            assert spread == pytest.approx(0.02, rel=0.03), name
        else:
            fan_out, fan_in = tensor.flatten(1).shape
            assert spread == pytest.approx((2 / (fan_in + fan_out)) ** 0.5, rel=0.05), name


def test_a_fresh_model_predicts_zeros():
    model = create_model("dit-ti2", num_classes=3, input_size=4)
    assert not model(*inputs(model)).any()


# ---- labels


@pytest.mark.parametrize("num_classes", [3, 10])
def test_dropped_labels_become_the_null_class(num_classes):
    model = small_dit(num_classes=num_classes).train()
    x, t, y = inputs(model, 3)
    dropped = model(x, t, y, torch.tensor([True, False, True]))
    null = torch.tensor([num_classes, 1, num_classes])
    assert torch.equal(dropped, model(x, t, null))
    assert (dropped - model(x, t, y))[[0, 2]].abs().amax((1, 2, 3)).min() > 1e-4
    assert torch.equal(model(x, t, y), model(x, t, y, torch.zeros(3, dtype=torch.bool)))


def test_drawn_drops_belong_to_the_generator_and_have_the_asked_rate():
    model = small_dit(label_dropout=0.25)
    first, again, other = (
        model.label_drop_mask(20_000, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert first.dtype == torch.bool
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.double().mean().item() == pytest.approx(0.25, abs=0.01)
    assert small_dit(label_dropout=0.0).label_drop_mask(8, torch.Generator()) is None


# ---- guidance


def test_guidance_follows_its_formula_on_the_asked_channels():
    model = small_dit(in_chans=4).eval()
    x, t, y = inputs(model)
    null = torch.full_like(y, model.num_classes)
    with torch.no_grad():
        labelled, unlabelled = model(x, t, y), model(x, t, null)
        both = (torch.cat((x, torch.zeros_like(x))), torch.cat((t, t)), torch.cat((y, null)))
        for channels, count in ((3, 3), (None, 4), (1, 1)):
            out = model.forward_with_cfg(*both, 2.5, channels)
            noise = unlabelled + 2.5 * (labelled - unlabelled)
            expected = torch.cat((labelled, unlabelled))
            expected[:, :count] = torch.cat((noise, noise))[:, :count]
            torch.testing.assert_close(out, expected)


def test_guidance_at_scale_one_is_the_labelled_half():
    model = small_dit().eval()
    x, t, y = inputs(model)
    both = (torch.cat((x, x)), torch.cat((t, t)), torch.cat((y, torch.full_like(y, 3))))
    with torch.no_grad():
        torch.testing.assert_close(model.forward_with_cfg(*both, 1.0, None)[:2], model(x, t, y))


# ---- options


def test_normalised_queries_and_keys_do_not_depend_on_their_length():
    x, t, y = inputs(small_dit())
    for qk_norm in (False, True):
        model = small_dit(qk_norm=qk_norm)
        before = model(x, t, y)
        for block in model.blocks:
            block.attn.qkv.weight.data[:64] *= 3  # The first 2C rows make queries and keys.
        assert torch.allclose(before, model(x, t, y), atol=1e-5) is qk_norm
        assert any("q_norm" in name for name in model.state_dict()) is qk_norm


def test_half_precision_stays_inside_the_blocks():
    model = small_dit().eval()
    given, seen = inputs(model), []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda *_: seen.append(_[2].dtype))
    model.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(*given)
    assert seen == [torch.bfloat16, torch.float32]
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, model(*given), rtol=0, atol=0.1)


def test_matmuls_that_are_cast_once_give_autocasts_numbers():
    model = small_dit(qk_norm=True).eval()
    given = inputs(model)
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16), casts_of_weights(model) as of_autocast:
            expected = model(*given)
        cast_matmuls(model, torch.bfloat16)
        with casts_of_weights(model) as casts:
            assert torch.equal(model(*given), expected)
    assert len(of_autocast) == 2 * 8
    assert not casts
    halves = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert all(".attn." in name or ".mlp." in name for name in halves)
    assert len(halves) == 2 * 8


def test_weights_in_bfloat16_take_any_latents():
    model = small_dit(qk_norm=True).eval()
    expected, given = model(*inputs(model)), inputs(model)
    out = model.to(torch.bfloat16)(*given)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.2)


# ---- names, and what cannot work


def test_the_papers_names_are_known():
    with torch.device("meta"):
        paper, ours = create_model("DiT-S/8"), create_model("dit-s8")
    assert paper.state_dict().keys() == ours.state_dict().keys()
    assert paper.patch_size == ours.patch_size == 8


@pytest.mark.parametrize(
    ("arch", "option", "known"),
    [("dit-s2", "image_size", "input_size"), ("deit-s", "input_size", "image_size")],
)
def test_an_option_of_the_other_network_is_refused(arch, option, known):
    with pytest.raises(ConfigError, match=f"{arch} has no option {option}") as caught:
        create_model(arch, **{option: 32})
    assert known in caught.value.hint


def test_latents_that_do_not_split_are_refused():
    with pytest.raises(ConfigError, match="30x32 does not split into patches of 4"):
        create_model("dit-s4", input_size=(30, 32))
    model, fixed = small_dit(), small_dit(rope=RopeConfig(enabled=False))
    t, y = torch.zeros(1), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\(5, 4\) do not split into patches of 2"):
        model(torch.zeros(1, 2, 5, 4), t, y)
    with pytest.raises(ValueError, match=r"\(6, 4\), not \(4, 6\)"):
        fixed(torch.zeros(1, 2, 6, 4), t, y)


def test_a_width_that_does_not_divide_is_refused():
    for heads, enabled in ((5, True), (3, True), (3, False)):
        with pytest.raises(ConfigError):
            DiT(30 if heads == 3 else 32, 1, heads, rope=RopeConfig(enabled=enabled), input_size=4)
