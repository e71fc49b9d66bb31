"""`--shard`: weights, gradients, averages and optimizer state split over the processes (FSDP2).

A process gathers the weights of a block before it computes the block, forward and backward, and
frees them after it. Files hold whole tensors, as without sharding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate

from spiralrope_cli.core.models.deit import DeiT
from spiralrope_cli.core.runtime import distributed


def shard(model: nn.Module, device: torch.device) -> None:
    """Splits a network in place over all processes, block by block, and moves it to a device.

    Weights are gathered in float32. A `MixedPrecisionPolicy` would cast all weights of a block, but
    autocast casts those of its matmuls alone; without one the numbers are those of a whole network.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for part in (*cast(DeiT, model).blocks, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def is_sharded(model: nn.Module) -> bool:
    """Whether its forward pass is a collective."""
    return isinstance(model, FSDPModule)


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Norm of all elements; a collective if the tensors are sharded."""
    listed = list(tensors)
    norm = nn.utils.get_total_norm([t.to_local() if isinstance(t, DTensor) else t for t in listed])
    if any(isinstance(t, DTensor) for t in listed):
        norm = distributed.all_reduce(norm.square()).sqrt()
    return norm


def whole(value: Any) -> Any:
    """A state dict with whole tensors in place of sharded ones; a collective if there are any.

    They come to the CPU one after the other; only the first process keeps them.
    """
    if isinstance(value, dict):
        return {name: whole(each) for name, each in value.items()}
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor()
    return full.cpu() if distributed.get_rank() == 0 else None


def parts_of(tensors: dict[Any, Tensor], like: dict[Any, Tensor]) -> dict[Any, Tensor]:
    """The parts of this process of whole tensors, which it has read, where `like` is sharded."""

    def part(full: Tensor, like: Tensor | None) -> Tensor:
        if not isinstance(like, DTensor) or full.ndim == 0:
            return full
        mesh = like.device_mesh
        same = DTensor.from_local(full.to(like.device), mesh, [Replicate()], run_check=False)
        return same.redistribute(placements=like.placements).clone()  # not a view of the whole

    return {name: part(full, like.get(name)) for name, full in tensors.items()}
