"""Flip, 3-Augment and color jitter of a batch, on any device, with the values that PIL gives.

What an image gets is drawn where it is read, as timm's transforms draw it, and applied later. PIL
cuts off fractions after each operation, and these do the same on floats.

Legend: B images, C channels (1 or 3), (h, w) pixels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import ColorJitter

from spiralrope_cli.core.config.runs import AugmentConfig

Op = tuple[str, float]
"""Name of an operation in `OPERATIONS`, and its amount; an empty name does nothing."""
Ops = tuple[Op, ...]

THREE_AUGMENT = ("solarize", "grayscale", "blur")
BLUR_RADIUS = (0.1, 2.0)
SOLARIZE_FROM = 128
JITTER = ("brightness", "contrast", "saturation")
BLUR_PASSES = 3
IDLE: Op = ("", 0.0)


def draw_ops(augment: AugmentConfig) -> Ops:
    """The operations of one image, in order, from the global generators; as many for each image.

    These are the draws of timm's `create_transform` after its crop, in their order.
    """
    flip = augment.hflip > 0 and bool(torch.rand(1) < augment.hflip)
    ops: list[Op] = [("flip", 0.0) if flip else IDLE]
    if augment.auto_augment == "3a":
        name = random.choice(THREE_AUGMENT)
        ops.append((name, random.uniform(*BLUR_RADIUS) if name == "blur" else 0.0))
    if augment.color_jitter:
        ends = max(0.0, 1 - augment.color_jitter), 1 + augment.color_jitter
        order, *factors, _ = ColorJitter.get_params(ends, ends, ends, None)
        jitter = [*zip(JITTER, factors, strict=True), IDLE]  # the last one is hue
        ops += [jitter[place] for place in order.tolist()]
    return tuple(ops)


def apply_ops(images: Tensor, ops: Sequence[Sequence[Op]]) -> Tensor:
    """Applies to each image its own operations.

    Args:
        images: [B, C, h, w], whole numbers from 0 to 255 as floats; may be changed in place.
        ops: those of each image, by `draw_ops`.

    Returns:
        [B, C, h, w], whole numbers from 0 to 255.
    """
    for nth in zip(*ops, strict=True):  # of all images
        for name in sorted({name for name, _ in nth if name}):
            chosen = [place for place, (each, _) in enumerate(nth) if each == name]
            amounts = torch.tensor([nth[place][1] for place in chosen]).view(-1, 1, 1, 1)
            amounts = amounts.to(images.device, non_blocking=True)
            if len(chosen) == len(images):
                images = OPERATIONS[name](images, amounts)
            else:
                where = torch.tensor(chosen).to(images.device, non_blocking=True)
                images[where] = OPERATIONS[name](images[where], amounts)
    return images


def _blur(images: Tensor, radius: Tensor) -> Tensor:
    """`ImageFilter.GaussianBlur`: three box filters per axis, edges repeated, each one rounded.

    A box of fractional radius r has whole weights up to floor(r) pixels away, and a fraction at
    the next one (Gwosdek et al., Theoretical Foundations of Gaussian Convolution by Extended Box
    Filtering, 2011).
    """
    variance = radius**2 / BLUR_PASSES
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    box = whole + (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (
        6 * (variance - (whole + 1) ** 2)
    )
    inner, reach = 1 / (2 * box + 1), int(BLUR_RADIUS[1])
    outer = (1 - (2 * whole + 1) * inner) / 2
    weights = [
        torch.where(whole >= away, inner, torch.where(whole + 1 == away, outer, 0.0))
        for away in range(reach + 1)
    ]
    for dim, pad in ((-1, (reach, reach, 0, 0)), (-2, (0, 0, reach, reach))):
        size = images.shape[dim]
        for _ in range(BLUR_PASSES):
            padded = F.pad(images, pad, mode="replicate")
            images = padded.narrow(dim, reach, size) * weights[0]
            for away in range(1, reach + 1):
                left, right = (padded.narrow(dim, reach + by, size) for by in (-away, away))
                images += (left + right) * weights[away]
            images = (images + 0.5).floor_()
    return images


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    gray = _luminance(images)
    pixels = gray[0].numel()
    total = gray.sum((1, 2, 3), dtype=torch.int64).view(-1, 1, 1, 1)
    return _blend((2 * total + pixels).div(2 * pixels, rounding_mode="floor"), images, factor)


def _blend(base: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """`Image.blend`: beyond both for a factor above 1."""
    return (images - base).mul_(factor).add_(base).clamp_(0, 255).floor_()


def _luminance(images: Tensor) -> Tensor:
    """[B, 1, h, w]: `convert("L")`, whose weights are multiples of 2^-16; so floats are exact."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    gray = (red * (19595 / 65536)).add_(green, alpha=38470 / 65536).add_(blue, alpha=7471 / 65536)
    return gray.add_(0.5).floor_()[:, None]


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "flip": lambda images, _: images.flip(-1),
    "solarize": lambda images, _: torch.where(images < SOLARIZE_FROM, images, 255 - images),
    "grayscale": lambda images, _: _luminance(images).expand_as(images).contiguous(),
    "blur": _blur,
    "brightness": lambda images, factor: (images * factor).clamp_(0, 255).floor_(),
    "contrast": _contrast,
    "saturation": lambda images, factor: _blend(_luminance(images), images, factor),
}
"""Name -> ([B, C, h, w], amount of each as [B, 1, 1, 1]) -> [B, C, h, w]."""
