from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from packaging.version import Version
from PIL import Image
from timm.data import Mixup

from spiralrope_cli.core.config.datasets import DIGITS, PHOTOGRAPHS
from spiralrope_cli.core.config.option import build
from spiralrope_cli.core.config.recipes import PRETRAIN
from spiralrope_cli.core.config.runs import MIX_GROUP, AugmentConfig
from spiralrope_cli.core.data import augment
from spiralrope_cli.core.data.augment import (
    center_crop,
    cropped_array,
    epoch_draws,
    erase,
    mix,
    resize_and_crop,
    train_transform,
    warp,
)
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.runtime.seeds import seed_everything

RECIPE = build(AugmentConfig, {**PRETRAIN, **PHOTOGRAPHS})
MIXES = {
    "mixup": {"mixup": 0.8, "cutmix": 0.0},
    "cutmix": {"mixup": 0.0, "cutmix": 1.0},
    "both": {"mixup": 0.8, "cutmix": 1.0},
}
CLASSES = 5
STILL = build(
    AugmentConfig,
    {**PRETRAIN, **DIGITS.defaults, "translate": 0.0, "degrees": 0.0, "hflip": 0.0},
)
CROP = dataclasses.replace(STILL, geometry="crop", crop_scale=0.25)
SHAPES = [(8, 8), (5, 9), (12, 4)]
MIDDLE = 0.5


# ---- timm's policies


def test_what_an_older_timm_cannot_mix_is_refused(monkeypatch):
    monkeypatch.setattr(augment, "_TIMM", Version("1.0.29"))
    mixes = dataclasses.replace(RECIPE, auto_augment="augmix-m5-w4-d2")
    train_transform((16, 16), mixes)
    for size, mean in (((16, 24), mixes.mean), ((16, 16), (0.5,))):
        with pytest.raises(ConfigError, match=r"timm 1\.0\.29 mixes square RGB") as refused:
            train_transform(size, dataclasses.replace(mixes, mean=mean))
        assert "1.0.30" in refused.value.hint


# ---- ADM's crop


def photograph(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize(("width", "height"), [(100, 70), (70, 100), (16, 16), (15, 9), (33, 32)])
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_any_image_gets_the_size(width, height, size):
    assert cropped_array(photograph(width, height), size).shape == (3, *size)
    assert cropped_array(photograph(width, height).convert("L"), size).shape == (1, *size)


def test_halves_by_boxes_then_bicubic_then_the_centre():
    image = photograph(76, 70)  # two halvings: 38 x 35, then 19 x 17
    small = image.resize((38, 35), Image.Resampling.BOX).resize((19, 17), Image.Resampling.BOX)
    larger = small.resize((round(19 * 16 / 17), 16), Image.Resampling.BICUBIC)
    expected = np.asarray(larger)[:, 1:17]
    assert np.array_equal(np.asarray(center_crop(image, (16, 16))), expected)


def test_the_centre_stays_in_the_centre():
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[28:36, 60:68] = 255
    cropped = np.asarray(center_crop(Image.fromarray(pixels), (32, 32))).astype(int)
    assert np.abs(cropped - cropped[:, ::-1]).max() <= 1
    assert np.abs(cropped - cropped[::-1]).max() <= 1
    assert cropped[16, 16, 0] > 200
    assert cropped[4, 4, 0] == 0


# ---- moving, turning, cropping


def pictures(height, width, size=6, channels=2):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(size, channels, height, width, generator=generator) * 255


def draws(size=6, **columns):
    """Draws that move nothing, but for the columns given by name."""
    drawn = torch.full((size, 5), MIDDLE)
    for name, value in columns.items():
        drawn[:, ("mirror", "turn", "right", "down", "aspect").index(name)] = value
    return drawn


def test_draws_belong_to_seed_and_epoch():
    first = epoch_draws(50, 1, 2).clone()
    epoch_draws.cache_clear()
    torch.manual_seed(5)
    assert torch.equal(epoch_draws(50, 1, 2), first)
    assert first.shape == (50, 5)
    assert ((first >= 0) & (first < 1)).all()
    assert not torch.equal(epoch_draws(50, 1, 3), first)
    assert not torch.equal(epoch_draws(50, 2, 2), first)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_randomness_a_image_stays(shape):
    x = pictures(*shape)
    random = torch.rand(6, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(warp(x, random, STILL, shape), x, rtol=0, atol=5e-4)
    whole = dataclasses.replace(CROP, crop_scale=1.0)
    torch.testing.assert_close(warp(x, draws(), whole, shape), x, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("augment", [STILL, dataclasses.replace(CROP, crop_scale=1.0)])
def test_hflip_mirrors(shape, augment):
    x = pictures(*shape)
    always = dataclasses.replace(augment, hflip=1.0)
    random = draws(mirror=torch.rand(6, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(warp(x, random, always, shape), x.flip(-1), rtol=0, atol=1e-3)


def test_hflip_mirrors_the_asked_fraction_of_the_images():
    x = pictures(4, 4, size=4)
    half = dataclasses.replace(STILL, hflip=0.5)
    mirrored = warp(x, draws(4, mirror=torch.tensor([0.0, 0.49, 0.5, 0.99])), half, (4, 4))
    expected = torch.stack((x[0].flip(-1), x[1].flip(-1), x[2], x[3]))
    torch.testing.assert_close(mirrored, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("drawn", "pixels"), [(1.0, 2), (0.75, 1), (0.0, -2)])
def test_shifts_are_counted_in_pixels(shape, drawn, pixels):
    x = pictures(*shape)
    augment = dataclasses.replace(STILL, translate=2.0)
    # A positive draw looks to the right or down, so that the picture moves left or up.
    for axis, name in ((-1, "right"), (-2, "down")):
        expected = x.roll(-pixels, axis)
        size = x.shape[axis]
        empty = range(size - pixels, size) if pixels > 0 else range(-pixels)
        expected.index_fill_(axis, torch.tensor(list(empty)), 0)
        moved = warp(x, draws(**{name: drawn}), augment, shape)
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(5, 9), (9, 5), (7, 7), (4, 8)])
@pytest.mark.parametrize(("drawn", "quarters"), [(1.0, 1), (0.0, -1)])
def test_turning_a_rectangle_keeps_its_pixels_square(height, width, drawn, quarters):
    x = pictures(height, width)
    turned = warp(x, draws(turn=drawn), dataclasses.replace(STILL, degrees=90.0), (height, width))
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    middle = (..., slice(top, top + side), slice(left, left + side))
    expected = x[middle].rot90(quarters, (-2, -1))
    torch.testing.assert_close(turned[middle], expected, rtol=0, atol=1e-2)


def test_each_image_is_warped_by_its_own_draws():
    x = pictures(8, 8)
    augment = dataclasses.replace(STILL, translate=2.0, degrees=20.0, hflip=0.5)
    random = epoch_draws(6, 0, 0)
    for each in (augment, CROP):
        whole = warp(x, random, each, (8, 8))
        alone = torch.cat([warp(x[i : i + 1], random[i : i + 1], each, (8, 8)) for i in range(6)])
        torch.testing.assert_close(whole, alone, rtol=0, atol=1e-3)


def test_crops_lie_within_the_image():
    ramp = torch.arange(8.0).expand(200, 2, 8, 8)
    both = torch.stack((ramp[:, 0], ramp[:, 0].transpose(1, 2)), dim=1)
    cropped = warp(both, epoch_draws(200, 0, 0), dataclasses.replace(CROP, hflip=0.0), (16, 16))
    assert cropped.min() >= 0
    assert cropped.max() <= 7
    # The spread along each axis shows how much of that axis was kept.
    wide = (cropped[:, 0, :, -1] - cropped[:, 0, :, 0]).mean(1) / 7
    tall = (cropped[:, 1, -1] - cropped[:, 1, 0]).mean(1) / 7
    assert (wide > 0).all()
    assert (tall > 0).all()
    area = wide * tall
    assert area.min() > 0.15
    assert area.max() > 0.8
    assert area.std() > 0.1


@pytest.mark.parametrize("geometry", ["shift", "crop"])
def test_warp_gives_the_asked_size(geometry):
    augment = dataclasses.replace(STILL, geometry=geometry)
    assert warp(pictures(8, 6), draws(), augment, (12, 20)).shape == (6, 2, 12, 20)


# ---- evaluation


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [(8, 8), (6, 10), (32, 16), (3, 3)])
@pytest.mark.parametrize("crop_ratio", [1.0, 0.875, 0.5])
def test_resize_and_crop_gives_the_asked_size(shape, size, crop_ratio):
    x = pictures(*shape)
    out = resize_and_crop(x, size, crop_ratio)
    assert out.shape == (6, 2, *size)
    assert out.min() >= 0
    assert out.max() <= 255
    flat = resize_and_crop(torch.full_like(x, 100.0), size, crop_ratio)
    torch.testing.assert_close(flat, torch.full_like(flat, 100.0))


def test_resize_and_crop_leaves_a_fitting_image_as_it_is():
    x = pictures(8, 6)
    assert resize_and_crop(x, (8, 6), 1.0) is x


def test_resize_and_crop_keeps_the_middle():
    x = pictures(8, 16)
    assert torch.equal(resize_and_crop(x, (8, 8), 1.0), x[..., 4:12])
    mirrored = resize_and_crop(x.flip(-1), (4, 4), 0.5)
    torch.testing.assert_close(mirrored, resize_and_crop(x, (4, 4), 0.5).flip(-1))


# ---- mixing and erasing


def batch(size=32, channels=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, channels, 12, 10, generator=generator)
    return images, torch.randint(CLASSES, (size,), generator=generator)


def in_parts(apply, size, micro):
    """What `apply(part)` gives for each micro batch of a step, put together."""
    parts = [apply(slice(start, start + micro)) for start in range(0, size, micro)]
    return [torch.cat(each) for each in zip(*parts, strict=True)]


def disturb_global_random_numbers():
    random.seed()
    np.random.seed()
    torch.seed()


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("micro", [MIX_GROUP, 16])
def test_mixing_is_the_same_however_a_batch_is_split(name, micro):
    augment = dataclasses.replace(RECIPE, **MIXES[name])
    images, labels = batch()
    whole = mix(images.clone(), labels, augment, CLASSES, 3, 64)

    def part_of(part):
        disturb_global_random_numbers()
        return mix(images[part].clone(), labels[part], augment, CLASSES, 3, 64 + part.start)

    for ours, expected in zip(in_parts(part_of, 32, micro), whole, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", MIXES)
def test_groups_are_mixed_as_timm_mixes_each(name):
    augment, (images, labels) = dataclasses.replace(RECIPE, **MIXES[name]), batch()
    fractions = {"switch_prob": augment.mixup_switch_prob, "label_smoothing": augment.smoothing}
    timms = Mixup(augment.mixup, augment.cutmix, num_classes=CLASSES, **fractions)

    def timms_of(part):
        seed_everything(3, "mix", 64 + part.start)
        return timms(images[part].clone(), labels[part])

    ours = mix(images.clone(), labels, augment, CLASSES, 3, 64)
    for mine, its in zip(ours, in_parts(timms_of, 32, MIX_GROUP), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("name", MIXES)
def test_mixed_targets_are_fractions_of_one(name):
    augment = dataclasses.replace(RECIPE, **MIXES[name])
    images, labels = batch()
    mixed, targets = mix(images.clone(), labels, augment, CLASSES, 0, 0)
    assert mixed.shape == images.shape
    assert targets.shape == (32, CLASSES)
    assert (targets >= 0).all()
    torch.testing.assert_close(targets.sum(1), torch.ones(32))
    # Smoothing leaves every class its share.
    assert targets.min().item() == pytest.approx(RECIPE.smoothing / CLASSES)
    assert not torch.equal(mixed, images)


def test_images_and_targets_are_mixed_by_the_same_fraction():
    augment = dataclasses.replace(RECIPE, mixup=0.8, cutmix=0.0, smoothing=0.0)
    labels = torch.arange(MIX_GROUP)
    images = torch.eye(MIX_GROUP).view(MIX_GROUP, MIX_GROUP, 1, 1).repeat(1, 1, 2, 2)
    mixed, targets = mix(images, labels, augment, MIX_GROUP, 0, 0)
    torch.testing.assert_close(mixed.mean((2, 3)), targets)
    assert (targets.max(1).values < 1).all()


def test_each_group_draws_for_itself_by_its_place_and_the_seed():
    images, labels = batch(MIX_GROUP)
    seen = [
        mix(images.clone(), labels, RECIPE, CLASSES, seed, first)[0]
        for seed, first in ((0, 0), (0, MIX_GROUP), (1, 0))
    ]
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_without_mixing_everything_stays_as_it_came():
    augment = dataclasses.replace(RECIPE, mixup=0.0, cutmix=0.0)
    assert not augment.mixes
    images, labels = batch()
    mixed, targets = mix(images, labels, augment, CLASSES, 0, 0)
    assert mixed is images
    assert targets is labels


@pytest.mark.parametrize("micro", [1, 4, 8])
@pytest.mark.parametrize("channels", [1, 3])
def test_erasing_is_the_same_however_a_batch_is_split(micro, channels):
    images, _ = batch(16, channels)
    whole = erase(images.clone(), 0.5, 3, 32)

    def part_of(part):
        disturb_global_random_numbers()
        return (erase(images[part].clone(), 0.5, 3, 32 + part.start),)

    assert torch.equal(in_parts(part_of, 16, micro)[0], whole)
    touched = (whole != images).flatten(1).any(1)
    assert 0 < touched.sum() < 16


def test_erasing_goes_by_its_probability():
    images, _ = batch(200)
    assert torch.equal(erase(images.clone(), 0.0, 0, 0), images)
    shares = [
        (erase(images.clone(), probability, 0, 0) != images).flatten(1).any(1).double().mean()
        for probability in (0.25, 1.0)
    ]
    assert shares[0].item() == pytest.approx(0.25, abs=0.1)
    assert shares[1] == 1
