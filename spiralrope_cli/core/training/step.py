"""One optimizer step (AdamW, learning rate, gradients, EMA), mean loss, a clock, and `--shard`."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed import ReduceOp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from spiralrope_cli.core.config.training import OptimConfig
from spiralrope_cli.core.models.deit import DeiT
from spiralrope_cli.core.runtime import distributed

Micro = TypeVar("Micro")
NO_DECAY_NAMES = ("pos_embed", "cls_token", "freqs")
NEVER = 2**62
JOINED_AT = 1000


# --- Optimizer and learning rate


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices with weight decay; norms, biases, positions and cls_token without."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or name.rpartition(".")[2] in NO_DECAY_NAMES
            (free if plain else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


def freeze_but(model: nn.Module, freeze: str) -> None:
    """Freezes parameters of a DeiT, by `--freeze`: head-only, attn-only or none."""
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        trained = freeze == "none" or parts[0] == "head"
        if freeze == "attn-only":
            trained = trained or "attn" in parts or parts[0] in ("pos_embed", "rope")
        parameter.requires_grad_(trained)


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW; fused where the device supports it."""
    return torch.optim.AdamW(
        parameter_groups(model, optim.weight_decay),
        lr=optim.peak_lr,
        betas=optim.betas,
        fused=next(model.parameters()).device.type in ("cuda", "cpu", "mps"),
    )


def lr_at(step: int, total_steps: int, steps_per_epoch: int, optim: OptimConfig) -> float:
    """Learning rate of optimizer step `step`, from 0. A pure function, so resuming is exact.

    `cosine`: linear warm-up from warmup_lr to the peak, then half a cosine to min_lr.
    `published`: the schedule of the published runs, with its two quirks. It changes once per
    epoch, and one epoch late; and the cosine starts at epoch 0, not after the warm-up, so the
    peak is never reached.
    """
    peak, warmup = optim.peak_lr, optim.warmup_epochs * steps_per_epoch
    if optim.schedule == "constant":
        return peak
    if optim.schedule == "published":
        epoch = max(step // steps_per_epoch - 1, 0)
        if epoch < optim.warmup_epochs:
            return optim.warmup_lr + epoch * (peak - optim.warmup_lr) / optim.warmup_epochs
        return _cosine(min(epoch / optim.epochs, 1.0), peak, optim.min_lr)
    if step < warmup:
        return optim.warmup_lr + (peak - optim.warmup_lr) * step / warmup
    return _cosine((step - warmup) / max(total_steps - 1 - warmup, 1), peak, optim.min_lr)


def _cosine(fraction: float, high: float, low: float) -> float:
    return low + (high - low) * (1 + math.cos(math.pi * fraction)) / 2


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Sets the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


# --- The step


@dataclass
class TrainState:
    """What training changes, and a checkpoint holds.

    `step` is the number of optimizer steps done; data order, augmentation, stochastic depth and
    learning rate are functions of it. `best` has the metrics of the best validation, and its step.
    """

    model: nn.Module
    ema: ModelEmaV3
    optimizer: Optimizer
    step: int = 0
    best: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def create(
        cls, model: nn.Module, optim: OptimConfig, shard_on: torch.device | None = None
    ) -> TrainState:
        """The state at step 0; the averaged weights are the initial ones.

        With `shard_on` all of it is split over the processes; the model is then on the CPU.
        """
        ema = ModelEmaV3(model, decay=optim.ema_decay, use_warmup=optim.ema_warmup)
        ema.requires_grad_(False)
        for each in (model, ema.module) if shard_on else ():
            shard(each, cast(torch.device, shard_on))
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
    """One optimizer step on this process's part of the batch, then one EMA update.

    Does not wait for the device.

    Args:
        state: model, averaged weights and optimizer; `step` is increased by 1.
        forward: the model, wrapped for compilation and several processes.
        micro_batches: all of the same size.
        loss_fn: (forward, micro-batch) -> mean loss.
        clip_grad: largest gradient norm; 0: no clipping.
        want_grad_norm: compute the norm even without clipping.

    Returns:
        mean loss of this process's part, and the gradient norm or None.
    """
    losses = []
    for number, micro in enumerate(micro_batches, start=1):
        with _gradient_sync(forward, number == len(micro_batches)):
            loss = loss_fn(forward, micro)
            (loss / len(micro_batches)).backward()
        losses.append(loss.detach())
    grad_norm = None
    if clip_grad or want_grad_norm:
        grads = [p.grad for p in state.model.parameters() if p.grad is not None]
        grad_norm = total_norm(grads)
        if clip_grad:
            nn.utils.clip_grads_with_norm_(state.model.parameters(), clip_grad, grad_norm)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    # Given a step, timm copies the weights in the first one, also without warm-up.
    state.ema.update(state.model, step=state.step if state.ema.use_warmup else None)
    return torch.stack(losses).mean(), grad_norm


def _gradient_sync(forward: nn.Module, is_last: bool) -> contextlib.AbstractContextManager[None]:
    """Gradients are reduced once per step, in the backward pass of the last micro-batch."""
    if isinstance(forward, FSDPModule):
        forward.set_requires_gradient_sync(is_last)
    if isinstance(forward, DistributedDataParallel) and not is_last:
        return forward.no_sync()
    return contextlib.nullcontext()


# --- Between log points


class LossMeter:
    """Mean loss, and the first step with a loss that is not finite; on the device until read."""

    def __init__(self, device: torch.device) -> None:
        self._sum = torch.zeros((), device=device)
        self._steps: list[int] = []
        self._losses: list[Tensor] = []

    def add(self, step: int, loss: Tensor) -> None:
        """Adds the loss of one step, without waiting for it."""
        self._sum += loss
        self._steps.append(step)
        self._losses.append(loss.reshape(1))
        if len(self._losses) == JOINED_AT:  # a tensor takes 512 bytes of a GPU, a number in it 4
            self._losses = [torch.cat(self._losses)]

    def read(self) -> tuple[float, int | None, bool]:
        """Waits for the device, and resets.

        Returns:
            mean loss over steps and processes, the first non-finite step or None, and whether
            it was non-finite on this process.
        """
        own_mean, own_first = self._sum / max(len(self._steps), 1), NEVER
        if self._losses:
            finite = torch.isfinite(torch.cat(self._losses)).tolist()
            bad = (step for step, good in zip(self._steps, finite, strict=True) if not good)
            own_first = min(bad, default=NEVER)
        mean = distributed.all_reduce(own_mean) / distributed.get_world_size()
        of_all = distributed.all_reduce(torch.tensor(own_first, device=mean.device), ReduceOp.MIN)
        first = int(of_all.item())
        self._sum, self._steps, self._losses = torch.zeros_like(self._sum), [], []
        return mean.item(), None if first == NEVER else first, own_first == first


class Clock:
    """Steps and seconds between log points, without validation and saving."""

    def __init__(self, step: int) -> None:
        self._since = (time.perf_counter(), step)
        self._paused = 0.0

    def lap(self, step: int) -> tuple[int, float]:
        """Number of steps, and seconds, since the last call."""
        now, (then, first) = time.perf_counter(), self._since
        seconds = now - then - self._paused
        self._since, self._paused = (now, step), 0.0
        return step - first, max(seconds, 1e-9)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Does not count the time inside."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start


# --- `--shard`: weights, gradients, averages and optimizer state split over the processes (FSDP2).
# A process gathers the weights of a block before it computes the block, forward and backward, and
# frees them after it. Files hold whole tensors, as without sharding.


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
