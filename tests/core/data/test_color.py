from __future__ import annotations

import contextlib
import io
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from timm.data.transforms import RandomResizedCropAndInterpolation as RandomResizedCrop
from torch.testing import assert_close

from spiralrope_cli.core.config.datasets import PHOTOGRAPHS
from spiralrope_cli.core.config.option import build
from spiralrope_cli.core.config.recipes import PRETRAIN
from spiralrope_cli.core.config.runs import AugmentConfig
from spiralrope_cli.core.data.augment import CROP_ASPECT, random_resized_crop, train_transform
from spiralrope_cli.core.data.batches import classifier_data
from spiralrope_cli.core.data.color import OPERATIONS, apply_ops, draw_ops
from spiralrope_cli.core.data.images import Unreadable, as_tensor, as_trained, open_image
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.resolve import resolve
from spiralrope_cli.core.runtime.seeds import seed_everything

CPU = torch.device("cpu")
RECIPE = build(AugmentConfig, {**PRETRAIN, **PHOTOGRAPHS})
SIZE = (28, 36)
BY_PIL = {
    "flip": lambda image, _: ImageOps.mirror(image),
    "solarize": lambda image, _: ImageOps.solarize(image, 128),
    "grayscale": lambda image, _: ImageEnhance.Color(image).enhance(0.0),
    "blur": lambda image, radius: image.filter(ImageFilter.GaussianBlur(radius)),
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "saturation": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
}
AMOUNTS = {"blur": (0.13, 0.37, 0.98, 1.53, 1.99)}
OTHER_AMOUNTS = (0.7, 0.93, 1.0, 1.13, 1.3, 1.7)
LEVELS = {"blur": 1}
"""Largest difference from PIL, where it is not 0: a sum halfway between two levels."""


def photograph(width=61, height=47, seed=0):
    """Smooth regions, noise and black and white edges."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    pixels += draw.integers(-9, 10, pixels.shape, dtype=np.int16)
    pixels[:: height // 3, :], pixels[:, :: width // 4] = 0, 255
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def planes(image):
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


# ---- operations


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_has_the_values_of_pil(name, mode):
    images = [photograph(seed=seed).convert(mode) for seed in range(4)]
    amounts = AMOUNTS.get(name, OTHER_AMOUNTS)
    ops = [((name, amount),) for amount in amounts for _ in images]
    batch = torch.stack([planes(image).float() for _ in amounts for image in images])
    ours = apply_ops(batch, ops)
    theirs = torch.stack(
        [planes(BY_PIL[name](image, amount)) for amount in amounts for image in images]
    )
    assert_close(ours, theirs.float(), rtol=0, atol=LEVELS.get(name, 0))
    assert (ours != theirs).double().mean() < 1e-3


@pytest.mark.parametrize("channels", [1, 3])
def test_what_follows_the_crop_is_what_timm_draws_and_does(channels):
    pixels = planes(photograph().convert("L" if channels == 1 else "RGB"))
    transform, seen = train_transform(SIZE, RECIPE), set()
    crops, ops, expected = [], [], []
    for place in range(60):
        seed_everything("augment", 0, 0, place)
        expected.append(torch.from_numpy(transform(pixels).copy()).float())
        after = random.random(), torch.rand(1)
        seed_everything("augment", 0, 0, place)
        crops.append(torch.from_numpy(random_resized_crop(SIZE, RECIPE.crop_scale, pixels)).float())
        ops.append(draw_ops(RECIPE))
        assert (random.random(), torch.rand(1)) == after
        seen |= {name for name, _ in ops[-1] if name}
    assert seen == set(OPERATIONS)
    ours = apply_ops(torch.stack(crops), ops)
    assert_close(ours, torch.stack(expected), rtol=0, atol=2)  # a level of the blur, then jitter
    assert (ours != torch.stack(expected)).double().mean() < 1e-3


def test_an_image_does_not_depend_on_its_batch():
    images = torch.stack([planes(photograph(seed=seed)).float() for seed in range(12)])
    seed_everything("ops")
    ops = [draw_ops(RECIPE) for _ in images]
    whole = apply_ops(images.clone(), ops)
    for count in (1, 5):
        parts = [slice(first, first + count) for first in range(0, len(images), count)]
        split = torch.cat([apply_ops(images[part].clone(), ops[part]) for part in parts])
        assert torch.equal(split, whole)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_of_grey_images_alone_can_be_normalised_in_place(batch):
    images = torch.stack([planes(photograph(seed=seed)).float() for seed in range(batch)])
    grey = apply_ops(images, [(("grayscale", 0.0),)] * batch)
    assert torch.equal(grey.clone().sub_(1), grey.sub_(1))


# ---- crop


@pytest.mark.parametrize("size", [(28, 36), (90, 16), (5, 120)])
def test_a_crop_is_that_of_timm_resized_as_by_pil_up_to_a_level_per_axis(size):
    image, differences = photograph(), []
    for place in range(40):
        random.seed(place)
        ours = random_resized_crop(size, 0.08, planes(image))
        random.seed(place)
        top, left, height, width = RandomResizedCrop.get_params(image, (0.08, 1.0), CROP_ASPECT)
        crop = image.crop((left, top, left + width, top + height))
        across = crop.resize((size[1], height), Image.Resampling.BICUBIC)
        theirs = np.asarray(across.resize(size[::-1], Image.Resampling.BICUBIC))
        differences.append(np.abs(ours.astype(int) - theirs.transpose(2, 0, 1)))
    found = np.stack(differences)
    assert found.max() <= 2
    assert (found > 1).mean() < 1e-4
    assert (found > 0).mean() < 1e-2


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2)])
def test_a_crop_of_an_image_of_few_pixels_is_never_empty(shape):
    pixels, draws = torch.full((3, *shape), 7, dtype=torch.uint8), set()
    for place in range(100):
        random.seed(place)
        draws.add(0 in RandomResizedCrop.get_params(pixels, (0.08, 1.0), CROP_ASPECT)[2:])
        random.seed(place)
        assert (random_resized_crop((8, 8), 0.08, pixels) == 7).all()
    assert True in draws  # timm has drawn one without a pixel


# ---- decoding


@pytest.mark.parametrize("size", [(61, 47), (1, 1), (64, 48)])
@pytest.mark.parametrize(
    "how",
    [
        *[{"subsampling": number} for number in range(3)],
        *[{"progressive": True}, {"quality": 15}, {"keep_rgb": True}, {"restart_marker_rows": 1}],
    ],
    ids=str,
)
def test_a_jpeg_file_has_the_values_of_pil(tmp_path, size, how):
    path = str(tmp_path / "x.jpg")
    photograph().resize(size).save(path, **how)
    with Image.open(path) as image:
        expected = planes(image.convert("RGB"))
    assert torch.equal(open_image(path, as_tensor), expected)
    assert torch.equal(planes(open_image(path, as_trained)), expected)
    grey = open_image(path, lambda image: as_tensor(image, "L"))
    with Image.open(path) as image:
        assert torch.equal(grey, planes(image.convert("L")))


def test_what_is_left_of_a_jpeg_file_is_told_by_pil(tmp_path, monkeypatch):
    whole, path = io.BytesIO(), tmp_path / "x.jpg"
    photograph(300, 200).save(whole, "JPEG")
    path.write_bytes(whole.getvalue()[:3000])
    found = open_image(str(path), as_tensor)
    assert isinstance(found, Unreadable)
    assert "truncated" in found.reason
    path.write_bytes(whole.getvalue())
    decoded = open_image(str(path), as_tensor)
    monkeypatch.delattr(torch.ops.image, "decode_jpeg")  # a torchvision without decoders
    monkeypatch.setattr(type(torch.ops.image), "__getattr__", _no_operator, raising=False)
    assert torch.equal(open_image(str(path), as_tensor), decoded)


def _no_operator(self, name):
    raise AttributeError(name)


# ---- runs


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(24):
        for split in ("train", "val"):
            path = folder / split / "ab"[number % 2] / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            photograph(seed=number).save(path)
    return folder


def batches(root, first=0, last=4, micro=16, command="pretrain", **given):
    options = {"data": str(root), "out": str(root / "run"), "image_size": (32, 32), "workers": 0}
    options |= {
        "batch_size": 16,
        "micro_batch_size": micro,
        "auto_augment": "3a",
        "lr_rule": "none",
    }
    if command == "finetune":
        options["color_jitter"] = 0.2
    data = classifier_data(resolve(command, {**options, **given}).run, CPU, 0, 1, {})
    with contextlib.closing(data.train_steps(first, last)) as ops:
        return [torch.cat([batch.images for batch in step]) for step in ops]


def differ(ours, theirs):
    """Fraction of values that differ by more than the rounding of mixed floats."""
    return (torch.stack(ours) - torch.stack(theirs)).abs().gt(1e-5).double().mean()


def test_on_the_device_or_not_a_run_sees_the_same_images(root):
    on_cpu = batches(root, augment_on="cpu")
    assert torch.equal(torch.stack(batches(root)), torch.stack(on_cpu))  # auto, on a CPU
    on_device = batches(root, augment_on="device")
    assert differ(on_device, on_cpu) < 1e-3


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_on_the_device_resume_exactly(root, workers):
    whole = batches(root, augment_on="device", random_erasing=0.25)
    again = batches(root, 2, augment_on="device", random_erasing=0.25, workers=workers, micro=8)
    assert all(torch.equal(a, b) for a, b in zip(again, whole[2:], strict=True))


def test_a_policy_that_only_pil_has_is_refused_on_the_device(root):
    with pytest.raises(ConfigError, match="--augment-on device") as refused:
        batches(root, augment_on="device", auto_augment="rand-m9-mstd0.5-inc1")
    assert "--auto-augment 3a" in refused.value.hint
    batches(root, last=1, auto_augment="rand-m9-mstd0.5-inc1")


def test_what_is_kept_in_memory_has_no_use_for_it():
    warnings = resolve("pretrain", {"data": "digits", "augment_on": "cpu"}).warnings
    assert "--augment-on has no effect: digits is kept in memory" in " ".join(warnings)
