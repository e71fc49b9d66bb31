"""A grid shows every pixel as it is, and each label below its picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from spiralrope_cli.core.data.images import image_grid
from spiralrope_cli.core.plots import images as plotted
from spiralrope_cli.core.plots.curves import save_figure
from spiralrope_cli.core.plots.images import labelled_grid, samples_figure


@pytest.mark.parametrize("labels", [[], [str(n) for n in range(5)]])
def test_every_picture_is_there_with_its_own_pixels(labels, tmp_path):
    levels = torch.randint(20, 230, (5, 3, 8, 12), dtype=torch.uint8)
    figure = samples_figure(levels, labels, "title", columns=3)
    save_figure(figure, tmp_path / "grid.png")
    file = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    for picture in levels:
        for pixel in picture.flatten(1).T[::17]:
            assert (file == pixel.numpy()).all(-1).any()
    assert [text.get_text() for text in figure.axes[0].texts] == labels


def test_labels_stand_below_their_pictures_in_their_order():
    levels = torch.zeros(5, 3, 64, 64, dtype=torch.uint8)
    figure = samples_figure(levels, list("abcde"), "title", columns=3)
    places = [text.get_position() for text in figure.axes[0].texts]
    assert [x for x, _ in places[:2]] == [x for x, _ in places[3:]]
    assert places[0][0] < places[1][0] < places[2][0]
    grid = np.asarray(figure.axes[0].images[0].get_array())
    for x, y in places:
        assert (grid[int(y), int(x)] == 255).all()  # the white line below
        assert (grid[int(y) - 14, int(x)] == 0).all()


def test_long_titles_and_labels_fit():
    figure = samples_figure(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a" * 99], "long " * 12)
    figure.draw_without_rendering()
    title = figure.texts[0].get_window_extent()
    whole = figure.bbox
    assert whole.x0 <= title.x0
    assert title.x1 <= whole.x1
    assert title.y1 <= whole.y1
    assert figure.axes[0].texts[0].get_text().endswith("…")


def test_a_saved_grid_gets_its_labels_and_keeps_its_images(tmp_path, monkeypatch):
    images = torch.randint(256, (5, 3, 64, 70), dtype=torch.uint8)
    image_grid(images, columns=3).save(tmp_path / "grid.png")
    drawn = []
    monkeypatch.setattr(
        plotted, "samples_figure", lambda *args: drawn.append(args) or samples_figure(*args)
    )
    png = labelled_grid(tmp_path / "grid.png", ["a", "b", "c", "d", "e"], 3)
    assert png.startswith(b"\x89PNG")
    [(tiles, labels, _, columns)] = drawn
    assert torch.equal(tiles, images)
    assert (labels, columns) == (["a", "b", "c", "d", "e"], 3)
    assert labelled_grid(tmp_path / "grid.png", list("abcdefgh"), 5) is None
    assert labelled_grid(tmp_path / "grid.png", [], 3) is None
