"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from torch.optim import Optimizer

from spiralrope_cli.core.config.training import OptimConfig


def lr_at(step: int, total_steps: int, steps_per_epoch: int, optim: OptimConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    `cosine` rises linearly from warmup_lr to the peak, reached at the end of the warm-up, and
    falls along half a cosine to min_lr. `published` repeats the schedule of the published runs:
    it moves once per epoch and one epoch late, and its cosine counts the warm-up in, so that
    the peak is never reached.
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


def _cosine(share: float, high: float, low: float) -> float:
    return low + (high - low) * (1 + math.cos(math.pi * share)) / 2


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Gives all groups the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
