from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from spiralrope_cli.core.config.optim import OptimConfig
from spiralrope_cli.core.training.optim import build_optimizer


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
