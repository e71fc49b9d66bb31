"""Which image stands where in a run: a pure function of seed and step."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor

from spiralrope_cli.core.config.dit_runs import TrainingRun
from spiralrope_cli.core.runtime.seeds import generator_for, seed_for


@functools.lru_cache(maxsize=2)
def epoch_order(num_images: int, repeats: int, seed: int, epoch: int) -> Tensor:
    """Image numbers of one epoch.

    Args:
        num_images: size of the training set.
        repeats: how often each picture stands in a row (repeated augmentation, by timm's
            sampler, which then covers a part of the set per epoch); 1 is plain shuffling.
        seed: of the run.
        epoch: counted from 0.

    Returns:
        [num_images] int64.
    """
    if repeats == 1:
        generator = generator_for(seed, "order", epoch)
        return torch.randperm(num_images, generator=generator)
    # The sampler knows no seed: it draws from the number of the epoch.
    return repeated_order(num_images, repeats, seed_for(seed, "order", epoch))


def repeated_order(num_images: int, repeats: int, epoch: int) -> Tensor:
    """[num_images] int64 in the order of the published repeated augmentation."""
    sampler = RepeatAugSampler(
        range(num_images), num_replicas=1, rank=0, num_repeats=repeats, selected_round=0
    )
    sampler.set_epoch(epoch)
    return torch.tensor(list(sampler))


def apart(batch_size: int, repeats: int) -> Tensor:
    """[batch_size] places within a step, so that repeats of a picture are not neighbours.

    Neighbours are mixed with each other, and a picture mixed with itself would be none.
    """
    places = torch.arange(batch_size)
    return torch.cat([places[first::repeats] for first in range(repeats)])


def step_slice(step: int, steps_per_epoch: int, batch_size: int) -> tuple[int, int]:
    """Epoch of a step, and the place of its first image in that epoch."""
    epoch, within = divmod(step, steps_per_epoch)
    return epoch, within * batch_size


def own_parts(rank: int, accumulation: int, micro: int) -> list[slice]:
    """The parts of a step's batch that one process takes, one per micro batch."""
    first = rank * accumulation
    return [slice(n * micro, (n + 1) * micro) for n in range(first, first + accumulation)]


class Places(NamedTuple):
    """One micro batch: epoch, part of the step, places in the epoch and image numbers, [B] each."""

    epoch: int
    part: slice
    places: Tensor
    numbers: Tensor


def own_places(run: TrainingRun, step: int, repeats: int, parts: list[slice]) -> Iterator[Places]:
    """What stands in the given parts of a step."""
    epoch, first = step_slice(step, run.steps_per_epoch, run.optim.batch_size)
    order = epoch_order(run.num_train, repeats, run.seed, epoch)
    places = first + apart(run.optim.batch_size, repeats)
    for part in parts:
        yield Places(epoch, part, places[part], order[places[part]])
