from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from spiralrope_cli.core.config.diffusion import GuidanceConfig
from spiralrope_cli.core.diffusion.samplers import Predict


class GuidedNetwork(Protocol):
    """What guidance needs of a network; a DiT has it."""

    num_classes: int

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """[B, L, H, W], [B] and [B] -> [B, 2L, H, W]."""

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, cfg_channels: int | None
    ) -> Tensor:
        """The same for twice the batch: labelled, then null."""


def guided(network: GuidedNetwork, labels: Tensor, guidance: GuidanceConfig) -> Predict:
    """The network as samplers call it, with labels and guidance.

    The null class is computed in guided steps alone: without guidance, and outside its interval,
    a step costs one pass of B samples.

    Args:
        network: a DiT.
        labels: [B] classes, on the network's device.
        guidance: scale, channels and interval.

    Returns:
        `predict(x, timestep)` -> [B, 2L, H, W].
    """
    both = torch.cat((labels, torch.full_like(labels, network.num_classes)))
    channels = None if guidance.cfg_channels == "all" else int(guidance.cfg_channels)

    def predict(x: Tensor, timestep: int) -> Tensor:
        if not guidance.acts_at(timestep):
            return network(x, torch.full_like(labels, timestep), labels)
        t = torch.full_like(both, timestep)
        out = network.forward_with_cfg(torch.cat((x, x)), t, both, guidance.cfg_scale, channels)
        return out[: len(x)]

    return predict
