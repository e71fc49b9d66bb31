"""Shards behind URLs and commands: read once, fetched when they are needed, resumed exactly."""

from __future__ import annotations

import functools
import gzip
import io
import multiprocessing
import shutil
import sys
import tarfile
import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from workers import stop_at

from spiralrope_cli.core.config.datasets import slug_of
from spiralrope_cli.core.config.option import build
from spiralrope_cli.core.config.samples import EncodeRun
from spiralrope_cli.core.data import fetched, streams
from spiralrope_cli.core.data.batches import classifier_data, dit_data
from spiralrope_cli.core.data.fetched import opened
from spiralrope_cli.core.data.image_sets import digest_of, inspect_side
from spiralrope_cli.core.data.images import as_trained, open_image
from spiralrope_cli.core.data.order import epoch_order, shards_ahead
from spiralrope_cli.core.data.splits import (
    find_data_set,
    find_train_set,
    find_val_set,
    train_split,
    val_split,
)
from spiralrope_cli.core.data.streams import GROUP, shard_urls
from spiralrope_cli.core.errors import DataError, DiskError
from spiralrope_cli.core.jobs import encode, train
from spiralrope_cli.core.jobs.export import without_paths
from spiralrope_cli.core.resolve import resolve
from spiralrope_cli.core.runtime.distributed import StopRequest
from spiralrope_cli.core.runtime.launch import plan_only

TRAIN, VAL, EACH = 20, 2, 3
"""Shards of each split, and images of a shard."""


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of small shards with two classes."""
    root, rng, place = tmp_path_factory.mktemp("shards"), np.random.default_rng(0), 0
    for split, count in (("train", TRAIN), ("val", VAL)):
        for number in range(count):
            with tarfile.open(root / f"set-{split}-{number:02d}.tar", "w") as tar:
                for _ in range(EACH):
                    image = Image.fromarray(rng.integers(0, 256, (18, 20, 3), np.uint8))
                    image.save(content := io.BytesIO(), "PNG")
                    add(tar, f"{place:04d}.png", content.getvalue())
                    add(tar, f"{place:04d}.cls", str(place % 2).encode())
                    place += 1
    (root / "classnames.txt").write_text("cat\ndog")
    return root


class Server(ThreadingHTTPServer):
    """Serves a folder on 127.0.0.1, and counts the requests for each file."""

    daemon_threads = True

    def __init__(self, root):
        self.asked, self.down = Counter(), False
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(root)))
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.spec = (
            f"wds/{self.url}/set-{{train-{{00..{TRAIN - 1}}},val-{{00..{VAL - 1:02d}}}}}.tar"
        )
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self):
        self.server.asked[Path(self.path).name] += 1
        if self.server.down:
            self.send_error(500)
        else:
            super().do_GET()

    def log_message(self, *given):
        pass


@pytest.fixture
def root(shards, tmp_path, monkeypatch):
    """A copy of the shards, and an empty cache folder."""
    monkeypatch.setenv("SPIRALROPE_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(shards, tmp_path / "shards"))


@pytest.fixture
def server(root):
    with Server(root) as made:
        yield made
        made.shutdown()


def drop(tmp_path, word=""):
    """Removes the shards that were fetched, as another machine lacks them."""
    for path in tmp_path.glob(f"cache/streams/*/*{word}-[0-9]*.tar"):
        path.unlink()


def contents(images):
    return [(opened(address).getvalue(), label) for address, label in images]


# --- Names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("a{08..10}.tar", ["a08.tar", "a09.tar", "a10.tar"]),
        ("a{3..3}", ["a3"]),
        ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]),
        ("s-{t-{0..1},v-{0,2}}.tar", ["s-t-0.tar", "s-t-1.tar", "s-v-0.tar", "s-v-2.tar"]),
        ("pipe:awk '{print}', {0..1}", ["pipe:awk '{print}', 0", "pipe:awk '{print}', 1"]),
    ],
)
def test_braces_are_expanded_as_in_a_shell(text, expected):
    assert shard_urls(f"wds/{text}") == expected


@pytest.mark.parametrize("text", ["a{0..1", "a{{0..1}.tar", "0..1}"])
def test_unbalanced_braces_are_refused(text):
    with pytest.raises(DataError, match="has unbalanced braces"):
        shard_urls(f"wds/{text}")


def test_a_stream_without_its_package_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "braceexpand", None)
    with pytest.raises(DataError, match=r"needs braceexpand.*\n.*pip install 'spiralrope\[data\]'"):
        shard_urls("wds/https://host/a-{0..1}.tar")


@pytest.mark.parametrize(
    ("spec", "slug"),
    [
        ("https://h/imagenet-{train-{0..1},val-{0..0}}.tar", "imagenet"),
        ("https://h/{train,val}/set-{0..1}.tar", "set"),
        ("https://h/a-train-{0..1}.tar::https://h/a-val-0.tar", "a"),
        ("pipe:aws s3 cp s3://b/pets-{train,val}-{0..1}.tar -", "pets"),
        ("pipe:cat {train,val}{0..1}.tar.gz", "stream"),
    ],
)
def test_the_word_of_a_split_is_found_in_the_url(spec, slug):
    train_urls, val_urls = (shard_urls(f"wds/{spec}", name) for name in ("train", "val"))
    assert train_urls
    assert val_urls
    assert {*train_urls} | {*val_urls} == {*shard_urls(f"wds/{spec}")}
    assert slug_of(f"wds/{spec}") == slug


# --- Reading once


def test_a_stream_holds_what_its_shards_hold(server, root, tmp_path):
    expected, data_set = find_data_set(f"wds/{root}"), find_data_set(server.spec)
    names = [path.name for path in root.iterdir()]
    assert server.asked == {name: 2 if name == "classnames.txt" else 1 for name in names}
    assert data_set.data == server.spec
    for name in ("class_names", "num_train", "num_val"):
        assert getattr(data_set, name) == getattr(expected, name)
    assert (
        data_set.notes[0] == "train: 60 images in 20 file(s), classes by its .cls and .json files"
    )
    assert "shuffled within groups of at most 16 of its 20 shards" in data_set.notes[1]
    assert "a resumed run fetches again" in data_set.notes[1]
    assert data_set.notes[2].startswith("val: 6 images in 2 file(s)")
    assert find_val_set(server.spec).num_val == 6
    split = train_split(server.spec)
    assert contents(split.images) == contents(train_split(str(root)).images)
    assert sum(server.asked.values()) == len(names) + 1, "it is read once"
    drop(tmp_path)
    assert contents(split.images[:EACH]) == contents(train_split(str(root)).images[:EACH])
    assert server.asked["set-train-00.tar"] == 2


def test_commands_files_and_gzip_give_the_same_images(root, tmp_path):
    for path in root.glob("*-val-*.tar"):
        (root / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    expected = contents(val_split(root).images)
    for spec in (
        f"file://{root}/set-val-{{00..01}}.tar",
        f"file://{root}/set-val-{{00..01}}.tar.gz",
        f"pipe:cat {root}/set-val-{{00..01}}.tar",
        f"pipe:cat {root}/set-val-{{00..01}}.tar | gzip -c",
    ):
        images = val_split(f"wds/{spec}").images
        assert contents(images) == expected
        drop(tmp_path)
        assert contents(images) == expected
        assert find_val_set(f"wds/{spec}").class_names == (
            ("cat", "dog") if "file:" in spec else ("0", "1")
        )


def test_a_dry_run_reads_nothing(server):
    plan_only.set(True)
    try:
        with pytest.raises(DataError, match="has to be read once first") as refused:
            find_data_set(server.spec)
    finally:
        plan_only.set(False)
    assert "20 of its 20 shards" in refused.value.message
    assert refused.value.hint == "a run does so at first, but for --dry-run and doctor"
    assert not server.asked
    assert without_paths({"data": f"{server.spec} # $TOKEN"}) == {"data": "set"}


def test_a_stream_without_a_split_is_refused_before_it_is_read(server):
    train_alone = f"wds/{server.url}/set-train-{{00..19}}.tar"
    for find, spec, word in (
        (find_data_set, train_alone, "val"),
        (find_val_set, train_alone, "val"),
        (find_data_set, f"wds/{server.url}/set-{{00..19}}.tar", "train"),
    ):
        with pytest.raises(DataError, match=f"no shard with {word} in its name") as refused:
            find(spec)
        assert "{train-{0000..0127},val-{00..07}}" in refused.value.hint
    assert not server.asked
    assert find_train_set(train_alone).num_train == 60


# --- Training


TINY = {
    **{"arch": "deit-32x1x2", "patch_size": 8, "image_size": (16, 16), "batch_size": 6},
    **{"micro_batch_size": 3, "max_steps": 10, "warmup_epochs": 0, "precision": "fp32"},
    **{"nproc": 1, "workers": 0, "device": "cpu"},
}


def train_on(data, out, command="pretrain", **options):
    options |= {"mixup": 0.0, "cutmix": 0.0} if command == "pretrain" else {}
    run = resolve(command, {**TINY, "data": data, "out": str(out), **options}).run
    train.work(run)
    return load_file(out / f"checkpoints/{run.total_steps:07d}/model.safetensors")


def same(found, expected):
    return all(torch.equal(found[name], expected[name]) for name in expected)


def test_groups_of_shards_follow_each_other_in_an_order_of_seed_and_epoch():
    counts = (3, 5, 4, 8) * 10
    num, ends = sum(counts), torch.tensor(counts).cumsum(0)
    order = functools.partial(epoch_order, num, shard_counts=counts)
    left, groups = Counter(dict(enumerate(counts))), [set()]
    for shard in torch.bucketize(order(1, 0, 4), ends, right=True).tolist():
        groups[-1].add(shard)
        left[shard] -= 1
        if not any(left[each] for each in groups[-1]):
            groups.append(set())
    assert [len(group) for group in groups] == [14, 13, 13, 0]
    assert not +left
    number = {shard: place for place, group in enumerate(groups) for shard in group}
    repeated = torch.bucketize(order(3, 0, 4), ends, right=True).tolist()
    assert [number[shard] for shard in repeated] == sorted(number[shard] for shard in repeated)
    for repeats in (1, 3):
        plain = epoch_order(num, repeats, 0, 4)
        found = order(repeats, 0, 4).tolist()
        assert sorted(found) == sorted(plain.tolist())
        assert found not in (order(repeats, 0, 5).tolist(), order(repeats, 1, 4).tolist())
        assert torch.equal(epoch_order(num, repeats, 0, 4, (num,) * GROUP), plain), "one group"


def test_shards_are_asked_for_a_group_before_they_are_read():
    counts, size = (8,) * 64, 16
    order = functools.partial(epoch_order, 512, 1, 0, shard_counts=counts)
    asked = [*shards_ahead(order, counts, size, 32, range(3, 60))]
    ends = torch.tensor(counts).cumsum(0)
    known = set()
    for step, new in zip(range(3, 60), asked, strict=True):
        known |= {*new}
        epoch, within = divmod(step, 32)
        images = order(epoch)[within * size : within * size + size]
        assert {*torch.bucketize(images, ends, right=True).tolist()} <= known or step < 11
    assert max(map(len, asked)) <= 2 * GROUP
    assert sum(map(len, asked)) < 3 * 64, "hardly any of them twice"
    assert [*shards_ahead(order, (), size, 32, range(3))] == [[], [], []]


def test_a_resumed_run_is_exact_and_reads_no_earlier_shard(server, tmp_path, monkeypatch):
    expected = train_on(server.spec, tmp_path / "whole")
    at_start = dict(server.asked)
    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "agreed", stop_at(7))
        with pytest.raises(SystemExit):
            train_on(server.spec, tmp_path / "parts")
    assert server.asked == at_start, "all of them were still on the disk"
    drop(tmp_path, "train")
    assert same(train_on(server.spec, tmp_path / "parts"), expected)
    counts = (EACH,) * TRAIN
    order = epoch_order(TRAIN * EACH, 1, 0, 0, counts) // EACH
    second = {f"set-train-{shard:02d}.tar" for shard in order[30:].tolist()}
    again = {name for name, count in server.asked.items() if count > at_start[name]}
    assert len(second) == TRAIN // 2
    assert again <= second


def test_one_group_trains_as_the_same_files_in_a_folder(server, root, tmp_path):
    for path in root.glob("set-train-1*"):
        path.unlink()
    spec = server.spec.replace("00..19", "00..09")
    expected = train_on(f"wds/{root}", tmp_path / "files", max_steps=6)
    drop(tmp_path)
    assert same(train_on(spec, tmp_path / "stream", max_steps=6, workers=2), expected)
    options = {**TINY, "arch": "dit-32x1x2-4", "vae": "none", "out": str(tmp_path)}
    runs = [resolve("dit-train", {**options, "data": data}).run for data in (spec, f"wds/{root}")]
    for found, known in zip(*map(steps_of_dit, runs), strict=True):
        assert all(torch.equal(a.images, b.images) for a, b in zip(found, known, strict=True))


def steps_of_dit(run):
    return [*dit_data(run, torch.device("cpu"), 0, 1).train_steps(0, 4)]


def test_processes_read_the_batches_of_one_and_fetch_a_shard_once(server, tmp_path):
    options = {**TINY, "mixup": 0.0, "cutmix": 0.0, "data": server.spec, "out": str(tmp_path)}
    run, device = resolve("pretrain", options).run, torch.device("cpu")
    alone, *both = (
        [*classifier_data(run, device, rank, world, {}).train_steps(2, 7)]
        for rank, world in ((0, 1), (0, 2), (1, 2))
    )
    for whole, *parts in zip(alone, *both, strict=True):
        images = torch.cat([batch.images for batch in whole])
        assert torch.equal(images, torch.cat([each.images for part in parts for each in part]))
    before, images = Counter(server.asked), train_split(server.spec).images
    drop(tmp_path)
    addresses = [address for address, _ in images[: 4 * EACH]]
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(opened, addresses * 4, chunksize=1)
    assert [each.getvalue() for each in found[: len(addresses)]] == [
        opened(address).getvalue() for address in addresses
    ]
    assert Counter(server.asked) - before == {f"set-train-{n:02d}.tar": 1 for n in range(4)}


# --- What goes wrong


def test_the_oldest_shards_are_removed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetched, "MOST_SHARDS", 4)
    monkeypatch.setattr(streams, "CONNECTIONS", 1)  # else a shard may be removed while it is read
    monkeypatch.setattr(fetched, "MOST_BYTES", 0)
    monkeypatch.setattr(streams, "CONNECTIONS", 1)  # 4 that are newer may come before one is read
    split = train_split(server.spec)
    there = sorted(path.name[:5] for path in tmp_path.glob("cache/streams/*/*.tar"))
    assert len(there) == 4
    for address, _ in split.images[::EACH]:
        opened(address)
    there = sorted(path.name[:5] for path in tmp_path.glob("cache/streams/*/*.tar"))
    assert there == ["00016", "00017", "00018", "00019"]
    assert not [*tmp_path.glob("cache/streams/*/.*.new")]


def test_no_image_is_to_blame_when_the_folder_of_shards_is_removed(server, tmp_path):
    address, _ = val_split(server.spec).images[0]
    shutil.rmtree(tmp_path / "cache" / "streams")
    unreadable = open_image(address, as_trained)
    assert unreadable.not_fetched.message.endswith("00000-set-val-00.tar is gone")


def test_a_shard_that_changed_or_a_server_that_is_down_ends_a_run(server, root, tmp_path):
    options = {**TINY, "arch": "dit-32x1x2-4", "vae": "none", "data": server.spec, "skip_bad": True}
    del options["patch_size"]
    run = resolve("dit-train", {**options, "out": str(tmp_path / "run")}).run
    drop(tmp_path)
    server.down = True
    with pytest.raises(DataError, match=r"tar cannot be fetched: its server answered 500"):
        train.work(run)
    for path in root.glob("set-train-*.tar"):
        shutil.copyfile(root / "set-val-00.tar", path)
    server.down = False
    with pytest.raises(DataError, match="is another file than when it was first read") as refused:
        train.work(run)
    assert refused.value.hint.startswith(f"delete {tmp_path}/cache/streams/")
    assert not [*tmp_path.glob("cache/streams/*/*train*.tar")]


@pytest.mark.parametrize("cut", [700, 1024 + 512, -1024, 0])
def test_a_cut_shard_is_refused_and_the_others_are_kept(server, root, tmp_path, cut):
    path = root / "set-val-01.tar"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"set-val-01\.tar .* its end is missing"):
        find_val_set(server.spec)
    assert [each.name for each in tmp_path.glob("cache/streams/*/*.json")] == [
        "00000-set-val-00.json"
    ]


def test_a_command_that_fails_is_told_with_its_exit_code_and_last_words(root):
    words = "echo a >&2; echo gone >&2; exit 3"
    for command, code in ((f"sh -c '{words}'", 3), (f"(cat {root}/*-00.tar; {words}) | cat", 3)):
        with pytest.raises(DataError, match=f"ended with exit code {code}") as refused:
            find_val_set(f"wds/pipe:{command} # val-{{0..1}}.tar")
        assert refused.value.hint == "gone"


def test_a_shard_that_is_not_on_the_server_is_told(server):
    with pytest.raises(DataError, match=r"val-02\.tar cannot be fetched: .* answered 404") as told:
        find_val_set(f"wds/{server.url}/set-val-{{00..02}}.tar")
    assert told.value.hint == "check the name and the numbers in it"


def test_a_server_that_is_gone_is_tried_again_and_told(server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match=r"val-00\.tar cannot be fetched: .*refused"):
        find_val_set(server.spec)


def test_a_full_disk_is_told_before_a_run_and_in_it(server, tmp_path, monkeypatch):
    find_val_set(server.spec)
    drop(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=9))
    with pytest.raises(DiskError, match=r"are needed for shards"):
        find_val_set(server.spec)


def test_fid_and_dit_encode_take_a_stream(server, root, tmp_path, tiny_vae):
    side = inspect_side(server.spec, "REFERENCE")
    assert (str(side.path), side.num) == (server.spec, TRAIN * EACH)
    before, first = Counter(server.asked), digest_of(side)
    drop(tmp_path)
    assert digest_of(side) == first
    assert server.asked == before, "it is known by the digests of the shards"
    gone = "wds/https://127.0.0.1:9/{a,b}.tar"
    plan_only.set(True)
    try:
        with pytest.raises(DataError) as refused:
            inspect_side(gone, "REFERENCE")
    finally:
        plan_only.set(False)
    assert refused.value.message.startswith(f"{gone} has to be read")
    options = {"vae": str(tiny_vae), "image_size": (16, 16), "device": "cpu", "precision": "fp32"}
    plans = [
        encode.settle(build(EncodeRun, {**options, "data": data}))
        for data in (server.spec, f"wds/{root}")
    ]
    assert plans[0].cache.data == server.spec
    assert plans[0].cache.files_sha256 == plans[1].cache.files_sha256
