"""What training changes, one optimizer step, and loss and speed since the last log point."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spiralrope_cli.core.config.training import OptimConfig
from spiralrope_cli.core.runtime import distributed
from spiralrope_cli.core.training.optim import build_optimizer

Micro = TypeVar("Micro")
NEVER = 2**62


@dataclass
class TrainState:
    """All that training changes, and so all that a checkpoint holds.

    Attributes:
        model: raw weights.
        ema: averaged weights, in `ema.module`.
        optimizer: AdamW.
        step: optimizer steps done; data order, augmentation, stochastic depth and learning rate
            follow from it.
        best: figures of the best validation so far, with their step.
    """

    model: nn.Module
    ema: ModelEmaV3
    optimizer: torch.optim.Optimizer
    step: int = 0
    best: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def create(cls, model: nn.Module, optim: OptimConfig) -> TrainState:
        """A state at step 0 whose averaged weights are the initial ones."""
        ema = ModelEmaV3(model, decay=optim.ema_decay)
        ema.requires_grad_(False)
        return cls(model, ema, build_optimizer(model, optim))


def train_step(
    state: TrainState,
    forward: nn.Module,
    micro_batches: Sequence[Micro],
    loss_fn: Callable[[nn.Module, Micro], Tensor],
    *,
    clip_grad: float = 0.0,
    want_grad_norm: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One optimizer step over this process's share of the batch, then one EMA update.

    Nothing here waits for the device.

    Args:
        state: model, averaged weights and optimizer; its step is counted up.
        forward: the model as it is called, wrapped for compilation and several processes.
        micro_batches: all of the same size.
        loss_fn: mean loss of one micro batch.
        clip_grad: largest gradient norm, 0 for none.
        want_grad_norm: whether the norm is asked for where nothing is clipped.

    Returns:
        mean loss of this process's share, and the gradient norm or None.
    """
    losses = []
    for number, micro in enumerate(micro_batches, start=1):
        last = number == len(micro_batches)
        with _keep_local(forward, until_last=last):
            loss = loss_fn(forward, micro)
            (loss / len(micro_batches)).backward()
        losses.append(loss.detach())
    grad_norm = None
    if clip_grad or want_grad_norm:
        grads = [p.grad for p in state.model.parameters() if p.grad is not None]
        grad_norm = nn.utils.get_total_norm(grads)
        if clip_grad:
            nn.utils.clip_grads_with_norm_(state.model.parameters(), clip_grad, grad_norm)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.ema.update(state.model)
    state.step += 1
    return torch.stack(losses).mean(), grad_norm


def _keep_local(forward: nn.Module, *, until_last: bool) -> contextlib.AbstractContextManager[None]:
    """Gradients travel between processes once per step, with the last micro batch."""
    if isinstance(forward, DistributedDataParallel) and not until_last:
        return forward.no_sync()
    return contextlib.nullcontext()


class LossMeter:
    """Mean loss, and the first step whose loss was not finite, both kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self._sum = torch.zeros((), device=device)
        self._first_bad = torch.full((), NEVER, dtype=torch.int64, device=device)
        self._num_steps = 0

    def add(self, step: int, loss: Tensor) -> None:
        """Takes the loss of one step, without waiting for it."""
        self._sum += loss
        self._num_steps += 1
        bad = torch.where(torch.isfinite(loss), NEVER, step)
        self._first_bad = torch.minimum(self._first_bad, bad)

    def read(self) -> tuple[float, int | None, bool]:
        """Waits for the device and starts anew.

        Returns:
            mean loss over steps and processes, the first non-finite step or None, and whether
            this process saw it.
        """
        mean = (
            distributed.all_reduce_sum(self._sum / max(self._num_steps, 1))
            / distributed.world_size()
        )
        mine = self._first_bad.clone()
        first = int(distributed.all_reduce_min(self._first_bad).item())
        self._sum = torch.zeros_like(self._sum)
        self._num_steps = 0
        return mean.item(), None if first == NEVER else first, int(mine.item()) == first


class Clock:
    """Images per second between log points, without the time that validation and saving take."""

    def __init__(self, batch_size: int, step: int) -> None:
        self._batch_size = batch_size
        self._since = (time.perf_counter(), step)
        self._paused = 0.0

    def rate(self, step: int) -> float:
        """Images per second since the last call."""
        now, (then, first) = time.perf_counter(), self._since
        seconds = now - then - self._paused
        self._since, self._paused = (now, step), 0.0
        return self._batch_size * (step - first) / max(seconds, 1e-9)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves out what happens inside."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start
