from __future__ import annotations

import pytest
from PIL import Image

from spiralrope_cli.core.config.datasets import find_data_set, list_images, val_folder
from spiralrope_cli.core.errors import DataError


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
    assert len(list_images(val_folder(tmp_path))) == 1


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
    with pytest.raises(DataError, match="train/2 holds no images") as caught:
        find_data_set(str(root))
    assert ".png" in caught.value.hint


def test_splits_with_different_classes_are_refused(root):
    (root / "val" / "b").rename(root / "val" / "c")
    with pytest.raises(DataError, match=r"differ in 2 class folder\(s\): b, c"):
        find_data_set(str(root))
