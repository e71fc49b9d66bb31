from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spiralrope_cli.core.data import latents
from spiralrope_cli.core.data.augment import mirror_draws
from spiralrope_cli.core.data.batches import DrawnLatents, from_cache
from spiralrope_cli.core.data.latents import LatentCache
from spiralrope_cli.core.data.loader import BatchIndices
from spiralrope_cli.core.data.shards import CachePlan, read_cache, shard_size_for
from spiralrope_cli.core.errors import ConfigError, DataError
from spiralrope_cli.core.runtime.seeds import NoisePerImage

CPU = torch.device("cpu")
PLAN = CachePlan(
    data="photos",
    class_names=("a", "b", "c"),
    num_files=23,
    files_sha256="f" * 64,
    image_size=(16, 24),
    vae="ema",
    vae_sha256="e" * 64,
    precision="float32",
    shard_size=8,
)


def moments(plan, number):
    """[2, n, 2, L, h, w] of a shard: plain and mirrored."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(2, len(plan.files_of(number)), 2, *plan.latent_shape, generator=generator)


def write(folder, plan, number, values=None):
    plain, mirrored = moments(plan, number) if values is None else values
    labels = torch.tensor([n % 3 for n in plan.files_of(number)])
    return latents.write_shard(folder, plan, number, plain, mirrored, labels, {})


def make(folder, plan=PLAN):
    folder.mkdir(exist_ok=True)
    for number in range(plan.num_shards):
        write(folder, plan, number)
    return folder


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "latents")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)


def test_any_image_is_found_in_any_order(folder):
    cache = LatentCache(folder)
    every = torch.cat([moments(PLAN, number) for number in range(3)], dim=1)
    numbers = torch.tensor([22, 0, 7, 8, 15, 16, 0, 3])
    mirrored = torch.tensor([True, False, True, True, False, False, True, False])
    mean, std = cache.mean_std(numbers, mirrored)
    assert mean.shape == std.shape == (8, 4, 2, 3)
    for place, (number, side) in enumerate(zip(numbers, mirrored.int(), strict=True)):
        assert torch.equal(mean[place], every[side, number, 0])
        assert torch.equal(std[place], every[side, number, 1])
    assert len(cache) == 23
    assert cache.labels.tolist() == [n % 3 for n in range(23)]
    assert cache.metadata.plan.class_names == ("a", "b", "c")
    assert cache.scale == 0.18215


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_read_ahead_come_in_order_with_their_noise(folder, workers):
    cache, first = LatentCache(folder), 23 * 8 + 4
    drawn = DrawnLatents(cache, seed=3, hflip=0.5)
    places = [
        BatchIndices(torch.randint(23, (4,)).tolist(), [4, 5, 6, 7], epoch=n, first=first * n)
        for n in range(5)
    ]
    batches = list(from_cache(drawn, CPU, workers, places))
    assert [batch.at for batch in batches] == places
    for n, batch in enumerate(batches):
        numbers = torch.tensor(batch.at.indices)
        mean, std = cache.mean_std(numbers, mirror_draws(23, 3, n)[4:8] < 0.5)
        assert torch.equal(batch.images, mean)
        assert torch.equal(batch.std, std)
        assert torch.equal(batch.labels, cache.labels[numbers])
        samples = range(first * n, first * n + 4)
        assert list(batch.noise) == ["noise", "posterior"]
        for purpose, noise in batch.noise.items():
            alone = NoisePerImage(3, samples, (4, 2, 3), CPU, purpose).draw()
            assert torch.equal(noise, alone)


def test_a_spawned_worker_opens_the_cache_anew(folder):
    cache = LatentCache(folder)
    sent = pickle.dumps(cache)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent).labels, cache.labels)


def test_shards_of_fewer_images_than_files_are_counted_right(tmp_path):
    write(tmp_path, PLAN, 0)
    two = moments(PLAN, 1)[:, :2]
    labels = torch.tensor([1, 2])
    latents.write_shard(tmp_path, PLAN, 1, *two, labels, {"a.png": "empty"})
    nothing = moments(PLAN, 2)[:, :0]
    latents.write_shard(tmp_path, PLAN, 2, *nothing, labels[:0], {})
    assert read_cache(tmp_path).count == 10
    mean, _ = LatentCache(tmp_path).mean_std(torch.tensor([9]), torch.tensor([True]))
    assert torch.equal(mean[0], two[1, 1, 0])
    assert read_cache(tmp_path).shards[1].unreadable == {"a.png": "empty"}
    LatentCache(tmp_path).verify()


def test_a_cache_of_no_readable_image_is_refused(tmp_path):
    for number in range(3):
        nothing, labels = moments(PLAN, number)[:, :0], torch.empty(0, dtype=torch.int64)
        latents.write_shard(tmp_path, PLAN, number, *nothing, labels, {"a.png": "empty"})
    with pytest.raises(DataError, match="none of its 23 images could be read"):
        LatentCache(tmp_path)


def test_reading_leaves_no_memory_behind(tmp_path):
    plan = dataclasses.replace(PLAN, image_size=(512, 512), num_files=96, shard_size=32)
    cache = LatentCache(make(tmp_path, plan))

    def own_memory():
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    read = torch.zeros(())
    files_before, before = len(os.listdir("/proc/self/fd")), own_memory()
    for first in range(0, 96, 4):
        mean, std = cache.mean_std(torch.arange(first, first + 4), torch.arange(4) % 2 == 0)
        read = read + mean.sum() + std.sum()
    grown = (own_memory() - before) << 10
    assert plan.num_files * plan.bytes_per_image > 24 << 20
    assert grown < 12 << 20
    assert len(os.listdir("/proc/self/fd")) == files_before
    assert read.isfinite()


def test_a_missing_shard_is_named_at_once(folder):
    (folder / "00001.safetensors").unlink()
    with pytest.raises(DataError, match=r"00001\.safetensors is missing\n"):
        LatentCache(folder)


def test_a_shard_that_was_cut_is_named_at_once(folder):
    path = folder / "00002.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(
        DataError, match=r"00002\.safetensors is damaged: .*(?i:incomplete)"
    ) as told:
        LatentCache(folder)
    assert "dit-encode" in told.value.hint


def test_a_changed_bit_is_found_by_the_check(folder):
    cache = LatentCache(folder)
    cache.verify()
    flip_a_bit(folder / "00000.safetensors")
    flip_a_bit(folder / "00001.safetensors")
    with pytest.raises(DataError, match=r"00000.* is damaged.*\(and 1 more\)"):
        LatentCache(folder).verify()


def test_a_damaged_header_is_told_in_one_line(folder):
    path = folder / "00001.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(DataError, match=r"00001\.safetensors is damaged") as told:
        LatentCache(folder)
    assert "\n" not in told.value.message


def test_a_changed_bit_of_the_metadata_is_found(folder):
    path = folder / "00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content.replace(rb"\"c\"]", rb"\"d\"]"))
    assert path.read_bytes() != content
    with pytest.raises(DataError, match=r"00001\.safetensors has other options than the first"):
        LatentCache(folder)
    for each in folder.glob("*.safetensors"):  # all alike, so that the checksum alone can tell
        each.write_bytes(each.read_bytes().replace(rb"\"c\"]", rb"\"d\"]"))
    with pytest.raises(DataError, match=r"00000\.safetensors is damaged: its checksum"):
        LatentCache(folder).verify()


@pytest.mark.parametrize("metadata", [None, {}, {"latents": ""}, {"latents": "{}"}])
def test_a_file_that_is_no_shard_is_damaged(folder, metadata):
    tensors = load_file(folder / "00001.safetensors")
    save_file(tensors, folder / "00001.safetensors", metadata)
    with pytest.raises(DataError, match=r"00001\.safetensors is damaged: ") as told:
        LatentCache(folder)
    assert "\n" not in told.value.message


def test_a_shard_of_another_size_or_name_than_it_says_is_damaged(folder):
    path = folder / "00001.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    fewer = {name: each[:2].contiguous() for name, each in load_file(path).items()}
    save_file(fewer, path, metadata)
    with pytest.raises(DataError, match="its tensors do not fit its metadata"):
        LatentCache(folder)
    (folder / "00002.safetensors").rename(path)
    with pytest.raises(DataError, match="its tensors do not fit its metadata"):
        LatentCache(folder)


def test_a_folder_without_latents_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="holds no latents") as told:
            LatentCache(folder)
        assert "dit-encode makes them" in told.value.hint


def test_an_unfinished_cache_is_refused(tmp_path):
    write(tmp_path, PLAN, 0)
    with pytest.raises(DataError, match=r"00001\.safetensors is missing \(and 1 more\)"):
        LatentCache(tmp_path)


def test_finished_shards_are_known_again(tmp_path):
    first, third = write(tmp_path, PLAN, 0), write(tmp_path, PLAN, 2)
    assert latents.finished_shards(tmp_path, PLAN) == ({0: first, 2: third}, {})
    write(tmp_path, PLAN, 1)
    assert set(latents.finished_shards(tmp_path, PLAN)[0]) == {0, 1, 2}
    moved = dataclasses.replace(PLAN, data="elsewhere/photos", vae="copy/of/ema")
    assert latents.finished_shards(tmp_path, moved)[0]


def test_a_shard_that_was_cut_is_not_finished(folder):
    path = folder / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    shards, wrong = latents.finished_shards(folder, PLAN)
    assert set(shards) == {0, 2}
    assert list(wrong) == ["00001.safetensors"]


def test_the_same_latents_are_the_same_bytes(folder, tmp_path):
    again = make(tmp_path / "again")
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_size": (32, 24)}, r"image_size was \(16, 24\), now \(32, 24\)"),
        ({"vae_sha256": "d" * 64}, "vae_sha256 was e{16}, now d{16}"),
        ({"precision": "bfloat16"}, "precision was float32, now bfloat16"),
        ({"files_sha256": "0" * 64}, "files_sha256 was f{16}, now 0{16}"),
        ({"class_names": ("a", "b", "d")}, "other class folders"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_plan_is_refused(tmp_path, change, words, finished):
    if finished:
        make(tmp_path)
    else:
        write(tmp_path, PLAN, 1)
    with pytest.raises(DataError, match=words):
        latents.finished_shards(tmp_path, dataclasses.replace(PLAN, **change))


def test_a_shard_that_is_not_finite_is_not_written(tmp_path):
    values = moments(PLAN, 0)
    values[1, 3, 0, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        write(tmp_path, PLAN, 0, values)
    assert not list(tmp_path.glob("*.safetensors"))


def test_what_a_kill_left_is_written_over(tmp_path):
    (tmp_path / ".00000.safetensors.new").write_bytes(b"half a shard")
    make(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("00000.safetensors", "00001.safetensors", "00002.safetensors"),
    ]


def test_other_people_may_read_the_shards(tmp_path):
    before = os.umask(0o022)
    try:
        make(tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / "00000.safetensors").stat().st_mode & 0o777 == 0o644


def test_latents_of_another_run_are_refused(folder):
    metadata = read_cache(folder)
    metadata.check_fits((16, 24), "ema")
    with pytest.raises(ConfigError, match="are of 16x24 px images, but --image-size is 24"):
        metadata.check_fits((24, 24), "ema")
    with pytest.raises(ConfigError, match="made with --vae ema, not with mse\n"):
        metadata.check_fits((16, 24), "mse")


def test_every_shard_tells_what_it_is(folder):
    counts = []
    for path in sorted(folder.iterdir()):
        with safe_open(path, "pt") as file:
            told = json.loads(file.metadata()["latents"])
        assert told["plan"]["class_names"] == ["a", "b", "c"]
        plan = told["plan"]
        assert (plan["crop"], plan["scale"]) == ("adm-centre", 0.18215)
        assert plan["vae_sha256"] == "e" * 64
        assert re.fullmatch("[0-9a-f]{8}", told["crc32"])
        counts.append(told["count"])
    assert counts == [8, 8, 7]


@pytest.mark.parametrize(
    ("num_files", "size"), [(1, 16), (1000, 16), (6400, 100), (65536, 1024), (1281167, 1024)]
)
def test_shards_are_small_for_small_sets(num_files, size):
    assert shard_size_for(num_files) == size
