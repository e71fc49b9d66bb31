"""The order of the images in training: a function of the seed and the epoch.

So it is the same for any number of processes and any micro-batch size. The *place* of an image is
its index in the order of an epoch.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator

import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor

from spiralrope_cli.core.data.streams import GROUP
from spiralrope_cli.core.runtime.seeds import generator_for, seed_for


@functools.lru_cache(maxsize=2)
def epoch_order(
    num_images: int, repeats: int, seed: int, epoch: int, shard_counts: tuple[int, ...] = ()
) -> Tensor:
    """[num_images] int64, the order of the images in one epoch.

    Args:
        num_images: size of the training set.
        repeats: augmented copies per image, next to each other (repeated augmentation by timm's
            sampler; an epoch then covers a part of the set); 1: shuffling only.
        seed: seed of the run.
        epoch: from 0.
        shard_counts: images of each shard of a stream: the same order, but one group of shards
            after the other.
    """
    if repeats == 1:
        generator = generator_for(seed, "order", epoch)
        order = torch.randperm(num_images, generator=generator)
    else:  # the sampler has no seed; it uses the number of the epoch as one
        order = repeated_order(num_images, repeats, seed_for(seed, "order", epoch))
    num_shards, num_groups = len(shard_counts), num_shard_groups(shard_counts)
    if num_groups <= 1:
        return order
    shard_places = torch.randperm(num_shards, generator=generator_for(seed, "shards", epoch))
    groups = (shard_places * num_groups // num_shards).repeat_interleave(torch.tensor(shard_counts))
    return order[groups[order].argsort(stable=True)]


def repeated_order(num_images: int, repeats: int, epoch: int) -> Tensor:
    """[num_images] int64 in the order of the published repeated augmentation."""
    sampler = RepeatAugSampler(
        range(num_images), num_replicas=1, rank=0, num_repeats=repeats, selected_round=0
    )
    sampler.set_epoch(epoch)
    return torch.tensor(list(sampler))


def separate_repeats(batch_size: int, repeats: int) -> Tensor:
    """[batch_size] places within a step, reordered so that copies of an image are not neighbours.

    Mixup mixes neighbours, and an image mixed with its own copy is not mixed.
    """
    places = torch.arange(batch_size)
    return torch.cat([places[first::repeats] for first in range(repeats)])


def own_parts(rank: int, micro: int, grad_accum_steps: int) -> list[slice]:
    """The parts of a step's batch that one process computes, one per micro-batch."""
    first = rank * grad_accum_steps
    return [slice(n * micro, (n + 1) * micro) for n in range(first, first + grad_accum_steps)]


# --- Shards of a stream


def num_shard_groups(shard_counts: tuple[int, ...]) -> int:
    """The number of groups of at most `GROUP` shards."""
    return -(-len(shard_counts) // GROUP)


def shards_ahead(
    order: Callable[[int], Tensor],
    shard_counts: tuple[int, ...],
    batch_size: int,
    steps_per_epoch: int,
    steps: range,
) -> Iterator[list[int]]:
    """For each step the shards to fetch: first its own, then those of one group later.

    `order` is `epoch_order` by the epoch.
    """
    ends = torch.tensor(shard_counts).cumsum(0)
    ahead = max(1, steps_per_epoch // max(1, num_shard_groups(shard_counts)))
    asked: deque[int] = deque(maxlen=2 * GROUP)
    for step in steps:
        new: list[int] = []
        wanted = (step, step + ahead) if step == steps.start else (step + ahead,)
        for at in wanted if shard_counts else ():
            if at in steps:
                epoch, within = divmod(at, steps_per_epoch)
                images = order(epoch)[within * batch_size : (within + 1) * batch_size]
                shards = torch.bucketize(images, ends, right=True).unique().tolist()
                new += [shard for shard in shards if shard not in (*asked, *new)]
        asked.extend(new)
        yield new
