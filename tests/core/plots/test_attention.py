"""Maps lie where their patches are."""

from __future__ import annotations

import numpy as np
import pytest

from spiralrope_cli.core.plots.attention import attention_figure


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
