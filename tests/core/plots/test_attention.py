"""The maps are those of the fused attention itself, after rotation; they lie on their patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spiralrope_cli import RopeConfig, create_model
from spiralrope_cli.core.plots.images import (
    Watch,
    attention_figure,
    attention_from,
    attention_weights,
)


@pytest.fixture(params=["deit", "deit without rope", "dit"])
def network(request):
    """A network with weights that make sharp attention, its inputs, and its attention modules."""
    torch.manual_seed(0)
    if request.param == "dit":
        rope = RopeConfig(rotate=2)
        model = create_model("dit-72x2x3-2", rope=rope, input_size=(8, 8), qk_norm=True)
        inputs = (torch.randn(2, 4, 8, 8), torch.tensor([1.0, 500.0]), torch.tensor([3, 4]))
    else:
        rope = RopeConfig(rotate=4, enabled=request.param == "deit")
        model = create_model("deit-64x3x2", rope=rope, image_size=(16, 24), patch_size=4)
        inputs = (torch.randn(2, 3, 16, 24),)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    return model.eval(), inputs, [block.attn for block in model.blocks]


@torch.no_grad()
def test_attention_times_v_is_what_the_fused_attention_gave(network):
    model, inputs, modules = network
    fused, plain = [], model(*inputs)
    for module in modules:
        module.proj.register_forward_pre_hook(lambda _, given: fused.append(given[0]))
    with Watch() as watch:
        watched = model(*inputs)
    assert torch.equal(watched, plain)
    assert len(watch.calls) == len(fused) == len(modules)
    for (q, k, v), out in zip(watch.calls, fused, strict=True):
        weights = attention_weights(q, k)
        assert weights.sum(-1) == pytest.approx(1)
        torch.testing.assert_close((weights @ v).transpose(1, 2).flatten(2), out, rtol=0, atol=1e-5)


@pytest.mark.parametrize("network", ["deit"], indirect=True)
def test_one_token_of_chosen_layers(network):
    model, inputs, _ = network
    maps = attention_from(model, *inputs, token=7, layers=[2, 0])
    assert maps.shape == (2, 2, 2, 1 + 4 * 6)
    with Watch() as watch, torch.no_grad():
        model(*inputs)
    for found, layer in zip(maps, (2, 0), strict=True):
        q, k, _ = watch.calls[layer]
        torch.testing.assert_close(found, attention_weights(q, k)[:, :, 7])


def test_keys_are_rotated_before_they_are_seen():
    seen = []
    for rotate in (1, 4):
        torch.manual_seed(0)
        model = create_model("deit-64x1x2", rope=RopeConfig(rotate=rotate), image_size=32).eval()
        torch.manual_seed(1)
        images = torch.randn(1, 3, 32, 32) * 30
        seen.append(attention_from(model, images, token=1, layers=[0]))
    assert not torch.equal(*seen)


def drawn(**changes):
    maps = np.random.default_rng(0).random((1, 3, 1 + 2 * 3))
    maps /= maps.sum(-1, keepdims=True)
    options = {"grid": (2, 3), "layers": [4], "heads": [0, 1, 5], "patch": (1, 2), "title": "x"}
    return maps, attention_figure(np.zeros((20, 30), np.uint8), maps, **{**options, **changes})


def test_each_head_has_its_map_and_several_have_a_mean():
    maps, figure = drawn()
    panels = figure.axes[:5]
    assert len(panels[0].images) == 1
    shown = [panel.images[1].get_array() for panel in panels[1:]]
    for one, row in zip(shown, [*maps[0], maps[0].mean(0)], strict=True):
        np.testing.assert_array_equal(one, row[1:].reshape(2, 3))
    told = [panel.get_title().split("\n") for panel in panels]
    assert [lines[0] for lines in told] == ["layer 4", "head 0", "head 1", "head 5", "mean"]
    assert (
        told[1][1] == f"max {100 * maps[0, 0, 1:].max():.2g} %, class {100 * maps[0, 0, 0]:.2g} %"
    )


def test_the_query_is_framed_in_every_panel():
    _, figure = drawn()
    for panel in figure.axes[:5]:
        assert {box.get_xy() for box in panel.patches} == {(20, 10)}
        assert (panel.patches[0].get_width(), panel.patches[0].get_height()) == (10, 10)
    _, figure = drawn(patch=None)
    assert not figure.axes[1].patches


@pytest.mark.parametrize(("layers", "heads", "panels"), [(1, 1, 2), (1, 12, 14), (3, 2, 12)])
def test_no_panel_is_empty(layers, heads, panels):
    maps = np.full((layers, heads, 7), 1 / 7)
    _, figure = drawn()
    figure = attention_figure(
        np.zeros((20, 30, 3), np.uint8),
        maps,
        grid=(2, 3),
        layers=range(layers),
        heads=range(heads),
        patch=None,
        title="x",
    )
    assert len(figure.axes) == panels + 1  # and the scale
    assert all(axis.images for axis in figure.axes[:panels])
