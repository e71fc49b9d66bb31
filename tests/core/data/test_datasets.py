from __future__ import annotations

import pytest
from PIL import Image

from spiralrope_cli.core.data.splits import (
    find_data_set,
    find_train_set,
    find_val_set,
    train_split,
    val_split,
)
from spiralrope_cli.core.errors import DataError
from spiralrope_cli.core.resolve import resolve


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 14)).save(path)


@pytest.fixture
def root(tmp_path):
    """Four classes whose plain sorted order is not the natural one."""
    for split, count in (("train", 3), ("val", 2)):
        for name in ("b", "A", "10", "2"):
            for number in range(count):
                save(tmp_path / split / name / f"{number}.png")
    return tmp_path


def test_classes_are_numbered_in_plain_sorted_order(root):
    data_set = find_data_set(str(root))
    assert (data_set.num_classes, data_set.num_train, data_set.num_val) == (4, 12, 8)
    images = list(train_split(root).images)
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
    found = [path for path, number in train_split(root).images if number == 2]
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
    for split in ("train", name):
        for label in "ab":
            save(tmp_path / split / label / "0.png")
    data_set = find_data_set(str(tmp_path))
    assert data_set.num_val == 2
    assert len(val_split(tmp_path).images) == 2
    told = [f"there is no val/: {tmp_path / 'test'} is used for validation"] * (name == "test")
    assert list(find_val_set(str(tmp_path)).notes) == told
    best = ", and chooses the best checkpoint"
    assert list(data_set.notes) == [note + best for note in told]


def test_files_that_do_not_count_are_counted_and_said(root):
    for name in ("A/1.heic", "A/deep/2.HEIC", "b/list.txt", "b/.DS_Store", "README", "stray.png"):
        path = root / "train" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("no image of ours")
    assert find_data_set(str(root)).notes == (
        f"{root}/train: 1 image(s) beside the class folders are left out",
        f"{root}/train: files that are no images are left out: 2 .heic, 1 .txt",
    )
    assert find_val_set(str(root)).notes == ()
    assert find_train_set(str(root)).notes == find_data_set(str(root)).notes
    resolved = resolve("pretrain", {"data": str(root), "batch_size": 8, "warmup_epochs": 0})
    assert resolved.warnings == find_data_set(str(root)).notes


def test_one_class_is_refused_for_a_classifier_and_said_elsewhere(tmp_path):
    for split in ("train", "val"):
        save(tmp_path / split / "all" / "cat" / "0.png")
    with pytest.raises(DataError, match="has one class folder, all") as refused:
        find_data_set(str(tmp_path))
    assert "they lie in train/ itself" in refused.value.hint
    assert find_train_set(str(tmp_path)).notes == (f"{tmp_path}/train has one class, all",)
    assert find_val_set(str(tmp_path)).notes == (f"{tmp_path}/val has one class, all",)


def test_no_folder_and_no_name_lists_what_there_is(tmp_path):
    with pytest.raises(DataError, match="is neither a folder nor a built-in name") as caught:
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
    (root / "train" / "2" / "0.heic").write_text("no image of ours")
    with pytest.raises(DataError, match=r"train/2 holds no images: 1 \.heic") as caught:
        find_data_set(str(root))
    assert ".png" in caught.value.hint


def test_splits_with_different_classes_are_refused(root):
    (root / "val" / "b").rename(root / "val" / "c")
    with pytest.raises(DataError, match="only in") as refused:
        find_data_set(str(root))
    assert refused.value.message == (
        f"1 class folder(s) only in {root}/train: b; 1 class folder(s) only in {root}/val: c"
    )


def test_archives_are_to_be_unpacked(root):
    for name in ("n01440764.tar", "n01443537.tar.gz"):
        path = root / "packed" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with pytest.raises(DataError, match=r"no class folders, but 2 archive\(s\): n01440764") as told:
        find_train_set(str(root / "packed"))
    assert "tar -xf" in told.value.hint
