"""The same images in every form that is read in place give the same weights and figures."""

from __future__ import annotations

import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from spiralrope_cli.core.config.datasets import slug_of
from spiralrope_cli.core.config.evals import EvalOptions
from spiralrope_cli.core.config.option import build
from spiralrope_cli.core.config.samples import EncodeRun
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.data.fetched import opened
from spiralrope_cli.core.data.image_sets import digest_of, images_in, inspect_side
from spiralrope_cli.core.data.images import Unreadable, as_trained, decode, open_image
from spiralrope_cli.core.data.splits import find_data_set, find_train_set, train_split, val_split
from spiralrope_cli.core.data.stored import READERS, read_tar
from spiralrope_cli.core.errors import DataError
from spiralrope_cli.core.jobs import encode, evaluate, train
from spiralrope_cli.core.resolve import resolve

NAMES = ("n01440764", "n01443537")
NOISE = np.random.default_rng(0)


def jpeg(image, **more):
    content = io.BytesIO()
    image.save(content, "JPEG", **more)
    return content.getvalue()


def png(image, **more):
    content = io.BytesIO()
    image.save(content, "PNG", **more)
    return content.getvalue()


def odd_files():
    """Files that real data sets have, by name; the last cannot be read."""
    colours = Image.fromarray(NOISE.integers(0, 256, (18, 22, 3), np.uint8))
    levels = NOISE.integers(0, 65536, (18, 22)).astype(np.uint16)
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "0-plain.jpg": jpeg(colours),
        "1-grey.jpg": jpeg(colours.convert("L")),
        "2-cmyk.jpg": jpeg(colours.convert("CMYK")),
        "3-palette-alpha.png": png(colours.quantize(16), transparency=bytes([255, 0] * 8)),
        "4-16-bit.png": png(Image.fromarray(levels)),
        "5-rotated.jpg": jpeg(colours, exif=turned),
        "6-one-pixel.png": png(Image.new("RGB", (1, 1), "red")),
        "7-panorama.png": png(Image.new("RGB", (10_000, 3), "blue")),
        "8-größe-図.png": png(colours),
        f"9-{'long' * 50}.png": png(colours),
        "folder.jpg/a.png": png(colours),
        "z-truncated.jpg": jpeg(colours)[:300],
    }


FILES = odd_files()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Class folders with a link that loops."""
    root = tmp_path_factory.mktemp("folder")
    for split in ("train", "val"):
        for name in NAMES:
            for file, content in FILES.items():
                path = root / split / name / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            (root / split / name / "loop").symlink_to(root / split)
    return root


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def as_imagenet(split, root):
    """A tar file per class in one for training; images alone, and val.txt, for validation."""
    with tarfile.open(root / f"ILSVRC2012_img_{split}.tar", "w") as tar:
        for number, name in enumerate(NAMES):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as of_class:
                for file, content in reversed(FILES.items()):
                    if split == "train":
                        add(of_class, file, content)
                    else:
                        add(tar, f"{number}-{file.replace('/', '-')}", content)
            if split == "train":
                add(tar, f"{name}.tar", inner.getvalue())
    if split == "val":
        lines = [f"{n}-{file.replace('/', '-')} {n}" for n in range(2) for file in FILES]
        (root / "val.txt").write_text("\n".join(lines))


def as_folders_in_a_tar(split, root):
    with tarfile.open(root / f"{split}.tar", "w") as tar:
        for name in NAMES:
            for file, content in FILES.items():
                add(tar, f"./{split}/{name}/{file}", content)


def as_tars_of_classes(split, root):
    (root / split).mkdir()
    for name in NAMES:
        with tarfile.open(root / split / f"{name}.tar", "w") as tar:
            for file, content in FILES.items():
                add(tar, file, content)


def samples():
    """(number, class number, suffix, content) in the order of class folders."""
    each = [(n, Path(file).suffix, FILES[file]) for n in range(2) for file in FILES]
    return [(place, *rest) for place, rest in enumerate(each)]


def as_shards(split, root):
    """WebDataset, 10 samples in a shard."""
    for shard in range(0, len(samples()), 10):
        with tarfile.open(root / f"set-{split}-{shard // 10:04d}.tar", "w") as tar:
            for place, number, suffix, content in samples()[shard : shard + 10]:
                add(tar, f"{place:06d}.cls", str(number).encode())
                add(tar, f"{place:06d}{suffix}", content)
                add(tar, f"{place:06d}.json", json.dumps({"width": 22}).encode())
    (root / "classnames.txt").write_text("\n".join(NAMES))


def table():
    pa = pytest.importorskip("pyarrow")
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([("image", image), ("label", pa.int64()), ("id", pa.string())], metadata)
    rows = [
        {"image": {"bytes": content, "path": None}, "label": number, "id": str(place)}
        for place, number, _, content in samples()
    ]
    return pa.Table.from_pylist(rows, schema)


def as_parquet(split, root):
    rows = table()
    from pyarrow import parquet

    (root / "data").mkdir(exist_ok=True)
    for number in range(2):
        part = rows.slice(number * 13, 13)
        path = root / "data" / f"{split}-{number:05d}-of-00002.parquet"
        parquet.write_table(part, path, row_group_size=5)


def as_arrow(split, root):
    """As `Dataset.save_to_disk` of datasets."""
    rows = table()
    import pyarrow as pa

    (root / split).mkdir()
    for number in range(2):
        path = root / split / f"data-{number:05d}-of-00002.arrow"
        part = rows.slice(number * 13, 13)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(part, max_chunksize=4)
    (root / split / "state.json").write_text("{}")


def as_records(split, root):
    """As TensorFlow Datasets prepares them: ArrayRecord for training, TFRecord for validation."""
    tfds = pytest.importorskip("tensorflow_datasets")
    from array_record.python.array_record_module import ArrayRecordWriter

    kinds = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(names=NAMES),
        "id": tfds.features.Text(),
    }
    features = tfds.features.FeaturesDict(kinds)
    features.save_config(str(root))
    info = {"name": "tiny", "version": "1.0.0", "fileFormat": "array_record", "splits": []}
    (root / "dataset_info.json").write_text(json.dumps(info))
    for shard in range(2):
        kind, name = ("array_record", split) if split == "train" else ("tfrecord", "validation")
        records = [
            features.serialize_example(
                features.encode_example(
                    {"image": io.BytesIO(content), "label": number, "id": str(place)}
                )
            )
            for place, number, _, content in samples()[shard * 13 : shard * 13 + 13]
        ]
        path = root / f"tiny-{name}.{kind}-{shard:05d}-of-00002"
        if kind == "array_record":
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for record in records:
                writer.write(record)
            writer.close()
        else:  # size, checksum, record, checksum
            framed = (
                len(each).to_bytes(8, "little") + bytes(4) + each + bytes(4) for each in records
            )
            path.write_bytes(b"".join(framed))


FORMS = {
    "imagenet": as_imagenet,
    "folders in a tar": as_folders_in_a_tar,
    "tars of classes": as_tars_of_classes,
    "webdataset": as_shards,
    "parquet": as_parquet,
    "arrow": as_arrow,
    "tensorflow datasets": as_records,
}


@pytest.fixture(params=FORMS)
def stored(request, tmp_path, monkeypatch):
    """A folder with the same images in another form."""
    monkeypatch.setenv("SPIRALROPE_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "stored"
    root.mkdir()
    for split in ("train", "val"):
        FORMS[request.param](split, root)
    return root


def contents(split):
    files = [opened(address) for address, _ in split.images]
    read = [f.getvalue() if isinstance(f, io.BytesIO) else Path(f).read_bytes() for f in files]
    return list(zip(read, [number for _, number in split.images], strict=True))


def test_every_form_holds_the_same_images_in_the_same_order(folder, stored):
    data_set = find_data_set(str(stored))
    assert (data_set.num_train, data_set.num_val, data_set.class_names) == (24, 24, NAMES)
    for split in (train_split, val_split):
        assert contents(split(stored)) == contents(split(folder))
    assert find_train_set(str(stored)).num_train == 24
    assert len(data_set.notes) == 2
    assert data_set.notes[0].startswith("train: 24 images in ")
    assert all("classes by" in note for note in data_set.notes)


def test_the_places_are_listed_once_and_again_after_a_change(stored, tmp_path, monkeypatch):
    first = find_data_set(str(stored))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache/indexes").glob("*.json")}
    assert len(kept) == 2
    monkeypatch.setattr("tarfile.open", None)
    assert find_data_set(str(stored)) == first
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    monkeypatch.undo()
    monkeypatch.setenv("SPIRALROPE_CACHE", str(tmp_path / "cache"))
    for path in stored.rglob("*"):
        if path.is_file():
            os.utime(path, (1, 1))
    assert find_data_set(str(stored)) == first
    assert {path: path.stat().st_mtime_ns for path in kept} != kept


SHORT = {
    **{"max_steps": 2, "batch_size": 8, "micro_batch_size": 8, "warmup_epochs": 0, "workers": 0},
    **{"precision": "fp32", "nproc": 1, "image_size": (16, 16), "skip_bad": True, "device": "cpu"},
}
DEIT = {**SHORT, "arch": "deit-32x1x2", "patch_size": 8}
DIT = {**SHORT, "arch": "dit-32x1x2-4", "vae": "none"}


def weights(command, options, data, out):
    train.work(resolve(command, {**options, "data": str(data), "out": str(out)}).run)
    return load_file(out / "checkpoints/0000002/model.safetensors")


@pytest.fixture(scope="module")
def of_folder(folder, tmp_path_factory):
    """The runs on class folders."""
    out = tmp_path_factory.mktemp("runs")
    given = (("pretrain", DEIT), ("dit-train", DIT))
    found = {
        command: weights(command, options, folder, out / command) for command, options in given
    }
    return out, found


def loss_of(run, data):
    """The loss of `eval`, bit for bit."""
    options = EvalOptions(sources=(str(run),), data=str(data), out=str(run))
    machine = MachineConfig(nproc=1, device="cpu", precision="fp32", workers=0, skip_bad=True)
    evaluate.work(evaluate.settle(options, machine, set())[0])
    (row,) = json.loads((run / "eval.json").read_text())["rows"][-1:]
    return row["loss"], row["acc1"]


def test_the_same_images_give_the_same_weights_and_figures(folder, stored, of_folder, tmp_path):
    runs, expected = of_folder
    for command, options in (("pretrain", DEIT), ("dit-train", DIT)):
        found = weights(command, options, stored, tmp_path / command)
        assert all(torch.equal(found[name], expected[command][name]) for name in found)
    assert loss_of(tmp_path / "pretrain", stored) == loss_of(runs / "pretrain", folder)


def test_other_commands_take_these_forms(folder, stored, tmp_path, tiny_vae):
    """`fid` and `plot samples` read the images, `dit-encode` those with their classes."""
    there = next(each for each in (stored / "train", stored / "data", stored) if each.is_dir())
    files = images_in(there, "SAMPLES").files
    read = {decoded.tobytes() for decoded, _ in of_readable(files)}
    expected = images_in(folder / "train", "SAMPLES").files
    assert read == {decoded.tobytes() for decoded, _ in of_readable(expected)}
    if not [*stored.glob("*.tfrecord-*")]:  # two kinds of files, each of one split
        of_both = images_in(stored, "REFERENCE").files  # as of a folder, of all splits
        assert len(of_both) == len(images_in(folder, "REFERENCE").files)
    (first, again) = (digest_of(inspect_side(there, "SAMPLES")) for _ in range(2))
    assert first == again
    run = {"vae": str(tiny_vae), "image_size": (16, 16), "device": "cpu", "precision": "fp32"}
    plans = [
        encode.settle(build(EncodeRun, {**run, "data": str(root)})) for root in (folder, stored)
    ]
    assert [number for _, number in plans[0].images] == [number for _, number in plans[1].images]
    assert plans[0].cache.class_names == plans[1].cache.class_names
    names = [plan.cache.files_sha256 for plan in plans]
    assert (names[0] == names[1]) is bool([*stored.glob("*_train.tar")])


def of_readable(files):
    found = (decode(file, "as-trained") for file in files)
    return [each for each in found if not isinstance(each, Unreadable)]


def test_an_image_that_cannot_be_read_is_named(stored):
    found = [open_image(address, as_trained) for address, _ in train_split(stored).images]
    bad = [each for each in found if isinstance(each, Unreadable)]
    assert len(bad) == 2
    assert all("truncated" in each.reason.lower() for each in bad)
    assert all(each.path.startswith(f"{stored.parent}/") for each in bad)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Puts parquet into the cache of the Hub, as `hf download` does, into a folder of the set."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("SPIRALROPE_CACHE", str(tmp_path / "cache"))
    repo = tmp_path / "hub/datasets--owner--name"
    for folder in ("refs", "blobs", "snapshots/abc"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs/main").write_text("abc")

    def put(part):
        made = tmp_path / "made" / part
        made.mkdir(parents=True)
        for split in ("train", "val"):
            as_parquet(split, made)
        for path in sorted(made.rglob("*.parquet")):
            blob = path.rename(repo / "blobs" / f"{part}{path.name}".encode().hex())
            link = repo / "snapshots/abc" / part / path.name
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))

    return put


@pytest.mark.parametrize("part", ["data", "plain"])
def test_a_set_of_the_hub_is_read_from_its_cache(hub, part):
    hub(part)
    data_set = find_data_set("hfds/owner/name")
    assert (data_set.num_train, data_set.num_val, data_set.class_names) == (24, 24, NAMES)
    assert find_data_set(data_set.data) == data_set  # as stored with a run
    assert slug_of(data_set.data) == {"data": "name"}.get(part, part)
    if part == "plain":
        hub("other")
        with pytest.raises(DataError, match="has several configs: other, plain") as refused:
            find_data_set("hfds/owner/name")
        assert refused.value.hint == "name one: hfds/owner/name/CONFIG"
        assert find_data_set("hfds/owner/name/plain") == data_set


def test_splits_in_folders_of_parquet_are_one_set(hub, tmp_path):
    for split in ("train", "validation"):
        hub(split)
        for path in (tmp_path / f"hub/datasets--owner--name/snapshots/abc/{split}").iterdir():
            if not path.name.startswith(split[:3]):
                path.unlink()
    data_set = find_data_set("hfds/owner/name")
    assert (data_set.num_train, data_set.num_val) == (24, 24)


def test_a_download_that_lacks_files_is_refused(hub, tmp_path):
    hub("data")
    next(tmp_path.rglob("snapshots/abc/data/train-00001*")).unlink()
    with pytest.raises(DataError, match="holds 1 of 2 files") as refused:
        find_train_set("hfds/owner/name")
    assert refused.value.hint == "download the others"


def test_several_processes_make_one_list(tmp_path, monkeypatch):
    monkeypatch.setenv("SPIRALROPE_CACHE", str(tmp_path / "cache"))
    as_folders_in_a_tar("train", tmp_path)
    made = []
    monkeypatch.setitem(READERS, ".tar", lambda path: made.append(path) or read_tar(path))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(find_train_set, [str(tmp_path)] * 4))
    assert len(made) == 1
    assert found == found[:1] * 4


def test_what_is_not_here_is_refused(hub, tmp_path):
    for data, message, hint in (
        ("hfds/owner/gone", "is not downloaded", "hf download owner/gone --repo-type dataset"),
        ("wds/s3://b/train-{0..1}.tar", "is no URL of http", "such as 'wds/pipe:aws s3 cp URL -'"),
        (f"wds/{tmp_path}/gone", "is neither a folder nor a built-in name", "built in: digits"),
    ):
        for find in (find_data_set, find_train_set):
            with pytest.raises(DataError) as refused:
                find(data)
            assert message in refused.value.message
            assert hint in refused.value.hint
    as_shards("train", tmp_path)
    with pytest.raises(DataError, match="tar is a file"):
        find_train_set(f"wds/{tmp_path}/set-train-0000.tar")
    assert find_train_set(f"wds/{tmp_path}") == find_train_set(str(tmp_path))


def test_a_damaged_or_compressed_tar_says_what_to_do(tmp_path):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for name in NAMES:
            add(tar, f"{name}/a.png", FILES["0-plain.jpg"])
    cut = whole.getvalue()[:1300]
    for content in (b"", cut, b"\x1f\x8b not a tar"):
        (tmp_path / "train.tar").write_bytes(content)
        with pytest.raises(DataError, match="cannot be read as a tar file") as refused:
            find_train_set(str(tmp_path))
        assert "not compressed" in refused.value.hint


def test_images_without_a_class_are_refused(tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as tar:
            add(tar, f"{shard}.jpg", FILES["0-plain.jpg"])
            add(tar, f"{shard}-b.jpg", FILES["0-plain.jpg"])
            add(tar, f"{shard}.cls", b"1")
    with pytest.raises(DataError, match=r"2 of the 4 images in .* have no class") as refused:
        find_train_set(str(tmp_path))
    assert "KEY.cls" in refused.value.hint
