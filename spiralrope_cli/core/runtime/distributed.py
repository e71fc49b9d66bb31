"""The process group: who we are, and sums over all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

SLOWEST = timedelta(minutes=30)
"""How long one process may be busy alone, with a checkpoint or the first look at a data set."""


def rank() -> int:
    """Number of this process, 0 without a group."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes in the group, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(device: torch.device) -> None:
    """Joins the group that the launcher's environment describes; NCCL for GPUs, else gloo."""
    if world_size() > 1 and not dist.is_initialized():
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", timeout=SLOWEST, device_id=device if on_gpu else None
        )


def stop() -> None:
    """Leaves the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Waits for everybody."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Lets the first process do something before all others do the same."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def total(value: Tensor) -> Tensor:
    """Sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def smallest(value: Tensor) -> Tensor:
    """Minimum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return value


def gathered(value: T) -> list[T]:
    """What every process holds, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gathered_rows(rows: Tensor) -> Tensor | None:
    """Rows [n, ...] of all processes by rank, on the first process; None on the others."""
    if not dist.is_initialized():
        return rows
    counts = gathered(len(rows))
    # A collective takes tensors of one shape alone.
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts] if rank() == 0 else None
    dist.gather(padded, parts)
    if parts is None:
        return None
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


def largest(value: Tensor) -> Tensor:
    """Maximum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value
