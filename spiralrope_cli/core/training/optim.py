from __future__ import annotations

import torch
from torch import nn

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
