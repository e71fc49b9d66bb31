from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from spiralrope_cli.core.data.batches import TrainingData
from spiralrope_cli.core.data.order import epoch_order

law = settings(deadline=None, max_examples=60, derandomize=True)


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
