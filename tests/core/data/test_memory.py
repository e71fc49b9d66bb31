from __future__ import annotations

import gzip
import struct
from importlib import resources

import numpy as np
import pytest
import torch
import torchvision.datasets

from spiralrope_cli.core.config.datasets import DIGITS
from spiralrope_cli.core.data import memory
from spiralrope_cli.core.data.memory import load_digits, load_memory_set
from spiralrope_cli.core.errors import DataError


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
