"""Weights for Inception where the published ones are not at hand: random, but alive.

Batch norms hold the statistics of the images given here; with others every feature vanishes.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

LOGIT_SCALE = 10.0  # of a fresh linear layer all classes come out equally likely
SHIFT = 1.0  # without it each of ninety random layers multiplies the rounding of the one before


class RandomInception(FeatureExtractorInceptionV3):
    """The network without a file."""

    def __init__(self, features: list[str]) -> None:
        empty = io.BytesIO()
        torch.save({}, empty)
        empty.seek(0)
        super().__init__("random", features, empty)

    def load_state_dict(self, weights: dict[str, Tensor], **more: bool) -> None:
        """Nothing to load."""


def write_random_weights(path: Path, images: Tensor, seed: int = 0) -> Path:
    """Writes a state dict in the format of the published file.

    Args:
        path: of the file.
        images: [N, 3, h, w] uint8, some dozen real ones.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    network = RandomInception(["logits"])
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics of these images and of no others
            module.train()
            module.bias.data.fill_(SHIFT)
    with torch.inference_mode():
        network(images)
    network.fc.weight.data.mul_(LOGIT_SCALE)
    torch.save(network.state_dict(), path)
    return path
