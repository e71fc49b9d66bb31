from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from spiralrope_cli import RopeConfig, SpiralRoPE
from spiralrope_cli.core import rope as rope_module
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.models.deit import DeiT
from spiralrope_cli.core.rope import (
    apply_rotary,
    build_angles,
    change_from_axial,
    clamped_fraction,
    frequencies,
    pair_layout,
    projections,
)

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {
    Path(case["file"]).stem.removeprefix("rope_"): case
    for case in json.loads((GOLDEN / "manifest.json").read_text())["rope"]
}
QUIRK = next(name for name in CASES if "quirk" in name)
FOLLOWED = [name for name in CASES if name != QUIRK]

# Derandomised: the same examples everywhere, and no database is written.
law = settings(deadline=None, max_examples=60, derandomize=True)

head_dims = st.integers(1, 20).map(lambda quarter: 4 * quarter)
rotates = st.integers(0, 9)
sides = st.integers(1, 9)
grids = st.tuples(sides, sides)


@st.composite
def configs(draw, **fixed):
    drawn = {
        "rotate": draw(rotates),
        "theta": draw(st.floats(2, 1e5)),
        "freqs_for": draw(st.sampled_from(["lang", "pixel"])),
        "max_freq": draw(st.floats(0.5, 20)),
        "truncate_percentage": draw(st.floats(0, 0.99)),
        "max_freq_lang": draw(st.floats(0.1, 3)),
        "min_freq_lang": draw(st.sampled_from([0.0, 0.01, 0.1])),
        "projection": draw(st.sampled_from(["clamped", "exact"])),
        "scaling": draw(st.sampled_from(["interpolate", "extrapolate"])),
    }
    return RopeConfig(**{**drawn, **fixed})


def golden_case(name):
    config = dict(CASES[name]["config"])
    head_dim, side, trained = (config.pop(key) for key in ("head_dim", "n", "pt_seq_len"))
    tensors = load_file(GOLDEN / CASES[name]["file"])
    return RopeConfig(**config), head_dim, side, trained, tensors


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rope_and_queries(rotate):
    return SpiralRoPE(16, RopeConfig(rotate=rotate), 4), gaussian(2, 3, 16, 16)


# ---- the published numbers


@pytest.mark.parametrize("name", FOLLOWED)
def test_frequencies_are_the_published_ones(name):
    config, head_dim, _, _, expected = golden_case(name)
    ours = frequencies(config, head_dim)
    torch.testing.assert_close(ours, expected["freqs"].double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FOLLOWED)
def test_tables_are_the_published_ones(name):
    config, head_dim, side, trained, expected = golden_case(name)
    cos, sin = SpiralRoPE(head_dim, config, trained).tables(side)
    tolerance = 1e-4 if config.freqs_for == "pixel" else 2e-5
    torch.testing.assert_close(cos, expected["cos"], rtol=0, atol=tolerance)
    torch.testing.assert_close(sin, expected["sin"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", FOLLOWED)
def test_rotated_queries_are_the_published_ones(name):
    config, head_dim, side, trained, expected = golden_case(name)
    ours = SpiralRoPE(head_dim, config, trained)(expected["x"].transpose(1, 2), grid=side)
    tolerance = 2e-4 if config.freqs_for == "pixel" else 3e-5
    torch.testing.assert_close(ours.transpose(1, 2), expected["out"], rtol=0, atol=tolerance)


def test_truncation_that_rounds_to_nothing_truncates_nothing():
    config, head_dim, side, trained, published = golden_case(QUIRK)
    assert not published["freqs"].any()
    whole = dataclasses.replace(config, truncate_percentage=0.0)
    assert torch.equal(frequencies(config, head_dim), frequencies(whole, head_dim))
    x = published["x"].transpose(1, 2)
    turned = SpiralRoPE(head_dim, config, trained)(x, grid=side)
    assert torch.equal(turned, SpiralRoPE(head_dim, whole, trained)(x, grid=side))
    assert not torch.equal(turned, x)


# ---- frequencies, and which channel gets which


@law
@given(head_dims, st.floats(2, 1e5), st.floats(0.1, 3), grids)
def test_rotate_0_and_rotate_1_are_the_same_axial_rope(head_dim, theta, highest, grid):
    plain, one = (
        RopeConfig(rotate=rotate, theta=theta, max_freq_lang=highest) for rotate in (0, 1)
    )
    both = [build_angles(grid, head_dim, config, (14, 14)) for config in (plain, one)]
    torch.testing.assert_close(*both, rtol=1e-9, atol=1e-9)


@law
@given(configs(), head_dims)
def test_a_long_series_is_dealt_out_so_that_each_half_has_every_frequency_once(config, head_dim):
    frequency, angle, in_first_half = pair_layout(config, head_dim)
    series = frequencies(config, head_dim)
    assert len(series) == head_dim // 4
    assert torch.equal(frequency[in_first_half], series)
    assert torch.equal(frequency[~in_first_half], series)
    directions = min(max(config.rotate, 1), head_dim // 4)
    assert len(angle.unique()) == directions
    assert ((angle >= 0) & (angle < math.pi / 2)).all()


@law
@given(st.integers(1, 6), st.integers(1, 4), st.floats(0, 0.99))
def test_same_theta_gives_every_direction_the_whole_short_series(rotate, quarter, truncate):
    config = RopeConfig(rotate=rotate, same_theta=True, truncate_percentage=truncate)
    head_dim = 8 * rotate * quarter
    frequency, angle, in_first_half = pair_layout(config, head_dim)
    series = frequencies(config, head_dim)
    assert len(series) == head_dim // (4 * rotate)
    for direction in angle.unique():
        for half in (in_first_half, ~in_first_half):
            assert torch.equal(frequency[half & (angle == direction)], series)


def test_same_theta_keeps_a_chunk_of_four_channels_together():
    frequency, angle, _ = pair_layout(RopeConfig(rotate=2, same_theta=True), 32)
    series = frequencies(RopeConfig(rotate=2, same_theta=True), 32)
    numbers = [series.tolist().index(value) for value in frequency.tolist()]
    assert numbers == [0, 1, 0, 1, 2, 3, 2, 3] * 2
    degrees = [round(math.degrees(value)) for value in angle.tolist()]
    assert degrees == [0, 0, 45, 45] * 4


def test_a_chunk_that_straddles_the_middle_keeps_its_direction():
    # D = 12: chunks of channels 0-3, 4-7, 8-11, and the second half starts at channel 6.
    frequency, angle, in_first_half = pair_layout(RopeConfig(rotate=3), 12)
    assert [round(math.degrees(value)) for value in angle.tolist()] == [0, 0, 30, 30, 60, 60]
    assert in_first_half.tolist() == [True, True, True, False, False, False]
    assert torch.equal(frequency[:3], frequency[3:])


@law
@given(configs(freqs_for="lang", theta=10000.0), head_dims)
def test_lang_frequencies_fall_from_the_highest_asked_for(config, head_dim):
    whole = frequencies(dataclasses.replace(config, truncate_percentage=0.0), head_dim)
    assert whole[0].item() == pytest.approx(config.max_freq_lang, rel=1e-12)
    assert (whole.diff() <= 0).all()
    if config.rotate and config.min_freq_lang and len(whole) > 1:
        assert whole[-1].item() == pytest.approx(config.min_freq_lang, rel=1e-12)


@pytest.mark.parametrize("rotate", [0, 1, 2, 4])
@pytest.mark.parametrize("lowest", [0.0, 0.01])
def test_the_only_frequency_of_four_channels_is_the_highest(rotate, lowest):
    config = RopeConfig(rotate=rotate, max_freq_lang=0.7, min_freq_lang=lowest)
    assert frequencies(config, 4).tolist() == pytest.approx([0.7])
    x = gaussian(1, 2, 9, 4)
    turned = SpiralRoPE(4, config, 3)(x)
    assert turned.isfinite().all()
    assert not torch.allclose(turned, x)


def test_pixel_frequencies_are_evenly_spaced_from_pi():
    ours = frequencies(RopeConfig(freqs_for="pixel", max_freq=10), 20)
    assert (ours / math.pi).tolist() == pytest.approx([1, 2, 3, 4, 5])


@law
@given(configs(freqs_for="lang"), head_dims, st.integers(1, 6))
def test_truncation_stills_exactly_the_lowest_frequencies(config, head_dim, side):
    config = dataclasses.replace(config, rotate=max(config.rotate, 1))
    series = frequencies(config, head_dim)
    cut = int(len(series) * config.truncate_percentage)
    kept = len(series) - cut
    whole = frequencies(dataclasses.replace(config, truncate_percentage=0.0), head_dim)
    assert torch.equal(series[:kept], whole[:kept])
    assert not series[kept:].any()
    x = gaussian(1, 1, side * side, head_dim)
    still = torch.cat([series == 0, series == 0]).repeat_interleave(2)
    turned = SpiralRoPE(head_dim, config, side)(x)
    assert torch.equal(turned[..., still], x[..., still])


def test_truncation_counts_the_short_series_of_same_theta():
    config = RopeConfig(rotate=2, same_theta=True, truncate_percentage=0.5)
    assert (frequencies(config, 64) == 0).tolist() == [False] * 4 + [True] * 4
    frequency, _, _ = pair_layout(config, 64)
    assert (frequency == 0).sum() == 16


@pytest.mark.parametrize("name", ["truncate_percentage", "min_freq_lang"])
@pytest.mark.parametrize("fixed", [{"rotate": 0}, {"freqs_for": "pixel"}])
def test_options_that_cannot_act_do_not(name, fixed):
    plain, given_too = RopeConfig(**fixed), RopeConfig(**fixed, **{name: 0.5})
    assert torch.equal(frequencies(plain, 32), frequencies(given_too, 32))


# ---- positions


def square_rule(side, head_dim, config, trained):
    """Phases as the published code states them: in [-1, 1], for square grids alone."""
    unit = torch.arange(side, dtype=torch.float64)
    unit = 2 * unit / (side - 1) - 1 if side > 1 else torch.zeros(1, dtype=torch.float64)
    u_x, u_y = unit.repeat(side)[:, None], unit.repeat_interleave(side)[:, None]
    frequency, phi, in_first_half = pair_layout(config, head_dim)
    s = torch.where(
        in_first_half, phi.sin() * u_x + phi.cos() * u_y, phi.cos() * u_x - phi.sin() * u_y
    )
    if config.projection == "clamped":
        s = s.clamp(-1, 1)
    factor = trained / side if config.scaling == "interpolate" else 1
    return (s + 1) / 2 * (side - 1) * factor * frequency


@law
@given(configs(), head_dims, sides, sides)
def test_the_rectangular_rule_is_the_square_one_on_squares(config, head_dim, side, trained):
    ours = build_angles((side, side), head_dim, config, (trained, trained))
    expected = square_rule(side, head_dim, config, trained)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@law
@given(configs(), head_dims, grids)
def test_turning_the_picture_swaps_the_halves_of_axial_rope(config, head_dim, grid):
    config = dataclasses.replace(config, rotate=1, scaling="extrapolate")
    rows, columns = grid
    angle = build_angles(grid, head_dim, config, (1, 1)).unflatten(0, (rows, columns))
    other = build_angles((columns, rows), head_dim, config, (1, 1)).unflatten(0, (columns, rows))
    half = head_dim // 4
    torch.testing.assert_close(angle[..., :half], other.transpose(0, 1)[..., half:])


def test_rows_turn_the_first_half_and_columns_the_second():
    angle = build_angles((2, 3), 8, RopeConfig(rotate=0, max_freq_lang=1.0), (2, 3))
    assert angle[:, 0].tolist() == pytest.approx([0, 0, 0, 1, 1, 1])
    assert angle[:, 2].tolist() == pytest.approx([0, 1, 2, 0, 1, 2])


@law
@given(configs(projection="exact", freqs_for="lang"), head_dims, st.tuples(sides, sides))
def test_exact_scores_depend_on_the_displacement_alone(config, head_dim, grid):
    assert moved_scores(config, head_dim, grid) < 1e-4


def test_clamped_scores_do_not():
    assert moved_scores(RopeConfig(rotate=2, projection="clamped"), 32, (5, 5)) > 0.01
    assert moved_scores(RopeConfig(rotate=1, projection="clamped"), 32, (5, 7)) < 1e-4


def moved_scores(config, head_dim, grid):
    """Largest change of a q.k score when both tokens move by one row or one column."""
    rope = SpiralRoPE(head_dim, config, grid)
    num = grid[0] * grid[1]
    q, k = (
        rope(gaussian(head_dim, seed=seed, dtype=torch.float64).expand(1, 1, num, -1).clone(), grid)
        for seed in (1, 2)
    )
    score = (q @ k.transpose(-2, -1)).view(*grid, *grid) / head_dim**0.5
    changes = [
        score[1:, :, 1:, :] - score[:-1, :, :-1, :],
        score[:, 1:, :, 1:] - score[:, :-1, :, :-1],
    ]
    return max(change.abs().max().item() for change in changes if change.numel()) if num > 1 else 0


@law
@given(configs(), head_dims, grids)
def test_the_clamp_touches_nothing_but_the_corners(config, head_dim, grid):
    clamped, exact = (
        build_angles(grid, head_dim, dataclasses.replace(config, projection=each), (7, 7))
        for each in ("clamped", "exact")
    )
    frequency, angle, in_first_half = pair_layout(config, head_dim)
    reach = torch.where(in_first_half, (grid[0] - 1) / 2, (grid[1] - 1) / 2)
    along = torch.where(in_first_half, *projections(grid, angle))
    inside = along.abs() <= reach
    assert torch.equal(clamped[inside], exact[inside])
    beyond = (along.abs() > reach + 1e-6) & (frequency > 1e-3)
    assert (clamped[beyond] != exact[beyond]).all()
    if grid[0] == grid[1]:
        near = distance_from_centre(grid) <= (grid[0] - 1) / 2
        assert torch.equal(clamped[near], exact[near])


def distance_from_centre(grid):
    y, x = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2 for side in grid)
    return (y[:, None].square() + x.square()).sqrt().flatten()


@pytest.mark.parametrize("rotate", [2, 4, 8])
def test_the_clamp_flattens_elongated_grids_much_more(rotate):
    config = RopeConfig(rotate=rotate)
    for side in (8, 14, 24):
        assert 0.04 < clamped_fraction((side, side), config, 64) < 0.125
    assert 0.17 < clamped_fraction((7, 28), config, 64) < 0.28
    assert clamped_fraction((7, 28), RopeConfig(rotate=1), 64) == 0


@law
@given(configs(), head_dims, grids, grids)
def test_interpolation_is_extrapolation_squeezed_by_the_grids_ratio(
    config, head_dim, grid, trained
):
    squeezed, counted = (
        build_angles(grid, head_dim, dataclasses.replace(config, scaling=each), trained)
        for each in ("interpolate", "extrapolate")
    )
    in_first_half = pair_layout(config, head_dim)[2]
    ratio = torch.where(in_first_half, trained[0] / grid[0], trained[1] / grid[1])
    torch.testing.assert_close(squeezed, counted * ratio)


@law
@given(configs(), head_dims)
def test_a_single_token_is_left_as_it_is(config, head_dim):
    x = gaussian(2, 1, 1, head_dim)
    assert torch.equal(SpiralRoPE(head_dim, config, 5)(x, grid=1), x)


# ---- the module


@law
@given(configs(), head_dims, grids, st.integers(0, 2))
def test_lengths_are_kept_pair_by_pair(config, head_dim, grid, prefix):
    x = gaussian(2, 1, prefix + grid[0] * grid[1], head_dim)
    turned = SpiralRoPE(head_dim, config, 4)(x, grid, prefix)
    assert turned.shape == x.shape
    lengths = [each.unflatten(-1, (-1, 2)).norm(dim=-1) for each in (turned, x)]
    torch.testing.assert_close(*lengths, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rotate", [1, 2, 3, 4, 5])
def test_head_sizes_that_the_published_code_refuses_work(rotate):
    rope = SpiralRoPE(72, RopeConfig(rotate=rotate), 16)
    x = gaussian(1, 16, 256, 72)
    turned = rope(x)
    assert turned.isfinite().all()
    assert len(pair_layout(rope.config, 72)[1].unique()) == rotate


@pytest.mark.parametrize("prefix", [1, 5])
def test_prefix_tokens_are_left_as_they_are(prefix):
    rope, patches = rope_and_queries(2)
    x = torch.cat((gaussian(2, 3, prefix, 16, seed=1), patches), dim=2)
    turned = rope(x, prefix_tokens=prefix)
    assert torch.equal(turned[:, :, :prefix], x[:, :, :prefix])
    assert torch.equal(turned[:, :, prefix:], rope(patches))


def test_a_side_stands_for_a_square():
    x = gaussian(1, 1, 25, 16)
    by_side, by_pair = SpiralRoPE(16, pretrain_grid=4), SpiralRoPE(16, pretrain_grid=(4, 4))
    assert torch.equal(by_side(x, grid=5), by_pair(x, grid=(5, 5)))
    assert torch.equal(by_side(x[:, :, :16]), by_side(x[:, :, :16], grid=(4, 4)))
    with pytest.raises(ConfigError):
        by_side(x)


def test_it_holds_no_state():
    rope, x = rope_and_queries(2)
    rope(x)
    assert rope.state_dict() == {}
    assert list(rope.parameters()) == list(rope.buffers()) == []
    assert "head_dim=16" in repr(rope)
    assert "rotate=2" in repr(rope)


def test_tables_are_float32_and_no_autocast_touches_them():
    outside = SpiralRoPE(64, RopeConfig(), 14)
    inside = SpiralRoPE(64, RopeConfig(), 14)
    with torch.autocast("cpu", torch.bfloat16):
        built_inside = inside.tables(14)
        cos_sin = inside.cos_sin(14, 1, torch.device("cpu"))
    assert cos_sin.dtype == torch.float32
    for ours, expected in zip(built_inside, outside.tables(14), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_touch_tables(default):
    expected = SpiralRoPE(16, RopeConfig(), 4).tables(4)
    torch.set_default_dtype(default)
    try:
        ours = SpiralRoPE(16, RopeConfig(), 4).tables(4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_tables_built_without_gradients_serve_training_later(mode):
    rope, x = rope_and_queries(2)
    with mode():
        seen = rope(x)
    x = x.clone().requires_grad_()
    turned = rope(x)
    turned.square().sum().backward()
    assert torch.equal(turned.detach(), seen)
    # The squared length does not change, so that its gradient is that of x itself.
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_a_table_is_built_once_per_grid(monkeypatch):
    grids_built = []

    def counted(grid, *rest):
        grids_built.append(grid)
        return build_angles(grid, *rest)

    monkeypatch.setattr(rope_module, "build_angles", counted)
    model = DeiT(32, 3, 2, rope=RopeConfig(), image_size=(8, 12), patch_size=4, num_classes=2)
    for size in (1, 2, 3):
        model(gaussian(size, 3, 8, 12)).sum().backward()
    assert grids_built == [(2, 3)]
    model.rope(gaussian(1, 2, 1 + 4, 16), grid=2, prefix_tokens=1)
    model(gaussian(1, 3, 8, 12))
    assert grids_built == [(2, 3), (2, 2)]


# ---- turning, and its gradient


def some_cos_sin(*shape):
    angle = gaussian(*shape, seed=3, dtype=torch.float64)
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def test_the_gradient_of_the_rotation():
    x = gaussian(2, 3, 5, 8, dtype=torch.float64).requires_grad_()
    cos_sin = some_cos_sin(5, 4)
    assert torch.autograd.gradcheck(apply_rotary, (x, cos_sin))
    assert torch.autograd.gradgradcheck(apply_rotary, (x, cos_sin))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_turns_the_same(dtype):
    rope = SpiralRoPE(16, RopeConfig(), 3)
    cos_sin = rope.cos_sin(3, 1, torch.device("cpu"))
    x, weight = gaussian(2, 4, 10, 16).to(dtype), gaussian(2, 4, 10, 16).to(dtype)
    results = []
    for call in (apply_rotary, torch.compile(apply_rotary, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        out = call(leaf, cos_sin)
        (out * weight).sum().backward()
        results.append((out, leaf.grad))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)


def test_turn_is_the_rotation_of_each_pair():
    x, cos_sin = gaussian(3, 5, 8), some_cos_sin(5, 4)
    a, b = x[..., 0::2].double(), x[..., 1::2].double()
    cos, sin = cos_sin.unbind(-1)
    expected = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    torch.testing.assert_close(apply_rotary(x, cos_sin.float()).double(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_rounded_once(dtype):
    rope, x = rope_and_queries(4)
    x = x.to(dtype)
    turned = rope(x)
    assert turned.dtype == dtype
    assert torch.equal(turned, rope(x.float()).to(dtype))
    x.requires_grad_()
    rope(x).float().square().sum().backward()
    assert x.grad.dtype == dtype
    # Each component carries the rounding of its partner in the pair.
    tolerance = 4 * torch.finfo(dtype).eps * x.detach().abs().max().item()
    torch.testing.assert_close(x.grad, 2 * x.detach(), rtol=0, atol=2 * tolerance)


def test_float64_stays_float64():
    rope, x = rope_and_queries(4)
    turned = rope(x.double())
    assert turned.dtype == torch.float64
    angle = build_angles((4, 4), 16, rope.config, (4, 4))
    exact = apply_rotary(x.double(), torch.stack((angle.cos(), angle.sin()), dim=-1))
    torch.testing.assert_close(turned, exact, rtol=0, atol=1e-6)


def strided(x, layout):
    if layout == "channels before tokens":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "tokens before heads":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "odd offset":
        return torch.cat((x[..., :1], x), dim=-1)[..., 1:]
    return x[:1, :1].expand_as(x)


@pytest.mark.parametrize(
    "layout", ["channels before tokens", "tokens before heads", "odd offset", "expanded"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_memory_layout_will_do(layout, dtype):
    rope, x = rope_and_queries(2)
    x = strided(x.to(dtype), layout)
    assert torch.equal(rope(x), rope(x.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_any_memory_layout_will_do(dtype):
    rope, x = rope_and_queries(2)
    q, k = (x.to(dtype).clone().requires_grad_() for _ in range(2))
    # Without a fused kernel the gradient of k arrives transposed, and that of a sum expanded.
    (rope(q) @ rope(k).transpose(-2, -1)).softmax(-1).square().sum().backward()
    assert q.grad.isfinite().all()
    assert k.grad.isfinite().all()
    rope(q).sum().backward()


# ---- options that cannot work


@pytest.mark.parametrize(
    ("option", "value", "others"),
    [
        ("rotate", -1, {}),
        ("truncate_percentage", -0.1, {}),
        ("truncate_percentage", 1.0, {}),
        ("truncate_percentage", math.nan, {}),
        ("theta", 1.0, {}),
        ("theta", -5.0, {}),
        ("theta", math.nan, {}),
        ("max_freq", 0.0, {"freqs_for": "pixel"}),
        ("max_freq", -2.0, {"freqs_for": "pixel"}),
        ("max_freq_lang", 0.0, {}),
        ("max_freq_lang", -1.5, {}),
        ("min_freq_lang", 2.0, {"max_freq_lang": 1.5}),
        ("min_freq_lang", -0.25, {}),
        ("freqs_for", "constant", {}),
        ("projection", "cut", {}),
        ("scaling", "stretch", {}),
    ],
)
def test_a_wrong_option_is_named_with_its_value_and_what_is_allowed(option, value, others):
    with pytest.raises(ConfigError) as caught:
        RopeConfig(**{option: value, **others})
    assert caught.value.message.startswith(f"--{option.replace('_', '-')} is {value}; it must be ")


@pytest.mark.parametrize("option", ["theta", "max_freq", "max_freq_lang"])
def test_an_infinite_option_is_refused(option):
    with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')} is inf"):
        RopeConfig(**{option: math.inf})


def test_an_empty_range_names_both_ends():
    with pytest.raises(ConfigError, match=r"--min-freq-lang is 2\.0.*--max-freq-lang.*1\.5"):
        RopeConfig(min_freq_lang=2.0, max_freq_lang=1.5)
    assert RopeConfig(min_freq_lang=1.5, max_freq_lang=1.5).min_freq_lang == 1.5


@pytest.mark.parametrize("rotate", [2, 4])
def test_pixel_with_same_theta_is_refused(rotate):
    with pytest.raises(ConfigError, match=rf"--same-theta.*pixel.*--rotate {rotate}"):
        RopeConfig(freqs_for="pixel", same_theta=True, rotate=rotate)


@pytest.mark.parametrize("rotate", [0, 1])
def test_pixel_with_same_theta_is_plain_axial_rope(rotate):
    x = gaussian(1, 1, 16, 32)
    plain, same = (
        SpiralRoPE(32, RopeConfig(freqs_for="pixel", rotate=rotate, same_theta=each), 4)(x)
        for each in (False, True)
    )
    assert torch.equal(plain, same)


@pytest.mark.parametrize("head_dim", [-4, 0, 2, 6, 30, 66])
@pytest.mark.parametrize("use", [SpiralRoPE, lambda d, c: frequencies(c, d)])
def test_heads_must_be_a_multiple_of_four(head_dim, use):
    with pytest.raises(ConfigError, match=rf"{head_dim} is not a multiple of 4"):
        use(head_dim, RopeConfig())


@pytest.mark.parametrize(("head_dim", "rotate"), [(72, 4), (72, 2), (64, 3), (64, 16), (12, 1)])
def test_same_theta_must_fit_the_heads(head_dim, rotate):
    with pytest.raises(ConfigError) as caught:
        SpiralRoPE(head_dim, RopeConfig(rotate=rotate, same_theta=True))
    assert f"--rotate {rotate} with --same-theta" in caught.value.message
    assert f"heads of {head_dim}" in caught.value.message
    for fitting in (
        int(word) for word in caught.value.hint.replace(",", " ").split() if word.isdigit()
    ):
        SpiralRoPE(head_dim, RopeConfig(rotate=fitting, same_theta=True))


def test_a_switched_off_rope_fits_any_head():
    RopeConfig(enabled=False).check_head_dim(30)


@pytest.mark.parametrize(
    ("shape", "grid", "prefix"),
    [((1, 1, 15, 16), 4, 0), ((1, 1, 16, 16), 4, 1), ((1, 1, 12, 16), (4, 4), 0)],
)
def test_a_token_count_that_is_no_grid_is_refused(shape, grid, prefix):
    with pytest.raises(ConfigError, match=rf"{shape[2]} tokens.*4x4 with {prefix} prefix"):
        SpiralRoPE(16, RopeConfig(), 4)(torch.zeros(shape), grid, prefix)


def test_heads_of_another_size_are_refused():
    with pytest.raises(ConfigError, match=r"32 channels do not fit.*16 channels"):
        SpiralRoPE(16, RopeConfig(), 4)(torch.zeros(1, 1, 16, 32))


@pytest.mark.parametrize(
    ("grid", "trained"), [((0, 4), (4, 4)), ((4, 4), (4, 0)), ((-1, 1), (1, 1))]
)
def test_a_grid_without_tokens_is_refused(grid, trained):
    with pytest.raises(ConfigError, match="has no tokens"):
        build_angles(grid, 16, RopeConfig(), trained)


# ---- options that cannot act


EVERY_OPTION = {field.name for field in dataclasses.fields(RopeConfig)}


@pytest.mark.parametrize(
    ("changes", "inert"),
    [
        ({}, {"max_freq"}),
        ({"min_freq_lang": 0.1}, {"max_freq", "theta"}),
        ({"rotate": 1}, {"max_freq", "projection"}),
        ({"rotate": 1, "same_theta": True}, {"max_freq", "same_theta", "projection"}),
        ({"rotate": 0}, {"max_freq", "min_freq_lang", "truncate_percentage", "projection"}),
        (
            {"freqs_for": "pixel"},
            {"theta", "max_freq_lang", "min_freq_lang", "truncate_percentage"},
        ),
        (
            {"freqs_for": "pixel", "rotate": 0},
            {"theta", "max_freq_lang", "min_freq_lang", "truncate_percentage", "projection"},
        ),
        ({"enabled": False}, EVERY_OPTION - {"enabled"}),
    ],
)
def test_inert_options_are_told_with_the_reason(changes, inert):
    told = RopeConfig(**changes).inert_options(EVERY_OPTION)
    assert {name for name, _ in told} == inert
    assert all(reason for _, reason in told)


@law
@given(configs(), st.booleans(), st.integers(1, 8))
def test_a_told_option_really_does_nothing(config, same_theta, eighth):
    same_theta = same_theta and config.rotate <= 1
    config = dataclasses.replace(config, same_theta=same_theta)
    before = build_angles((3, 5), 8 * eighth, config, (4, 4))
    other = {
        "theta": config.theta * 2,
        "max_freq": config.max_freq + 1,
        "max_freq_lang": config.max_freq_lang + 1,
        "min_freq_lang": 0.05,
        "truncate_percentage": 0.75,
        "same_theta": not same_theta,
        "projection": "exact" if config.projection == "clamped" else "clamped",
    }
    told = config.inert_options(set(other))
    assert told
    for name, _ in told:
        changed = dataclasses.replace(config, **{name: other[name]})
        assert torch.equal(build_angles((3, 5), 8 * eighth, changed, (4, 4)), before)


def test_options_that_were_not_given_are_not_told():
    assert RopeConfig(freqs_for="pixel").inert_options({"rotate", "max_freq"}) == []
    assert RopeConfig(rotate=0).inert_options({"truncate_percentage"}) == [
        ("truncate_percentage", "--rotate is 0")
    ]


@pytest.mark.parametrize(
    ("side", "head_dim", "two", "four"),
    [(4, 16, 0.006, 0.383), (4, 32, 0.046, 0.023), (7, 32, 0.082, 0.042), (14, 64, 0.354, 0.245)],
)
def test_how_much_a_rotation_differs_from_axial_rope(side, head_dim, two, four):
    grid = (side, side)
    for rotate, expected in ((0, 0), (1, 0), (2, two), (4, four)):
        change = change_from_axial(grid, head_dim, RopeConfig(rotate=rotate))
        assert change == pytest.approx(expected, abs=5e-4)
    # As it is defined: by queries that both rotate.
    torch.manual_seed(0)
    q = torch.randn(400, 1, side * side, head_dim, dtype=torch.float64)
    spiral, axial = (SpiralRoPE(head_dim, RopeConfig(rotate=n), grid)(q) for n in (2, 0))
    measured = ((spiral - axial).square().mean() / q.square().mean()).sqrt().item()
    assert measured == pytest.approx(two, abs=0.03)
