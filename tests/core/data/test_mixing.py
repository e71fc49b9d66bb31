from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

from spiralrope_cli.core.config.datasets import PHOTOGRAPHS
from spiralrope_cli.core.config.nested import build
from spiralrope_cli.core.config.recipes import PRETRAIN
from spiralrope_cli.core.config.runs import MIX_GROUP, AugmentConfig
from spiralrope_cli.core.data.mixing import erase, mix

RECIPE = build(AugmentConfig, {**PRETRAIN, **PHOTOGRAPHS})
MIXES = {
    "mixup": {"mixup": 0.8, "cutmix": 0.0},
    "cutmix": {"mixup": 0.0, "cutmix": 1.0},
    "both": {"mixup": 0.8, "cutmix": 1.0},
}
CLASSES = 5


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
def test_mixed_targets_are_shares_of_one(name):
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


def test_pictures_and_targets_are_mixed_by_the_same_share():
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
