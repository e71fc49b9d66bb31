"""AdamW, which parameters it moves, and its learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import Optimizer

from spiralrope_cli.core.config.training import OptimConfig

NO_DECAY_NAMES = ("pos_embed", "cls_token")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices decay; norms, biases, position and class token do not."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim <= 1 or name.rpartition(".")[2] in NO_DECAY_NAMES
        (free if plain else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


def freeze_but(model: nn.Module, freeze: str) -> None:
    """Leaves only some parameters to train.

    Args:
        model: a DeiT.
        freeze: `none`, `attn-only` (attention, position embedding and head), or `head-only`.
    """
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        kept = freeze == "none" or parts[0] == "head"
        if freeze == "attn-only":
            kept = kept or "attn" in parts or name == "pos_embed"
        parameter.requires_grad_(kept)


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW, fused where the device has it."""
    device = next(model.parameters()).device.type
    return torch.optim.AdamW(
        parameter_groups(model, optim.weight_decay),
        lr=optim.peak_lr,
        betas=optim.betas,
        fused=device in ("cuda", "cpu", "mps"),
    )


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
