"""Image transforms: crop, augmentation, normalisation, mixup and cutmix.

Random numbers are arguments, or a function of the seed parts that are arguments.

Legend: B batch, K classes, (h, w) pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from packaging.version import Version
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import NAME_TO_OP, posterize
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation as RandomResizedCrop
from torch import Tensor
from torchvision.transforms import Compose

from spiralrope_cli.core.config.runs import MIX_GROUP, AugmentConfig
from spiralrope_cli.core.data.loader import Transform
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.runtime.seeds import generator_for, seed_everything

POSTERIZE_OPS = ("Posterize", "PosterizeIncreasing", "PosterizeOriginal")
CROP_ASPECT = (3 / 4, 4 / 3)
_TIMM = Version(timm.__version__)


# --- Single images, in loader processes


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """At least one bit: at the highest magnitudes timm asks for 0 bits, which Pillow 13 refuses."""
    return posterize(image, max(bits, 1))


NAME_TO_OP.update(dict.fromkeys(POSTERIZE_OPS, _posterize))


def random_resized_crop(size: tuple[int, int], scale: float, pixels: Tensor) -> np.ndarray:
    """Random resized crop of uint8 [channels, h, w], by the draws of timm.

    Each axis is filtered as by PIL's bicubic filter, up to one level, in a third of the time. The
    horizontal one comes first, as in Pillow before 13, which goes by the shape of the crop.
    """
    top, left, height, width = RandomResizedCrop.get_params(pixels, (scale, 1.0), CROP_ASPECT)
    # Of an image that is a few pixels high or wide, timm may draw a crop without any.
    top, left = min(top, pixels.shape[1] - 1), min(left, pixels.shape[2] - 1)
    part = pixels[None, :, top : top + max(height, 1), left : left + max(width, 1)]
    part = part.contiguous(memory_format=torch.channels_last)
    return F.interpolate(part, size, mode="bicubic", antialias=True)[0].numpy()


def crop_and_augment(
    rest: Callable[[Image.Image], Any], size: tuple[int, int], scale: float, pixels: Tensor
) -> np.ndarray:
    """`random_resized_crop`, and the `rest` of timm's transform."""
    cropped = random_resized_crop(size, scale, pixels).transpose(1, 2, 0)
    return np.asarray(rest(Image.fromarray(cropped[..., 0] if len(pixels) == 1 else cropped)))


def train_transform(size: tuple[int, int], augment: AugmentConfig) -> Transform:
    """The training transform of timm up to uint8; images are normalised on the device."""
    square_rgb = size[0] == size[1] and len(augment.mean) == 3
    if augment.auto_augment.startswith("augmix") and not square_rgb and _TIMM.release < (1, 0, 30):
        raise ConfigError(
            f"--auto-augment {augment.auto_augment}: timm {_TIMM} mixes square RGB images only",
            "install timm 1.0.30 or newer, or choose another policy",
        )
    try:
        whole = create_transform(
            size,
            is_training=True,
            use_prefetcher=True,
            hflip=augment.hflip,
            color_jitter=augment.color_jitter or None,  # type: ignore[arg-type]
            auto_augment=None if augment.auto_augment == "none" else augment.auto_augment,
            interpolation="bicubic",
            mean=augment.mean,  # fill colour of rotations
            re_prob=0.0,  # random erasing follows after normalisation, see `erase`
        )
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(
            f"--auto-augment {augment.auto_augment} is not a policy of timm"
        ) from error
    rest = Compose(whole.transforms[1:])  # the first one is the crop
    return functools.partial(crop_and_augment, rest, size, augment.crop_scale)


def eval_transform(size: tuple[int, int], crop_ratio: float) -> Transform:
    """The evaluation transform of timm: resize to size / crop_ratio, centre crop, uint8."""
    return create_transform(
        size,
        is_training=False,
        use_prefetcher=True,
        interpolation="bicubic",
        crop_pct=crop_ratio,
        crop_mode="center",
    )


def center_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """ADM's centre crop to (height, width).

    Halve with a box filter while the image is at least twice as large, resize with bicubic to the
    smallest size that covers (height, width), then crop the centre.
    """
    height, width = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    larger = (round(image.width * scale), round(image.height * scale))
    image = image.resize(larger, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def cropped_array(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """`center_crop` as uint8 [channels, h, w]."""
    pixels = np.asarray(center_crop(image, size))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


# --- Batches, on the device


@functools.lru_cache(maxsize=2)
def epoch_draws(num_images: int, seed: int, epoch: int) -> Tensor:
    """[num_images, 5] float32 in [0, 1): random numbers of each place in the epoch."""
    return torch.rand(num_images, 5, generator=generator_for(seed, "geometry", epoch))


def warp(images: Tensor, draws: Tensor, augment: AugmentConfig, size: tuple[int, int]) -> Tensor:
    """Shifts and rotates, or crops, and flips each image by its own random numbers.

    Args:
        images: [B, channels, h, w] float.
        draws: [B, 5] in [0, 1).
        augment: the options.
        size: (height, width) of the result.

    Returns:
        [B, channels, *size]; outside the image it is black, or with `crop` the border repeats.
    """
    height, width = images.shape[-2:]
    draws = draws.to(images.device, non_blocking=True)
    mirror = 1 - 2 * (draws[:, 0] < augment.hflip).float()
    centred = 2 * draws - 1
    if augment.geometry == "shift":
        angle = centred[:, 1] * math.radians(augment.degrees)
        shift_x = centred[:, 2] * (2 * augment.translate / width)
        shift_y = centred[:, 3] * (2 * augment.translate / height)
        cos, sin, ratio = angle.cos(), angle.sin(), height / width
        # affine_grid has coordinates from -1 to 1 on both axes, for any shape of the image.
        rows = [cos * mirror, -sin * ratio, shift_x, sin / ratio * mirror, cos, shift_y]
        padding = "zeros"
    else:
        area = augment.crop_scale + (1 - augment.crop_scale) * draws[:, 1]
        low, high = (math.log(aspect) for aspect in CROP_ASPECT)
        aspect = (low + (high - low) * draws[:, 4]).exp()
        wide, tall = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
        zero = torch.zeros_like(area)
        left, top = (1 - wide) * centred[:, 2], (1 - tall) * centred[:, 3]
        rows = [wide * mirror, zero, left, zero, tall, top]
        padding = "border"
    affine = torch.stack(rows, dim=1).view(-1, 2, 3)
    grid = F.affine_grid(affine, [len(images), images.shape[1], *size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode=padding, align_corners=False)


def resize_and_crop(images: Tensor, size: tuple[int, int], crop_ratio: float) -> Tensor:
    """Evaluation transform on tensors: shorter side to size / crop_ratio, then centre crop.

    Args:
        images: [B, channels, h, w] float.
        size: (height, width) of the result.
        crop_ratio: side of the crop over the shorter side of the resized image.

    Returns:
        [B, channels, *size].
    """
    height, width = images.shape[-2:]
    if (height, width) == size and crop_ratio == 1:
        return images
    scale = max(size[0] / height, size[1] / width) / crop_ratio
    larger = (max(round(height * scale), size[0]), max(round(width * scale), size[1]))
    images = F.interpolate(images, larger, mode="bicubic", antialias=True)
    top, left = (larger[0] - size[0]) // 2, (larger[1] - size[1]) // 2
    return images[..., top : top + size[0], left : left + size[1]].clamp(0, 255)


@functools.lru_cache(maxsize=2)
def mirror_draws(num_images: int, seed: int, epoch: int) -> Tensor:
    """[num_images] float32 in [0, 1): random number of each place in the epoch."""
    return torch.rand(num_images, generator=generator_for(seed, "mirror", epoch))


def mirror(images: Tensor, chosen: Tensor) -> Tensor:
    """Flips the images of [B, L, H, W] where `chosen`, [B] bool on the CPU, is True."""
    if not chosen.any():
        return images
    where = chosen.to(images.device, non_blocking=True)[:, None, None, None]
    return torch.where(where, images.flip(-1), images)


class Normalise:
    """Normalises by mean and standard deviation of each channel, given for pixels in [0, 1]."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self._mean = torch.tensor(mean, device=device).view(-1, 1, 1) * 255
        self._std = torch.tensor(std, device=device).view(-1, 1, 1) * 255

    def __call__(self, images: Tensor) -> Tensor:
        """[..., channels, h, w] in [0, 255] -> mean 0, standard deviation 1, in place."""
        return images.sub_(self._mean).div_(self._std)


def erase(images: Tensor, probability: float, seed: int, first: int) -> Tensor:
    """Random erasing of normalised images [B, channels, h, w], in place.

    Each image is seeded by its place in the run; `first` is that of the first image.
    """
    if probability:
        erasing = RandomErasing(probability, mode="pixel", device=images.device.type)
        for place, image in enumerate(images, start=first):
            seed_everything(seed, "erase", place, device=images.device)
            erasing(image)
    return images


def mix(
    images: Tensor, labels: Tensor, augment: AugmentConfig, num_classes: int, seed: int, first: int
) -> tuple[Tensor, Tensor]:
    """Mixup and cutmix within consecutive groups of 8 images of the step's batch.

    Each group is seeded by its place in the run. So the result does not depend on micro-batch size
    and number of processes.

    Args:
        images: [B, channels, h, w], changed in place; B holds whole groups.
        labels: [B] class numbers.
        augment: the options.
        num_classes: K.
        seed: seed of the run.
        first: place of the first image in the run.

    Returns:
        images, and soft labels [B, K] with smoothing; without mixing the labels are unchanged.
    """
    if not (augment.mixup or augment.cutmix):
        return images, labels
    mixup = Mixup(
        augment.mixup,
        augment.cutmix,
        switch_prob=augment.mixup_switch_prob,
        label_smoothing=augment.smoothing,
        num_classes=num_classes,
    )
    fractions = []
    for start in range(0, len(images), MIX_GROUP):
        seed_everything(seed, "mix", first + start)
        fractions.append(float(mixup._mix_batch(images[start : start + MIX_GROUP])))
    # All groups at once: one by one, as timm's `Mixup` does it, each launches six small kernels.
    lam = torch.tensor(fractions, dtype=torch.float64).view(-1, 1, 1)
    kept, other = torch.stack((lam, 1 - lam)).float().to(images.device, non_blocking=True)
    targets = mixup_target(labels, num_classes, 1.0, augment.smoothing)
    targets = targets.view(-1, MIX_GROUP, num_classes)
    return images, (targets * kept + targets.flip(1) * other).flatten(0, 1)
