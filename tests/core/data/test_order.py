from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spiralrope_cli.core.data.order import epoch_order, own_parts, repeated_order, separate_repeats

SAMPLER = json.loads((Path(__file__).parents[2] / "golden" / "manifest.json").read_text())[
    "sampler"
]

law = settings(deadline=None, max_examples=60, derandomize=True)


@pytest.mark.parametrize(
    "row",
    SAMPLER["rows"],
    ids=lambda row: f"epoch{row['epoch']}-rank{row['rank']}of{row['world']}",
)
def test_repeated_order_is_the_published_one_dealt_out_to_the_ranks(row):
    order = repeated_order(SAMPLER["dataset_length"], SAMPLER["repeats"], row["epoch"])
    assert len(order) == SAMPLER["dataset_length"]
    dealt = order[row["rank"] :: row["world"]][: row["len"]]
    assert dealt[:20].tolist() == row["first_20"]
    assert dealt[-5:].tolist() == row["last_5"]
    assert dealt.sum().item() == row["sum"]
    assert len(dealt.unique()) == row["distinct"]


@law
@given(st.integers(1, 300), st.integers(0, 2**40), st.integers(0, 500))
def test_a_plain_epoch_holds_every_image_once(num_images, seed, epoch):
    order = epoch_order(num_images, 1, seed, epoch)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(num_images))


@law
@given(st.integers(1, 300), st.integers(2, 5), st.integers(0, 99))
def test_a_repeated_epoch_is_as_long_and_repeats_in_a_row(num_images, repeats, seed):
    order = epoch_order(num_images, repeats, seed, 0)
    assert len(order) == num_images
    whole = num_images // repeats * repeats
    groups = order[:whole].view(-1, repeats)
    assert (groups == groups[:, :1]).all()
    assert len(order.unique()) == -(-num_images // repeats)


@pytest.mark.parametrize("repeats", [1, 3])
def test_an_order_depends_on_seed_and_epoch_alone(repeats):
    first = epoch_order(500, repeats, 7, 3).clone()
    epoch_order.cache_clear()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(epoch_order(500, repeats, 7, 3), first)
    assert torch.equal(torch.get_rng_state(), state)
    others = [(8, 3), (7, 4), (3, 7)]
    assert not any(torch.equal(epoch_order(500, repeats, *other), first) for other in others)


@law
@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 16))
def test_the_parts_of_all_ranks_tile_the_batch(world, accumulation, micro):
    places = [
        place
        for rank in range(world)
        for part in own_parts(rank, micro, accumulation)
        for place in range(part.start, part.stop)
    ]
    assert places == list(range(world * accumulation * micro))
    assert len(own_parts(0, micro, accumulation)) == accumulation


@pytest.mark.parametrize(("batch_size", "repeats"), [(32, 3), (64, 3), (48, 2), (16, 1)])
def test_repeats_of_an_image_are_no_neighbours(batch_size, repeats):
    places = separate_repeats(batch_size, repeats)
    assert sorted(places.tolist()) == list(range(batch_size))
    images = places // repeats if repeats > 1 else places
    assert (images[1:] != images[:-1]).all()
