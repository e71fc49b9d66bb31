from __future__ import annotations

import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from spiralrope_cli.core.data import image_sets
from spiralrope_cli.core.data.image_sets import inspect_side, names_of
from spiralrope_cli.core.errors import DataError


@pytest.mark.parametrize(
    ("notes", "num", "protocol"),
    [
        ({"num_images": 50, "protocol": "ours"}, 50, "ours"),
        ({}, None, ""),
        ({"num_images": [1, 2], "protocol": [1.0]}, None, ""),
        ({"num_images": "many", "protocol": 3}, None, ""),
        ({"num_images": -4}, None, ""),
        ({"protocol": "long" * 10_000}, None, ""),
    ],
)
def test_what_statistics_say_of_themselves_is_believed_if_it_can_be(tmp_path, notes, num, protocol):
    np.savez(tmp_path / "a.npz", mu=np.zeros(2048), sigma=np.eye(2048), **notes)
    side = inspect_side(tmp_path / "a.npz", "REFERENCE")
    assert (side.num, side.protocol) == (num, protocol)
    assert side.words.startswith("statistics for fid of ")


def test_names_are_known_or_numbers(image_folder):
    assert names_of("digits", 10) == list("0123456789")
    assert names_of("fashion-mnist", 10)[9] == "Ankle boot"
    assert names_of("", 1000)[207] == "golden retriever"
    assert names_of(str(image_folder), 2) == ["dark", "light"]
    assert names_of(str(image_folder), 3) == ["0", "1", "2"]
    assert names_of("gone", 2) == ["0", "1"]


def test_files_of_a_folder_that_are_no_images_are_counted(image_folder, tmp_path):
    folder = shutil.copytree(image_folder, tmp_path / "images")
    assert inspect_side(folder, "SAMPLES").images.others == ""
    for name in ("a.heic", "b.heic", "train/list.txt", ".hidden"):
        (folder / name).write_text("no image of ours")
    side = inspect_side(folder, "SAMPLES")
    assert (side.images.others, side.num) == (": 2 .heic, 1 .txt", 26)


def test_shards_of_another_kind_are_counted_too(image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SPIRALROPE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "a.tar", "w") as tar:
        tar.add(image_folder / "val", "")
    (tmp_path / "shards" / "b.parquet").touch()
    side = inspect_side(tmp_path / "shards", "SAMPLES")
    assert (side.images.others, side.num) == (": 1 .parquet", 10)


def test_an_image_too_large_to_be_true_is_refused_by_its_header(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", np.zeros((2, 20, 30, 3), np.uint8))
    assert inspect_side(tmp_path / "a.npz", "SAMPLES").num == 2
    monkeypatch.setattr(image_sets, "MOST_PIXELS", 599)
    with pytest.raises(DataError, match="arr_0 has images of 20x30; at most 599 pixels are read"):
        inspect_side(tmp_path / "a.npz", "SAMPLES")


def test_the_limit_is_that_of_image_files():
    assert image_sets.MOST_PIXELS == 2 * Image.MAX_IMAGE_PIXELS
