"""Random erasing and mixup/cutmix by timm, seeded by an image's place in the run.

Legend: B batch, K classes.
"""

from __future__ import annotations

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from spiralrope_cli.core.config.runs import MIX_GROUP, AugmentConfig
from spiralrope_cli.core.runtime.seeds import seed_everything


def erase(images: Tensor, probability: float, seed: int, first: int) -> Tensor:
    """Random erasing of normalised pictures, each by its own random numbers.

    Args:
        images: [B, channels, h, w], changed in place.
        probability: 0 for none.
        seed: of the run.
        first: place of the first image in the run.
    """
    if probability:
        erasing = RandomErasing(probability, mode="pixel", device=images.device.type)
        for place, image in enumerate(images, start=first):
            seed_everything(seed, "erase", place)
            erasing(image)
    return images


def mix(
    images: Tensor, labels: Tensor, augment: AugmentConfig, num_classes: int, seed: int, first: int
) -> tuple[Tensor, Tensor]:
    """Mixup and cutmix over consecutive groups of the step's batch.

    Every group draws once, by its place in the run, so that what is mixed with what is the same
    for any micro batch size and number of processes.

    Args:
        images: [B, channels, h, w], changed in place; B holds whole groups.
        labels: [B] class numbers.
        augment: the options.
        num_classes: K.
        seed: of the run.
        first: place of the first image in the run.

    Returns:
        images, and [B, K] mixed labels with smoothing; without mixing the labels as they came.
    """
    if not augment.mixes:
        return images, labels
    mixup = Mixup(
        augment.mixup,
        augment.cutmix,
        switch_prob=augment.mixup_switch_prob,
        label_smoothing=augment.smoothing,
        num_classes=num_classes,
    )
    targets = []
    for start in range(0, len(images), MIX_GROUP):
        seed_everything(seed, "mix", first + start)
        part = slice(start, start + MIX_GROUP)
        images[part], mixed = mixup(images[part], labels[part])
        targets.append(mixed)
    return images, torch.cat(targets)
