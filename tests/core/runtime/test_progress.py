"""Progress counts whole ones, however finely it is told of them; sizes are told in words."""

from __future__ import annotations

import itertools

import pytest

from spiralrope_cli.core.runtime.progress import Pace, human_size


@pytest.mark.parametrize(("images", "parts"), [(7, 3), (3, 7), (64, 251), (1, 1)])
def test_parts_add_up_to_whole_images_and_all_of_them(images, parts):
    pace = Pace(total=2 + images + 5, done=2, parts=parts)
    seen = [pace.done]
    for _ in range(parts):
        pace.advance(images)
        seen.append(pace.done)
    steps = [after - before for before, after in itertools.pairwise(seen)]
    assert pace.done == 2 + images
    assert max(steps) - min(steps) <= 1
    for _ in range(parts):
        pace.advance(5)
    assert pace.done == pace.total


def test_it_never_counts_beyond_the_total():
    pace = Pace(total=5, done=0)
    pace.advance(4)
    pace.advance(4)
    assert pace.done == 5


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1.5e6, "1.5 MB"), (2e12, "2.000 TB"), (1e18, "1,000,000 TB")],
)
def test_sizes_are_told_as_download_pages_do(size, text):
    assert human_size(size) == text
