"""Data sets by name: CIFAR-100 as torchvision has it, and what is said where a set is not here."""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR100
from typer.testing import CliRunner

from spiralrope_cli import main
from spiralrope_cli.core.config.datasets import slug_of
from spiralrope_cli.core.data.image_sets import images_in
from spiralrope_cli.core.data.images import as_trained, open_image
from spiralrope_cli.core.data.splits import find_data_set, train_split, val_split
from spiralrope_cli.core.errors import DataError
from spiralrope_cli.core.hub.catalog import find_row
from spiralrope_cli.core.hub.files import target_of

CLASSES = ["apple", "bee", "worm"]
PIXELS = np.random.default_rng(0).integers(0, 256, (9, 3, 32, 32), np.uint8)
LABELS = [2, 0, 1, 1, 0, 2, 2, 1, 0]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPIRALROPE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A small CIFAR-100 in its own format, and its checksums in torchvision's reader."""
    root = tmp_path / "torchvision"
    (folder := root / "cifar-100-python").mkdir(parents=True)
    parts = {
        name: {"data": PIXELS[part].reshape(-1, 3072), "fine_labels": LABELS[part]}
        for name, part in (("train", slice(6)), ("test", slice(6, 9)))
    }
    sums = {}
    for name, content in {**parts, "meta": {"fine_label_names": CLASSES}}.items():
        (folder / name).write_bytes(pickled := pickle.dumps(content))
        sums[name] = hashlib.md5(pickled).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
    return root


def pack(root, target):
    with tarfile.open(target / "cifar-100-python.tar.gz", "w:gz") as tar:
        tar.add(root / "cifar-100-python", "cifar-100-python")


@pytest.mark.parametrize("form", ["unpacked", "as downloaded", "by name"])
def test_cifar100_is_what_torchvision_reads(cifar, cache, tmp_path, form):
    data = str(cifar)
    if form != "unpacked":
        place = cache if form == "by name" else tmp_path
        pack(cifar, place)
        data = "cifar100" if form == "by name" else str(tmp_path)
    data_set = find_data_set(data)
    assert (data_set.num_train, data_set.num_val) == (6, 3)
    assert (data_set.class_names, slug_of(data_set.data)) == (tuple(CLASSES), "cifar100")
    for split, train in ((train_split(data_set.data), True), (val_split(data_set.data), False)):
        expected = [(np.array(image).tobytes(), label) for image, label in CIFAR100(cifar, train)]
        found = [
            (np.array(open_image(address, as_trained)).tobytes(), label)
            for address, label in split.images
        ]
        assert sorted(found) == sorted(expected)
        assert [label for _, label in found] == sorted(label for _, label in found)
    assert find_data_set(data_set.data) == data_set, "as stored with a run"
    assert len(images_in(type(cache)("cifar100"), "REFERENCE").files) == 6
    (cifar / "cifar-100-python/train").unlink()
    assert find_data_set(data) == data_set, "it is read once"


def test_fid_takes_a_set_by_its_name(cifar, cache, tmp_path, inception_weights):
    pack(cifar, cache)
    for number, pixels in enumerate(PIXELS[:6]):
        (tmp_path / "samples").mkdir(exist_ok=True)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / f"samples/{number}.png")
    words = ["fid", str(tmp_path / "samples"), "cifar100", "--select", "fid", "--json"]
    words += ["--weights", str(inception_weights), "--device", "cpu", "--nproc", "1"]
    done = CliRunner().invoke(main.app, words, catch_exceptions=False)
    found = json.loads(done.stdout)
    assert found["reference"]["count"] == 6
    assert abs(found["fid"]) < 1e-3
    words[2] = "inat18"
    refused = CliRunner().invoke(main.app, words).exception
    assert refused.message == f"inat18: {cache}/inat18 does not exist"


def test_a_damaged_cifar100_is_never_unpickled(cifar, cache, tmp_path):
    (cifar / "cifar-100-python/test").write_bytes(b"cos\nsystem\n(S'touch hit'\ntR.")
    with pytest.raises(DataError, match="is not CIFAR-100 as published: other checksums"):
        find_data_set(str(cifar))
    (cache / "cifar-100-python.tar.gz").write_bytes(b"\x1f\x8b cut")
    with pytest.raises(DataError, match=r"tar\.gz is damaged") as refused:
        find_data_set("cifar100")
    assert refused.value.hint == "download it again"
    assert not list(cache.rglob("*.tar"))


def test_what_is_not_here_says_how_to_get_it(cache, monkeypatch):
    assert target_of(find_row("cifar100")) == cache / CIFAR100.filename
    for data, message, hint in (
        ("cifar100", "cifar100 is not downloaded", "spiralrope fetch cifar100"),
        (
            "inat18",
            f"{cache}/inat18 does not exist",
            "train2018.json, val2018.json and train_val20",
        ),
        ("inat19", f"{cache}/inat19 does not exist", "train2019.json"),
    ):
        with pytest.raises(DataError) as refused:
            find_data_set(data)
        assert message in refused.value.message
        assert hint in refused.value.hint
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match="needs tensorflow_datasets") as refused:
        find_data_set("tfds/mnist")
    assert refused.value.hint == "pip install 'spiralrope[tfds]'"


def test_tfds_finds_what_is_prepared(tmp_path, cache, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match="tfds/mnist is not prepared: ") as refused:
        find_data_set("tfds/mnist")
    assert refused.value.hint.startswith("tfds build mnist")
    with pytest.raises(DataError, match="Dataset nothere not found") as refused:
        find_data_set("tfds/nothere")
    assert refused.value.hint.startswith("$TFDS_DATA_DIR names the folder")
