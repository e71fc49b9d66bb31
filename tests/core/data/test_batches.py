from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spiralrope_cli.core.data.batches import (
    TrainingData,
    epoch_order,
    own_parts,
    repeated_order,
    separate_repeats,
)

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


@law
@given(st.integers(1, 50), st.integers(1, 64))
def test_the_steps_of_an_epoch_tile_it(steps_per_epoch, batch_size):
    num_train = steps_per_epoch * batch_size + 1  # the last image of an order is left out
    run = SimpleNamespace(
        optim=SimpleNamespace(batch_size=batch_size),
        num_train=num_train,
        steps_per_epoch=steps_per_epoch,
        seed=3,
    )
    data = TrainingData(run, [slice(0, batch_size)], read=None, finish=None)
    seen = list(data.batch_indices(0, 2 * steps_per_epoch))
    assert [at.epoch for at in seen] == [0] * steps_per_epoch + [1] * steps_per_epoch
    for epoch in range(2):
        of_epoch = seen[epoch * steps_per_epoch : (epoch + 1) * steps_per_epoch]
        places = [place for at in of_epoch for place in at.places]
        assert places == list(range(num_train - 1))
        order = epoch_order(num_train, 1, 3, epoch).tolist()
        assert [index for at in of_epoch for index in at.indices] == order[:-1]
    assert [at.first for at in seen] == [n * batch_size for n in range(len(seen))]


@pytest.mark.parametrize(("batch_size", "repeats"), [(32, 3), (64, 3), (48, 2), (16, 1)])
def test_repeats_of_an_image_are_no_neighbours(batch_size, repeats):
    places = separate_repeats(batch_size, repeats)
    assert sorted(places.tolist()) == list(range(batch_size))
    images = places // repeats if repeats > 1 else places
    assert (images[1:] != images[:-1]).all()
