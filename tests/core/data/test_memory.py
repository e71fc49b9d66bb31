from __future__ import annotations

import dataclasses
import gzip
import struct
from importlib import resources

import numpy as np
import pytest
import torch
import torchvision.datasets

from spiralrope_cli.core.config.datasets import DIGITS
from spiralrope_cli.core.config.nested import build
from spiralrope_cli.core.config.recipes import PRETRAIN
from spiralrope_cli.core.config.runs import AugmentConfig
from spiralrope_cli.core.data import memory
from spiralrope_cli.core.data.memory import (
    epoch_draws,
    load_digits,
    load_memory_set,
    resize_and_crop,
    warp,
)
from spiralrope_cli.core.errors import DataError

STILL = build(
    AugmentConfig,
    {**PRETRAIN, **DIGITS.defaults, "max_shift": 0.0, "max_rotation": 0.0, "hflip": 0.0},
)
CROP = dataclasses.replace(STILL, geometry="crop", crop_scale=0.25)
SHAPES = [(8, 8), (5, 9), (12, 4)]
MIDDLE = 0.5


def pictures(height, width, size=6, channels=2):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(size, channels, height, width, generator=generator) * 255


def draws(size=6, **columns):
    """Draws that move nothing, but for the columns given by name."""
    drawn = torch.full((size, 5), MIDDLE)
    for name, value in columns.items():
        drawn[:, ("mirror", "turn", "right", "down", "aspect").index(name)] = value
    return drawn


# ---- the sets


def test_digits_are_split_1437_to_360_by_class():
    train, val = load_digits()
    for split, size in ((train, DIGITS.num_train), (val, DIGITS.num_val)):
        assert split.images.shape == (size, 1, 8, 8)
        assert split.images.dtype == torch.uint8
        assert split.labels.shape == (size,)
        assert split.labels.dtype == torch.int64
    assert (len(train.labels), len(val.labels)) == (1437, 360)
    counts = [torch.bincount(split.labels, minlength=10) for split in (train, val)]
    fair = (counts[0] + counts[1]) * 360 / 1797
    assert (counts[1] - fair).abs().max() <= 1


def test_no_digit_is_in_both_splits():
    packaged = resources.files("spiralrope_cli") / "data" / "digits.npz"
    with packaged.open("rb") as file, np.load(file) as arrays:
        train, val = arrays["train"].tolist(), arrays["val"].tolist()
    assert sorted(train + val) == list(range(1797))


def test_digits_are_real_scans():
    train, val = load_digits()
    assert train.images.min() == 0
    assert train.images.max() == val.images.max() == 255
    assert len(train.images.flatten(1).unique(dim=0)) > 1400
    means = torch.stack(
        [train.images[train.labels == digit].float().mean(0) for digit in range(10)]
    )
    distances = torch.cdist(means.flatten(1), means.flatten(1))
    assert distances[~torch.eye(10, dtype=torch.bool)].min() > 100
    # The nearest class mean tells most digits, so that labels and pictures belong together.
    nearest = torch.cdist(val.images.float().flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == val.labels).double().mean() > 0.85


def test_the_statistics_of_digits_are_its_own():
    pixels = load_digits()[0].images.double() / 255
    assert pixels.mean().item() == pytest.approx(DIGITS.defaults["mean"][0], abs=1e-3)
    assert pixels.std().item() == pytest.approx(DIGITS.defaults["std"][0], abs=1e-3)


def packed_fashion_mnist(folder):
    folder.mkdir()
    for name, (size, shape) in {
        "train-images-idx3-ubyte": (3, (28, 28)),
        "train-labels-idx1-ubyte": (3, ()),
        "t10k-images-idx3-ubyte": (2, (28, 28)),
        "t10k-labels-idx1-ubyte": (2, ()),
    }.items():
        dims = (size, *shape)
        head = struct.pack(f">HBB{len(dims)}I", 0, 8, len(dims), *dims)
        body = np.arange(np.prod(dims), dtype=np.uint8).tobytes()
        (folder / f"{name}.gz").write_bytes(gzip.compress(head + body))


def test_fashion_mnist_is_unpacked_once_from_the_system_package(tmp_path, monkeypatch):
    packed_fashion_mnist(tmp_path / "packed")
    monkeypatch.setenv("SPIRALROPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(memory, "DEBIAN_FASHION_MNIST", tmp_path / "packed")
    for _ in range(2):
        train, val = load_memory_set("fashion-mnist")
        assert train.images.shape == (3, 1, 28, 28)
        assert val.images.shape == (2, 1, 28, 28)
        assert train.labels.tolist() == [0, 1, 2]
        monkeypatch.setattr(memory, "DEBIAN_FASHION_MNIST", tmp_path / "nothing")
    raw = tmp_path / "cache" / "FashionMNIST" / "raw"
    assert sorted(path.name for path in raw.iterdir()) == sorted(memory.RAW_FILES)


def test_fashion_mnist_that_cannot_be_had_says_where_to_put_it(tmp_path, monkeypatch):
    def no_route(root, train, download):
        assert download
        raise RuntimeError("Error downloading train-images\nand more")

    monkeypatch.setenv("SPIRALROPE_CACHE", str(tmp_path))
    monkeypatch.setattr(memory, "DEBIAN_FASHION_MNIST", tmp_path / "nothing")
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", no_route)
    with pytest.raises(DataError, match="cannot be downloaded: Error downloading") as caught:
        load_memory_set("fashion-mnist")
    assert str(tmp_path / "FashionMNIST" / "raw") in caught.value.hint


# ---- moving, turning, cropping


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
def test_without_randomness_a_picture_stays(shape):
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


def test_hflip_mirrors_the_asked_share_of_the_pictures():
    x = pictures(4, 4, size=4)
    half = dataclasses.replace(STILL, hflip=0.5)
    mirrored = warp(x, draws(4, mirror=torch.tensor([0.0, 0.49, 0.5, 0.99])), half, (4, 4))
    expected = torch.stack((x[0].flip(-1), x[1].flip(-1), x[2], x[3]))
    torch.testing.assert_close(mirrored, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("drawn", "pixels"), [(1.0, 2), (0.75, 1), (0.0, -2)])
def test_shifts_are_counted_in_pixels(shape, drawn, pixels):
    x = pictures(*shape)
    augment = dataclasses.replace(STILL, max_shift=2.0)
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
    turned = warp(
        x, draws(turn=drawn), dataclasses.replace(STILL, max_rotation=90.0), (height, width)
    )
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    middle = (..., slice(top, top + side), slice(left, left + side))
    expected = x[middle].rot90(quarters, (-2, -1))
    torch.testing.assert_close(turned[middle], expected, rtol=0, atol=1e-2)


def test_each_picture_is_warped_by_its_own_draws():
    x = pictures(8, 8)
    augment = dataclasses.replace(STILL, max_shift=2.0, max_rotation=20.0, hflip=0.5)
    random = epoch_draws(6, 0, 0)
    for each in (augment, CROP):
        whole = warp(x, random, each, (8, 8))
        alone = torch.cat([warp(x[i : i + 1], random[i : i + 1], each, (8, 8)) for i in range(6)])
        torch.testing.assert_close(whole, alone, rtol=0, atol=1e-3)


def test_crops_lie_within_the_picture():
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


def test_resize_and_crop_leaves_a_fitting_picture_as_it_is():
    x = pictures(8, 6)
    assert resize_and_crop(x, (8, 6), 1.0) is x


def test_resize_and_crop_keeps_the_middle():
    x = pictures(8, 16)
    assert torch.equal(resize_and_crop(x, (8, 8), 1.0), x[..., 4:12])
    mirrored = resize_and_crop(x.flip(-1), (4, 4), 0.5)
    torch.testing.assert_close(mirrored, resize_and_crop(x, (4, 4), 0.5).flip(-1))
