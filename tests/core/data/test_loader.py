from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import multiprocessing
import resource
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from spiralrope_cli.core.config.datasets import PHOTOGRAPHS
from spiralrope_cli.core.config.option import build
from spiralrope_cli.core.config.recipes import PRETRAIN
from spiralrope_cli.core.config.runs import AugmentConfig
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.data import loader
from spiralrope_cli.core.data.augment import eval_transform, train_transform
from spiralrope_cli.core.data.images import Unreadable, as_tensor
from spiralrope_cli.core.data.loader import (
    MAX_TRIES,
    BatchIndices,
    ImageFiles,
    _report_error,
    load,
)
from spiralrope_cli.core.data.splits import train_split, val_split
from spiralrope_cli.core.errors import ConfigError, DataError, LaunchError, errno_of
from spiralrope_cli.core.runtime.seeds import seed_everything

TrainFiles = partial(ImageFiles, tries=MAX_TRIES, seed=0, read=as_tensor)
CPU = torch.device("cpu")
RECIPE = build(AugmentConfig, {**PRETRAIN, **PHOTOGRAPHS})
PLAIN = dataclasses.replace(RECIPE, auto_augment="none", color_jitter=0.0, hflip=0.0)
SIZE = (16, 24)


def picture(width=20, height=14, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def save(path, image=None, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(path, **more)
    return str(path)


@pytest.fixture
def root(tmp_path):
    """Three classes whose plain sorted order is not the natural one."""
    for split, count in (("train", 3), ("val", 2)):
        for name in ("b", "A", "10", "2"):
            for number in range(count):
                save(tmp_path / split / name / f"{number}.png", picture(seed=number))
    return tmp_path


def val_files(root):
    transform = eval_transform(SIZE, 0.875)
    return ImageFiles(val_split(root).images, transform, grey=False)


# ---- decoding


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *[("RGB", "png"), ("RGB", "jpg"), ("RGB", "webp"), ("RGB", "ppm"), ("RGB", "bmp")],
        *[("L", "png"), ("L", "jpg"), ("1", "png"), ("I;16", "png"), ("LA", "png")],
        *[("P", "png"), ("P", "gif"), ("RGBA", "png"), ("RGBA", "webp")],
        *[("CMYK", "jpg"), ("CMYK", "tif"), ("YCbCr", "jpg")],
    ],
)
def test_every_kind_of_image_is_read(tmp_path, mode, suffix, grey):
    image = picture().convert("L").convert("I;16") if mode == "I;16" else picture(mode=mode)
    path = save(tmp_path / f"x.{suffix}", image)
    channels = 1 if grey else 3
    for kind, transform, parts in (
        (ImageFiles, eval_transform(SIZE, 0.875), None),
        (TrainFiles, train_transform(SIZE, PLAIN), (0, 0, 0)),
    ):
        array, label, bad, _ = kind([(path, 7)], transform, grey)[0, parts]
        assert not bad
        assert label == 7
        assert array.shape == (channels, *SIZE)
        assert array.dtype == np.uint8
        assert array.std() > 0


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (300, 3), (17, 31), (16, 24)])
@pytest.mark.parametrize("asked", [(16, 16), (16, 24), (7, 3)])
def test_every_size_of_image_is_read(tmp_path, size, asked):
    path = save(tmp_path / "x.png", picture(*size))
    evaluated = ImageFiles([(path, 0)], eval_transform(asked, 0.875), grey=False)
    trained = TrainFiles([(path, 0)], train_transform(asked, RECIPE), grey=False)
    assert evaluated[0, None][0].shape == (3, *asked)
    for place in range(5):
        assert trained[0, (0, 0, place)][0].shape == (3, *asked)


def test_evaluation_keeps_the_middle(tmp_path):
    image = picture(40, 20)
    path = save(tmp_path / "x.png", image)
    array = ImageFiles([(path, 0)], eval_transform((20, 20), 1.0), grey=False)[0, None][0]
    assert np.array_equal(array, np.asarray(image)[:, 10:30].transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_black(tmp_path, kind):
    if kind == "P":
        image, more = Image.new("P", (16, 16), 5), {"transparency": 5}
        image.putpalette([255] * 768)
    else:
        white = (255, 255, 255, 0) if kind == "RGBA" else (255, 0)
        image, more = Image.new(kind, (16, 16), white), {}
    path = save(tmp_path / "x.png", image, **more)
    array = ImageFiles([(path, 0)], eval_transform((16, 16), 1.0), grey=False)[0, None][0]
    assert not array.any()


def test_sixteen_bits_of_grey_are_scaled_not_cut(tmp_path):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    path = save(tmp_path / "x.png", Image.fromarray(levels * 257))
    assert Image.open(path).mode == "I;16"
    array = ImageFiles([(path, 0)], eval_transform((16, 16), 1.0), grey=False)[0, None][0]
    assert np.array_equal(array, np.broadcast_to(levels, (3, 16, 16)))


@pytest.mark.parametrize("name", ["größe.png", "画像.png", "with space.png"])
def test_file_names_of_any_language_are_read(tmp_path, name):
    path = save(tmp_path / name)
    array, _, bad, _ = ImageFiles([(path, 0)], eval_transform(SIZE, 0.875), grey=False)[0, None]
    assert not bad
    assert array.shape == (3, *SIZE)


def damaged(tmp_path, how):
    path = tmp_path / f"{how}.jpg"
    whole = io.BytesIO()
    picture(200, 200).save(whole, "JPEG")
    content = {"text": b"no image at all", "empty": b"", "cut": whole.getvalue()[:2000]}
    if how != "missing":
        path.write_bytes(content[how])
    return str(path)


@pytest.mark.parametrize("how", ["text", "empty", "cut", "missing"])
def test_an_unreadable_image_is_told_by_name(tmp_path, how):
    path = damaged(tmp_path, how)
    files = ImageFiles([(path, 3)], eval_transform(SIZE, 0.875), grey=False)
    array, label, (bad,), _ = files[0, None]
    assert array is None
    assert label == 3
    assert bad.path == path
    assert bad.reason
    assert path not in bad.reason
    assert str(bad.error()).startswith(f"image {path} cannot be read: {bad.reason}")
    assert "--skip-bad" in bad.error().hint


def test_a_image_too_large_to_be_true_is_told(tmp_path, monkeypatch):
    path = save(tmp_path / "x.png", picture(60, 60))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    _, _, bad, _ = ImageFiles([(path, 0)], eval_transform(SIZE, 0.875), grey=False)[0, None]
    assert bad == (Unreadable(path, "it has more than 2,000 pixels; scale it down"),)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_is_not_to_blame_for_what_the_system_lacks(root, monkeypatch, workers):
    monkeypatch.setattr(Image, "open", Mock(side_effect=OSError(errno.EMFILE, "Too many open")))
    with pytest.raises(OSError, match="Too many open") as refused:
        list(loaded(val_files(root), [BatchIndices([0, 1], [])], workers))
    assert errno_of(refused.value) == errno.EMFILE


def test_training_replaces_an_unreadable_image_by_the_next_and_tells(tmp_path):
    bad = [damaged(tmp_path, how) for how in ("text", "cut")]
    good = save(tmp_path / "good.png")
    trained = TrainFiles(
        [(good, 4), (bad[0], 0), (bad[1], 1)], train_transform(SIZE, RECIPE), grey=False
    )
    array, label, told, _ = trained[1, (0, 0, 5)]
    assert [each.path for each in told] == bad
    assert label == 4
    assert np.array_equal(array, trained[0, (0, 0, 5)][0])
    assert trained[0, (0, 0, 5)][2] == ()


def test_training_gives_up_after_many_unreadable_images_in_a_row(tmp_path):
    path = damaged(tmp_path, "text")
    good = save(tmp_path / "good.png")
    listed = [(path, 0)] * MAX_TRIES + [(good, 1)]
    trained = TrainFiles(listed, train_transform(SIZE, RECIPE), grey=False)
    array, _, told, _ = trained[0, (0, 0, 0)]
    assert array is None
    assert len(told) == MAX_TRIES
    assert trained[1, (0, 0, 0)][1] == 1


def test_a_batch_holds_what_could_be_read_and_names_the_rest(tmp_path):
    bad = [damaged(tmp_path, how) for how in ("text", "cut")]
    listed = [
        (save(tmp_path / "a.png"), 3),
        (bad[0], 1),
        (save(tmp_path / "b.png"), 0),
        (bad[1], 2),
    ]
    files = ImageFiles(listed, eval_transform(SIZE, 0.875))
    at = BatchIndices([0, 1, 2, 3], [])
    mixed = files.__getitems__(at)
    assert mixed.at == at
    assert mixed.images.shape == (2, 3, *SIZE)
    assert mixed.images.dtype == torch.uint8
    assert mixed.labels.tolist() == [3, 0]
    assert [each.path for each in mixed.unreadable] == bad
    nothing = files.__getitems__(BatchIndices([1], []))
    assert len(nothing.labels) == 0
    assert [each.path for each in nothing.unreadable] == bad[:1]


# ---- augmentation


def loaded(files, batches, workers, skip_bad=True, unreadable=None):
    machine = MachineConfig(workers=workers, skip_bad=skip_bad)
    return load(files, machine, CPU, {} if unreadable is None else unreadable, batches)


def test_the_same_places_give_the_same_bytes_for_any_number_of_workers(root):
    places = [list(range(first, first + 6)) for first in range(0, 24, 6)]
    batches = [BatchIndices([n % 12 for n in each], each) for each in places]
    trained = TrainFiles(train_split(root).images, train_transform(SIZE, RECIPE), grey=False)
    alone, shared, again = (list(loaded(trained, batches, workers)) for workers in (0, 2, 2))
    for others in (shared, again):
        assert [batch.at for batch in others] == batches
        for ours, expected in zip(others, alone, strict=True):
            assert torch.equal(ours.images, expected.images)
            assert torch.equal(ours.labels, expected.labels)
    assert alone[0].images.shape == (6, 3, *SIZE)
    assert alone[0].labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(alone[0].images[3], torch.tensor(trained[3, (0, 0, 3)][0]).float())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_large_batch_is_read_in_parts_and_is_the_same(root, monkeypatch, workers):
    batches = [BatchIndices(list(range(8)), []), BatchIndices([3], []), BatchIndices([5, 1, 6], [])]
    files = val_files(root)
    whole = list(loaded(files, batches, 0))
    monkeypatch.setattr(loader, "AT_ONCE", 3)
    parts = list(loaded(files, batches, workers))
    for ours, expected in zip(parts, whole, strict=True):
        assert ours.at == expected.at
        assert torch.equal(ours.images, expected.images)
        assert torch.equal(ours.labels, expected.labels)
        assert sorted(map(str, ours.unreadable)) == sorted(map(str, expected.unreadable))


def test_closing_ends_the_workers_while_an_error_is_on_its_way(root):
    before = set(multiprocessing.active_children())
    batches = loaded(val_files(root), [BatchIndices([n % 8], []) for n in range(1000)], 2)
    next(batches)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    with pytest.raises(ValueError, match="on its way"), contextlib.closing(batches):
        raise ValueError("on its way")
    assert not any(worker.is_alive() for worker in workers)


def test_a_worker_that_was_killed_is_one_line(root):
    before = set(multiprocessing.active_children())
    batches = loaded(val_files(root), [BatchIndices([n % 8], []) for n in range(1000)], 1)
    next(batches)
    [worker] = set(multiprocessing.active_children()) - before
    worker.kill()
    with pytest.raises(LaunchError, match="a data loader worker died"):
        list(batches)


def test_a_size_limit_is_an_error_of_the_worker_and_not_a_wait_without_end(root):
    batches = loaded(val_files(root), [BatchIndices([0, 1], [])], 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # workers inherit it
    try:
        with pytest.raises(RuntimeError, match="File too large") as refused:
            list(batches)
        assert errno_of(refused.value) == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_workers_name_unreadable_images(root):
    bad = root / "val" / "2" / "1.png"
    bad.write_bytes(b"no image")
    unreadable = {}
    batches = [BatchIndices([0, 1, 2, 3], []), BatchIndices([4, 5, 6, 7], [])]
    first, second = loaded(val_files(root), batches, 2, unreadable=unreadable)
    assert [each.path for each in first.unreadable] == list(unreadable) == [str(bad)]
    assert first.labels.tolist() == [0, 0, 1]
    assert second.labels.tolist() == [2, 2, 3, 3]
    assert second.unreadable == ()
    with pytest.raises(DataError, match=r"1\.png cannot be read"):
        list(loaded(val_files(root), batches, 2, skip_bad=False))


def test_a_training_batch_is_filled_up_or_the_run_ends(tmp_path):
    bad, good = damaged(tmp_path, "text"), save(tmp_path / "good.png")
    unreadable = {}
    for num_bad, batch in (
        (MAX_TRIES - 1, BatchIndices([0, 1], [0, 1])),
        (MAX_TRIES, BatchIndices([0], [0])),
    ):
        listed = [(bad, 0)] * num_bad + [(good, 1)]
        trained = TrainFiles(listed, train_transform(SIZE, RECIPE))
        batches = loaded(trained, [batch], 0, unreadable=unreadable)
        if num_bad < MAX_TRIES:
            assert next(batches).labels.tolist() == [1, 1]
            assert list(unreadable) == [bad]
        else:
            with pytest.raises(DataError, match="16 training images in a row cannot be read"):
                next(batches)


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"auto_augment": "3a"},
        {"auto_augment": "3a", "color_jitter": 0.3},
        {"auto_augment": "rand-m9-mstd0.5-inc1"},
        {"auto_augment": "augmix-m5-w4-d2"},
        {"color_jitter": 0.4},
        {"hflip": 0.5},
        {"crop_scale": 0.9},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_different_places_are_augmented_differently(tmp_path, changes, grey):
    if grey and "augmix" in str(changes):
        pytest.importorskip("timm", "1.0.30")  # an older one is refused, see test_augment
    path = save(tmp_path / "x.png", picture(16, 16))
    # A crop of the whole square is always the same, so that what differs is what was asked for.
    augment = dataclasses.replace(PLAIN, **{"crop_scale": 1.0, **changes})
    if grey:
        augment = dataclasses.replace(augment, mean=(0.5,), std=(0.25,))
    trained = TrainFiles([(path, 0)], train_transform((16, 16), augment), grey)
    places = [(0, 0, place) for place in range(40)]
    seen = [trained[0, parts][0] for parts in places]
    assert {array.shape for array in seen} == {(1 if grey else 3, 16, 16)}
    assert {array.dtype for array in seen} == {np.dtype(np.uint8)}
    assert len({array.tobytes() for array in seen}) > 1
    again = [trained[0, parts][0] for parts in reversed(places)]
    assert all(np.array_equal(a, b) for a, b in zip(seen, again[::-1], strict=True))


@pytest.mark.parametrize(
    "policy",
    [
        *["3a", "rand-m9-mstd0.5-inc1", "rand-m10-inc1", "augmix-m5-w4-d2"],
        *["original", "originalr", "v0", "v0r"],
    ],
)
def test_no_draw_of_a_policy_fails(policy):
    # Level 10 is what m9 with mstd0.5 draws once in hundreds of pictures, and a run sees millions.
    transform = train_transform((16, 16), dataclasses.replace(RECIPE, auto_augment=policy))
    image = as_tensor(picture(16, 16))
    for place in range(1000):
        seed_everything("augment", 0, 0, place)
        assert np.asarray(transform(image)).shape == (3, 16, 16)


def test_a_worker_whose_trainer_was_killed_prints_nothing(capfd):
    lost, other = ConnectionResetError(104, "Connection reset by peer"), ValueError("another")
    _report_error(type(lost), lost, None)
    assert capfd.readouterr().err == ""
    _report_error(type(other), other, None)
    assert "another" in capfd.readouterr().err


def test_seed_epoch_and_place_each_change_the_augmentation(tmp_path):
    trained = TrainFiles([(save(tmp_path / "x.png"), 0)], train_transform(SIZE, RECIPE), grey=False)
    seen = {trained[0, parts][0].tobytes() for parts in ((0, 0, 1), (0, 1, 0), (1, 0, 0))}
    assert len(seen) == 3


def test_hflip_alone_mirrors():
    image = picture(16, 16)
    whole = dataclasses.replace(PLAIN, crop_scale=1.0)
    kept, flipped = (
        train_transform((16, 16), dataclasses.replace(whole, hflip=probability))(as_tensor(image))
        for probability in (0.0, 1.0)
    )
    pixels = np.asarray(image).transpose(2, 0, 1)
    assert np.array_equal(np.asarray(kept), pixels)
    assert np.array_equal(np.asarray(flipped), pixels[..., ::-1])


def test_a_temporary_folder_too_long_for_sockets_is_refused(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/" + "x" * 75)
    with pytest.raises(ConfigError, match="may have at most 75 characters"):
        next(loader.read_ahead(None, [], workers=1, pin_memory=False))
    assert not list(loader.read_ahead(None, [], workers=0, pin_memory=False))
