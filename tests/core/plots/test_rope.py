"""What is drawn of a Spiral RoPE is what it does."""

from __future__ import annotations

import itertools

import pytest
import torch

from spiralrope_cli import RopeConfig, SpiralRoPE
from spiralrope_cli.core.config.plots import ROPE_PANELS, RopePlot
from spiralrope_cli.core.plots.curves import save_figure
from spiralrope_cli.core.plots.rope import mixed_view, rope_figure, view_of
from spiralrope_cli.core.rope import clamped_fraction, first_mixed_frequencies, mixed_angles

VARIANTS = (
    RopeConfig(rotate=0),
    RopeConfig(rotate=1, truncate_percentage=0.5),
    RopeConfig(rotate=2, projection="exact"),
    RopeConfig(rotate=4, same_theta=True, truncate_percentage=0.5),
    RopeConfig(rotate=4, scaling="extrapolate"),
    RopeConfig(rotate=3, freqs_for="pixel"),
    RopeConfig(rotate=16),
)


def plot_of(*ropes, grid=(7, 7), head_dim=64, **more):
    sides = {"grid": grid, "pretrain_grid": grid, **more}
    return RopePlot(ropes=ropes, head_dim=head_dim, **sides)


def test_directions_are_evenly_spread_over_half_the_plane():
    found = view_of(RopeConfig(rotate=4), plot_of())
    assert found.across.square() + found.down.square() == pytest.approx(1)
    degrees = torch.atan2(-found.down, found.across).rad2deg().round(decimals=6)
    spread = sorted(set(degrees.tolist()))
    assert spread == pytest.approx([-90 + 22.5 * n for n in range(8)])


@pytest.mark.parametrize("config", VARIANTS)
def test_scores_and_reach_are_those_of_the_embedding(config):
    plot = plot_of(config, grid=(5, 9), pretrain_grid=(4, 6))
    found = view_of(config, plot)
    assert found.clamped.mean() == pytest.approx(clamped_fraction((5, 9), config, 64))
    cos, sin = SpiralRoPE(64, config, (4, 6)).tables((5, 9))
    middle = 2 * 9 + 4
    scores = (cos * cos[middle] + sin * sin[middle]).mean(1).view(5, 9)
    torch.testing.assert_close(found.scores, scores, rtol=0, atol=1e-5)
    assert found.scores[2, 4] == pytest.approx(1)


def test_learned_frequencies_are_drawn_as_they_rotate(tmp_path):
    torch.manual_seed(0)
    freqs = first_mixed_frequencies(16, 3, 2)[:, 1]
    plot = plot_of(RopeConfig(rope_kind="mixed"), grid=(5, 9), pretrain_grid=(4, 6), head_dim=16)
    found = mixed_view(freqs, plot)
    torch.testing.assert_close(
        torch.stack((found.across, found.down)) * found.frequency, freqs.flatten(1)
    )
    angle = mixed_angles(freqs[:, None], (5, 9), plot.ropes[0], (4, 6))[0]
    x = torch.polar(torch.ones_like(angle), angle).flatten(1)
    torch.testing.assert_close(found.scores.flatten(), (x @ x[2 * 9 + 4].conj()).real / 16)
    figure = rope_figure(plot, freqs)
    assert len(figure.axes) == 4
    drawn = [len(line.get_xdata()) for axis in figure.axes[:2] for line in axis.lines]
    assert drawn.count(8) == 4, "the pairs of both heads, in two panels"
    save_figure(figure, tmp_path / "rope.png")


def test_on_odd_grids_opposite_displacements_score_alike():
    scores = view_of(RopeConfig(rotate=4), plot_of()).scores
    torch.testing.assert_close(scores, scores.flip(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", VARIANTS, ids=str)
@pytest.mark.parametrize("grid", [(7, 7), (1, 6)])
def test_every_variant_is_drawn_in_full(config, grid, tmp_path):
    figure = rope_figure(plot_of(config, grid=grid))
    assert len(figure.axes) == 4
    _, frequencies, clamp, score = figure.axes
    dots = sum(len(line.get_xdata()) for line in frequencies.lines)
    rules = 1 + 2 * bool(config.truncate_percentage)  # lines of two points each
    assert dots - 2 * (2 if rules > 1 else 1) == 32
    assert clamp.images[0].get_array().shape == score.images[0].get_array().shape == grid
    save_figure(figure, tmp_path / "rope.png")
    assert (tmp_path / "rope.png").read_bytes().startswith(b"\x89PNG")


def test_several_have_a_row_each_and_one_panel_stands_alone():
    several = rope_figure(plot_of(*VARIANTS[:3]))
    assert len(several.axes) == 12
    titles = [axis.get_title(loc="left") for axis in several.axes]
    assert [title[:8] for title in titles[::4]] == ["rotate 0", "rotate 1", "rotate 2"]
    assert len(rope_figure(plot_of(VARIANTS[0], panels=("rose", "clamp", "score"))).axes) == 3
    ranges = {axis.images[0].get_clim() for axis in several.axes[3::4]}
    assert len(ranges) == 1  # or their mean_std could not be compared


def test_no_words_lie_upon_each_other():
    figure = rope_figure(plot_of(RopeConfig(rotate=4)))
    figure.draw_without_rendering()
    rose = figure.axes[0]
    boxes = [text.get_window_extent() for text in rose.texts]
    assert len(boxes) == 8
    degrees = [0.0, 22.5, 45.0, 67.5, 90.0, 112.5, 135.0, 157.5]
    assert sorted(float(text.get_text().rstrip("°")) for text in rose.texts) == degrees
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_equal_figures_are_equal_files(tmp_path):
    plot = plot_of(RopeConfig(rotate=2), panels=ROPE_PANELS)
    for name in ("first.svg", "again.svg"):
        save_figure(rope_figure(plot), tmp_path / name)
    first, again = ((tmp_path / name).read_bytes() for name in ("first.svg", "again.svg"))
    assert first == again
    assert b"<dc:date>" not in first
