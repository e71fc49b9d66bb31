from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from spiralrope_cli.core.data import listing
from spiralrope_cli.core.data.images import Unreadable, as_trained, open_image
from spiralrope_cli.core.data.listing import ImageList, list_class_folders
from spiralrope_cli.core.data.splits import train_split
from spiralrope_cli.core.errors import DataError

OLD = 1_000_000_000_000_000_000
"""A time in nanoseconds long ago."""
FILES = (
    "a/1.jpg",
    "a/größe 2.png",
    "a/notes.txt",
    "b/deep/3.jpg",
    "b/deep/er/4.JPEG",
    "b/empty/.x",
)


def age(root):
    for where, *_ in os.walk(root):
        os.utime(where, ns=(OLD, OLD))


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("SPIRALROPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "KEPT_FROM", 1)
    for name in FILES:
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    age(tmp_path / "train")
    return tmp_path / "train"


def kept_files(root):
    return list((root.parent / "cache" / "indexes").glob("*.npz"))


def listed(root):
    split = train_split(root)
    return list(split.images), split.class_names, split.notes


def fresh(root, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(listing, "_read_kept", lambda folder: None)
        patch.setattr(listing, "KEPT_FROM", 1 << 40)
        return listed(root)


def no_walk(*_):
    raise AssertionError("it was listed again")


def test_a_kept_list_is_the_list(root, monkeypatch):
    first = listed(root)
    assert [Path(path).name for path, _ in first[0]] == ["1.jpg", "größe 2.png", "3.jpg", "4.JPEG"]
    assert [label for _, label in first[0]] == [0, 0, 1, 1]
    assert "1 .txt" in " ".join(first[2])
    assert len(kept_files(root)) == 1
    monkeypatch.setattr(listing, "images_below", no_walk)
    assert listed(root) == first


def rename(before, after):
    return lambda root: (root / before).rename(root / after)


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "a" / "0.jpg").touch(),
        lambda root: (root / "b" / "empty" / "5.jpg").touch(),
        lambda root: (root / "b" / "deep" / "er" / "4.JPEG").unlink(),
        rename("a/1.jpg", "a/9.jpg"),
        rename("b/deep/er", "b/deep/est"),
        rename("a", "c"),
        lambda root: root.joinpath("a2").mkdir() or (root / "a2" / "6.jpg").touch(),
    ],
    ids=["added", "in an empty folder", "removed", "renamed", "folder", "class", "new class"],
)
def test_a_change_of_files_or_folders_is_noticed(root, monkeypatch, change):
    before = listed(root)
    change(root)
    now = listed(root)
    assert now != before
    assert now == fresh(root, monkeypatch)
    assert listed(root) == now


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no archive", None])
def test_a_damaged_list_is_made_again(root, damage):
    first = listed(root)
    [kept] = kept_files(root)
    whole = bytearray(kept.read_bytes())
    whole[len(whole) // 3] ^= 0xFF
    kept.write_bytes(bytes(whole) if damage is None else damage)
    assert listed(root) == first


def test_what_may_still_change_is_not_kept(root):
    (root / "b" / "deep" / "7.jpg").touch()
    listed(root)
    assert not kept_files(root)


def test_small_folders_are_not_kept_and_a_cache_is_not_needed(root, monkeypatch):
    monkeypatch.setattr(listing, "KEPT_FROM", 5)
    first = listed(root)
    assert not kept_files(root)
    monkeypatch.setattr(listing, "KEPT_FROM", 1)
    (root.parent / "cache").write_text("a file, not a folder")
    assert listed(root) == first


def test_an_empty_class_folder_is_told_and_nothing_kept(root):
    (root / "empty").mkdir()
    age(root)
    with pytest.raises(DataError, match=r"class folder .*empty holds no images"):
        listed(root)
    assert not kept_files(root)


def test_two_processes_at_once_have_one_list(root):
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        found = pool.map(listed, [root] * 6, chunksize=1)
    assert all(each == found[0] for each in found)
    assert len(kept_files(root)) == 1
    assert not list(root.parent.glob("cache/indexes/.*"))


def test_a_file_that_vanished_is_told_by_its_path(root):
    listed(root)
    (root / "a" / "1.jpg").unlink()
    age(root)  # as if the folder had not changed
    path, _ = train_split(root).images[0]
    assert open_image(path, as_trained) == Unreadable(path, "No such file or directory")


def test_a_slow_list_says_how_far_it_is(root, monkeypatch, capfd):
    monkeypatch.setattr(listing, "SLOW_SECONDS", -1.0)
    list_class_folders(root, ["a", "b"])
    said = capfd.readouterr()
    assert f"listing {root}  2/2" in said.err
    assert not said.out


def test_an_image_list_is_a_sequence_of_pairs():
    pairs = [("/x/a/1.jpg", 3), ("/x/b", 0), ("/x/", 1), ("/x/\udcff.png", 2)]
    images = ImageList.of(pairs, "/x/")
    assert list(images) == pairs
    assert [images[-1], images[0]] == [pairs[-1], pairs[0]]
    assert images[1:3] == pairs[1:3]
    assert ImageList.of(images) is images
    for beyond in (4, -5):
        with pytest.raises(IndexError):
            images[beyond]
