from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from spiralrope_cli.core.data import images as reading
from spiralrope_cli.core.data.image_sets import inspect_side
from spiralrope_cli.core.data.images import FilesOfAnySize, image_batches, num_bytes
from spiralrope_cli.core.data.listing import images_below
from spiralrope_cli.core.data.loader import read_ahead
from spiralrope_cli.core.metrics import features

SIZES = [(8, 8), (6, 9), (8, 8), (8, 8), (6, 9), (5, 5), (8, 8)]


@pytest.fixture
def folder(tmp_path):
    """Seven pictures of three sizes at several depths, whose first value is their number."""
    for number, size in enumerate(SIZES):
        where = tmp_path / ("deep/" * (number % 3))
        where.mkdir(parents=True, exist_ok=True)
        pixels = np.full((*size, 3), 10 * number, np.uint8)
        Image.fromarray(pixels).save(where / f"{number}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path


def read(path, part=None, batch_size=3, threads=2):
    images = inspect_side(path, "SAMPLES").images
    part = part or range(len(images))
    return list(image_batches(images, part, batch_size, threads=threads, pin_memory=False))


def test_a_folder_of_any_depth_comes_in_batches_with_sizes_together(folder):
    files = inspect_side(folder, "SAMPLES").images.files
    batches = read(folder)
    assert sorted(number for batch in batches for number in batch.numbers) == list(range(7))
    assert [len(batch.numbers) for batch in batches] == [3, 3, 1]
    for batch in batches:
        assert len({group.shape[2:] for group in batch.groups}) == len(batch.groups)
        values = torch.cat([group[:, 0, 0, 0] for group in batch.groups])
        assert [f"{value // 10}.png" for value in values.tolist()] == [
            files[number].rpartition("/")[2] for number in batch.numbers
        ]


def test_links_are_followed_but_not_in_circles(folder, tmp_path_factory):
    there = images_below(folder)[0]
    (folder / "again").symlink_to(folder, target_is_directory=True)
    assert images_below(folder)[0] == there
    beside = tmp_path_factory.mktemp("beside")
    (beside / "linked").symlink_to(folder, target_is_directory=True)
    assert len(images_below(beside)[0]) == len(there)


def test_no_threads_beside_is_one(folder):
    assert sum(len(batch.numbers) for batch in read(folder, threads=0)) == 7


def test_a_batch_closes_before_its_pixels_outgrow_memory(folder, monkeypatch):
    monkeypatch.setattr(reading, "LARGEST_BATCH", 300)
    batches = read(folder, batch_size=100)
    assert len(batches) > 3
    assert sum(len(batch.numbers) for batch in batches) == 7


def test_processes_read_what_threads_do(folder):
    (folder / "3.png").write_bytes(b"damaged")
    images = inspect_side(folder, "SAMPLES").images
    numbers = [list(range(first, min(first + 3, 7))) for first in range(0, len(images), 3)]
    files = FilesOfAnySize(images.files, "as-pil")
    found = list(read_ahead(files, numbers, 2, pin_memory=False))
    assert sum(len(batch.unreadable) for batch in found) == 1
    for batch, expected in zip(found, (files.__getitems__(part) for part in numbers), strict=True):
        assert (batch.numbers, batch.unreadable) == (expected.numbers, expected.unreadable)
        assert all(map(torch.equal, batch.groups, expected.groups))
    threaded = {n: g for each in read(folder) for n, g in pixels_by_number(each)}
    assert {n: g for each in found for n, g in pixels_by_number(each)} == threaded


@pytest.mark.parametrize(
    ("side", "workers", "prefetch"), [(16, 16, 4), (512, 16, 2), (1024, 10, 1), (4000, None, None)]
)
def test_pixels_ahead_of_a_gpu_are_bounded_however_large_the_images(
    folder, monkeypatch, side, workers, prefetch
):
    """Of 64 images a batch; what a GPU would get is not decoded."""
    sizes, called = {3: 3 * side * side}, []
    monkeypatch.setattr(features, "num_bytes", lambda images, part: sizes.get(part[0], 48))
    for name in ("read_ahead", "image_batches"):
        monkeypatch.setattr(features, name, lambda *given, **more: called.append((given, more)))
    images = inspect_side(folder, "SAMPLES").images
    machine = SimpleNamespace(workers=16)
    run = SimpleNamespace(batch_size=64, images="as-pil", machine=machine)
    ctx = SimpleNamespace(device=torch.device("cuda"))
    features.opened_images(run, ctx, images, range(7))
    [(given, more)] = called
    assert (given[2] if workers else None, more.get("prefetch")) == (workers, prefetch)
    ahead = (workers or 0) * (prefetch or 0) * 64 * sizes[3]
    assert ahead <= features.IN_FLIGHT


def pixels_by_number(batch):
    images = [image.tolist() for group in batch.groups for image in group]
    return zip(batch.numbers, images, strict=True)


def test_parts_make_the_whole(folder):
    numbers = [batch.numbers for part in (range(3), range(3, 7)) for batch in read(folder, part)]
    assert sorted(itertools.chain(*numbers)) == list(range(7))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "I;16", "CMYK"])
def test_every_mode_becomes_rgb_as_pillow_converts_it(tmp_path, mode):
    name = "a.tif" if mode == "CMYK" else "a.png"
    source = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).convert(
        "L" if mode == "I;16" else mode
    )
    if mode == "I;16":
        source = Image.fromarray(np.asarray(source).astype(np.uint16) * 200)
    source.save(tmp_path / name)
    found, _ = reading.decode(str(tmp_path / name), "as-pil")
    assert found.shape == (8, 8, 3)
    with Image.open(tmp_path / name) as image:
        np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))


def test_what_cannot_be_decoded_is_carried_along(folder):
    (folder / "a.png").write_text("hello")
    batches = read(folder)
    assert [bad.path for batch in batches for bad in batch.unreadable] == [str(folder / "a.png")]
    assert sorted(number for batch in batches for number in batch.numbers) == [0, 1, 2, 4, 5, 6, 7]


def test_who_stops_early_leaves_no_thread_behind(folder):
    import threading

    images = inspect_side(folder, "SAMPLES").images
    batches = image_batches(images, range(7), 2, threads=2, pin_memory=False)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if "spiralrope" in thread.name]


def test_a_batch_of_an_archive_ends_early_where_its_images_are_large(tmp_path, monkeypatch):
    pixels = np.arange(7 * 4 * 4 * 3).astype(np.uint8).reshape(7, 4, 4, 3)
    np.savez(tmp_path / "a.npz", pixels)
    monkeypatch.setattr(reading, "LARGEST_BATCH", 100)
    batches = read(tmp_path / "a.npz", range(1, 6), batch_size=4)
    assert [batch.numbers for batch in batches] == [[1, 2], [3, 4], [5]]
    found = torch.cat([group for batch in batches for group in batch.groups])
    assert torch.equal(found.permute(0, 2, 3, 1), torch.from_numpy(pixels[1:6]))


def test_the_size_of_a_set_is_read_from_headers(folder, tmp_path):
    np.savez(tmp_path / "a.npz", np.zeros((7, 4, 5, 3), np.uint8))
    in_archive, in_folder = (
        inspect_side(path, "SAMPLES").images for path in (tmp_path / "a.npz", folder)
    )
    assert num_bytes(in_archive, range(2, 5)) == 3 * 60
    sizes = [math.prod(Image.open(file).size) for file in in_folder.files[:4]]
    assert num_bytes(in_folder, range(4)) == 3 * sum(sizes)
