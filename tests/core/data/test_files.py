from __future__ import annotations

import contextlib
import dataclasses
import io
import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image

from spiralrope_cli.core.config.datasets import PHOTOGRAPHS, find_data_set, list_images, val_folder
from spiralrope_cli.core.config.nested import build
from spiralrope_cli.core.config.recipes import PRETRAIN
from spiralrope_cli.core.config.runs import AugmentConfig
from spiralrope_cli.core.data import files
from spiralrope_cli.core.data.augment import eval_transform, train_transform
from spiralrope_cli.core.data.files import (
    ImageFiles,
    TrainFiles,
    Unreadable,
    collate,
    load,
)
from spiralrope_cli.core.errors import DataError
from spiralrope_cli.core.runtime.seeds import seed_everything

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
    return ImageFiles(list_images(val_folder(root)), transform, grey=False)


# ---- folders


def test_classes_are_numbered_in_plain_sorted_order(root):
    data_set = find_data_set(str(root))
    assert (data_set.num_classes, data_set.num_train, data_set.num_val) == (4, 12, 8)
    images = list_images(root / "train")
    assert images == sorted(images)
    names = {number: path.split("/")[-2] for path, number in images}
    assert [names[number] for number in range(4)] == ["10", "2", "A", "b"]


def test_images_are_found_below_their_class_in_any_usual_format(root):
    folder = root / "train" / "A"
    for name in ("deep/er/x.jpeg", "Y.JPG", "z.webp", "w.tif"):
        save(folder / name)
    for name in ("notes.txt", ".hidden.png", "archive.zip"):
        (folder / name).write_text("no image")
    (root / "train" / ".cache").mkdir()
    (root / "train" / "stray.png").write_text("beside the classes")
    found = [path for path, number in list_images(root / "train") if number == 2]
    assert [path.removeprefix(f"{folder}/") for path in found] == [
        *("0.png", "1.png", "2.png", "Y.JPG", "deep/er/x.jpeg", "w.tif", "z.webp")
    ]


@pytest.mark.parametrize(
    ("there", "message"),
    [((), "no train/ and no val/"), (("val",), "no train/"), (("train",), "no val/")],
)
def test_a_missing_split_is_named(tmp_path, there, message):
    for split in there:
        save(tmp_path / split / "a" / "0.png")
    with pytest.raises(DataError) as caught:
        find_data_set(str(tmp_path))
    assert caught.value.message == f"{tmp_path} has {message}"
    assert "train/ and val/" in caught.value.hint


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_the_validation_folder_may_have_any_usual_name(tmp_path, name):
    save(tmp_path / "train" / "a" / "0.png")
    save(tmp_path / name / "a" / "0.png")
    assert find_data_set(str(tmp_path)).num_val == 1
    assert len(val_files(tmp_path)) == 1


def test_no_folder_and_no_name_lists_what_there_is(tmp_path):
    with pytest.raises(DataError, match="is no folder and no built-in name") as caught:
        find_data_set(str(tmp_path / "nowhere"))
    assert "digits" in caught.value.hint


def test_a_split_without_class_folders_is_refused(root):
    for path in sorted((root / "val").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    save(root / "val" / "0.png")
    with pytest.raises(DataError, match="val has no class folders"):
        find_data_set(str(root))


def test_a_class_without_images_is_named(root):
    for path in (root / "train" / "2").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="train/2 holds no images") as caught:
        find_data_set(str(root))
    assert ".png" in caught.value.hint


def test_splits_with_different_classes_are_refused(root):
    (root / "val" / "b").rename(root / "val" / "c")
    with pytest.raises(DataError, match=r"differ in 2 class folder\(s\): b, c"):
        find_data_set(str(root))


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
def test_every_kind_of_picture_is_read(tmp_path, mode, suffix, grey):
    image = picture().convert("L").convert("I;16") if mode == "I;16" else picture(mode=mode)
    path = save(tmp_path / f"x.{suffix}", image)
    channels = 1 if grey else 3
    for kind, transform, parts in (
        (ImageFiles, eval_transform(SIZE, 0.875), None),
        (TrainFiles, train_transform(SIZE, PLAIN), (0, 0, 0)),
    ):
        array, label, bad = kind([(path, 7)], transform, grey)[0, parts]
        assert not bad
        assert label == 7
        assert array.shape == (channels, *SIZE)
        assert array.dtype == np.uint8
        assert array.std() > 0


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (300, 3), (17, 31), (16, 24)])
@pytest.mark.parametrize("asked", [(16, 16), (16, 24), (7, 3)])
def test_every_size_of_picture_is_read(tmp_path, size, asked):
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
    array, _, bad = ImageFiles([(path, 0)], eval_transform(SIZE, 0.875), grey=False)[0, None]
    assert bad is None
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
    array, label, bad = ImageFiles([(path, 3)], eval_transform(SIZE, 0.875), grey=False)[0, None]
    assert array is None
    assert label == 3
    assert bad.path == path
    assert bad.reason
    assert path not in bad.reason
    assert str(bad.error()).startswith(f"image {path} cannot be read: {bad.reason}")
    assert "--skip-bad" in bad.error().hint


def test_a_picture_too_large_to_be_true_is_told(tmp_path, monkeypatch):
    path = save(tmp_path / "x.png", picture(60, 60))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    _, _, bad = ImageFiles([(path, 0)], eval_transform(SIZE, 0.875), grey=False)[0, None]
    assert bad == Unreadable(path, "it is too large")


def test_training_replaces_an_unreadable_image_by_the_next_and_tells(tmp_path):
    bad = [damaged(tmp_path, how) for how in ("text", "cut")]
    good = save(tmp_path / "good.png")
    trained = TrainFiles(
        [(good, 4), (bad[0], 0), (bad[1], 1)], train_transform(SIZE, RECIPE), grey=False
    )
    array, label, told = trained[1, (0, 0, 5)]
    assert [each.path for each in told] == bad
    assert label == 4
    assert np.array_equal(array, trained[0, (0, 0, 5)][0])
    assert trained[0, (0, 0, 5)][2] == ()


def test_training_gives_up_after_many_unreadable_images_in_a_row(tmp_path):
    path = damaged(tmp_path, "text")
    good = save(tmp_path / "good.png")
    listed = [(path, 0)] * files.MAX_TRIES + [(good, 1)]
    trained = TrainFiles(listed, train_transform(SIZE, RECIPE), grey=False)
    array, _, told = trained[0, (0, 0, 0)]
    assert array is None
    assert len(told) == files.MAX_TRIES
    assert trained[1, (0, 0, 0)][1] == 1


def test_a_batch_holds_what_could_be_read_and_names_the_rest():
    one, other = Unreadable("one", "why"), Unreadable("other", "why")
    pixels = np.ones((3, 2, 2), dtype=np.uint8)
    mixed = collate([(pixels, 3, None), (None, 1, one), (pixels * 2, 0, (other,))])
    assert mixed.images.shape == (2, 3, 2, 2)
    assert mixed.images.dtype == torch.uint8
    assert mixed.labels.tolist() == [3, 0]
    assert mixed.unreadable == (one, other)
    nothing = collate([(None, 1, one)])
    assert len(nothing.labels) == 0
    assert nothing.unreadable == (one,)


# ---- augmentation


def test_the_same_keys_give_the_same_bytes_for_any_number_of_workers(root):
    keys = [[(n % 12, (0, 0, n)) for n in range(first, first + 6)] for first in range(0, 24, 6)]
    trained = TrainFiles(list_images(root / "train"), train_transform(SIZE, RECIPE), grey=False)
    alone, shared, again = (
        list(load(trained, keys, workers, pin_memory=False)) for workers in (0, 2, 2)
    )
    for batches in (shared, again):
        assert len(batches) == len(alone) == 4
        for ours, expected in zip(batches, alone, strict=True):
            assert torch.equal(ours.images, expected.images)
            assert torch.equal(ours.labels, expected.labels)
    assert alone[0].images.shape == (6, 3, *SIZE)
    assert alone[0].labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_closing_ends_the_workers_while_an_error_is_on_its_way(root):
    keys = [[(n % 12, None)] for n in range(1000)]
    before = set(multiprocessing.active_children())
    batches = load(val_files(root), keys, 2, pin_memory=False)
    next(batches)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    with pytest.raises(ValueError, match="on its way"), contextlib.closing(batches):
        raise ValueError("on its way")
    assert not any(worker.is_alive() for worker in workers)


def test_a_worker_that_was_killed_is_one_line(root):
    keys = [[(n % 12, None)] for n in range(1000)]
    before = set(multiprocessing.active_children())
    batches = load(val_files(root), keys, 1, pin_memory=False)
    next(batches)
    [worker] = set(multiprocessing.active_children()) - before
    worker.kill()
    with pytest.raises(DataError, match="a loader process died"):
        list(batches)


def test_workers_name_unreadable_images(root):
    bad = root / "val" / "2" / "1.png"
    bad.write_bytes(b"no image")
    evaluated = val_files(root)
    keys = [[(n, None) for n in range(first, first + 4)] for first in (0, 4)]
    first, second = load(evaluated, keys, 2, pin_memory=False)
    assert [each.path for each in first.unreadable] == [str(bad)]
    assert first.labels.tolist() == [0, 0, 1]
    assert second.labels.tolist() == [2, 2, 3, 3]
    assert second.unreadable == ()


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
    image = picture(16, 16)
    for place in range(1000):
        seed_everything("augment", 0, 0, place)
        assert np.asarray(transform(image)).shape == (3, 16, 16)


def test_seed_epoch_and_place_each_change_the_augmentation(tmp_path):
    trained = TrainFiles([(save(tmp_path / "x.png"), 0)], train_transform(SIZE, RECIPE), grey=False)
    seen = {trained[0, parts][0].tobytes() for parts in ((0, 0, 1), (0, 1, 0), (1, 0, 0))}
    assert len(seen) == 3


def test_hflip_alone_mirrors():
    image = picture(16, 16)
    whole = dataclasses.replace(PLAIN, crop_scale=1.0)
    kept, flipped = (
        train_transform((16, 16), dataclasses.replace(whole, hflip=probability))(image)
        for probability in (0.0, 1.0)
    )
    pixels = np.asarray(image).transpose(2, 0, 1)
    assert np.array_equal(np.asarray(kept), pixels)
    assert np.array_equal(np.asarray(flipped), pixels[..., ::-1])
