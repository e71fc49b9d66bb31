"""Class names are stored with a run, and compared wherever its class numbers are used again."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spiralrope_cli.core.config.datasets import class_difference, nameless_note, numbering_note
from spiralrope_cli.core.config.evals import EvalOptions
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.data.image_sets import images_in
from spiralrope_cli.core.errors import CheckpointError, ConfigError
from spiralrope_cli.core.hub.source import find_source
from spiralrope_cli.core.jobs import evaluate, plot, sample, train
from spiralrope_cli.core.jobs.export import export
from spiralrope_cli.core.load import starting_point
from spiralrope_cli.core.resolve import as_begun, resolve
from spiralrope_cli.core.runtime.run_folder import first_step
from spiralrope_cli.core.weights import read_weights

SHORT = {
    **{"max_steps": 1, "batch_size": 8, "micro_batch_size": 8, "warmup_epochs": 0, "workers": 0},
    **{"precision": "fp32", "nproc": 1, "image_size": (16, 16)},
}
DEIT = {**SHORT, "arch": "deit-32x1x2", "patch_size": 8, "mixup": 0.0, "cutmix": 0.0}
DIT = {**SHORT, "arch": "dit-32x1x2-4", "vae": "none"}


def images_of(root, names):
    """A data folder with these classes."""
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for index in range(4):
                pixels = noise.integers(0, 256, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The data `ab` and `xb`, alike but for one name, and runs of a step on the former."""
    root = tmp_path_factory.mktemp("classes")
    images_of(root / "ab", ("a", "b"))
    images_of(root / "xb", ("x", "b"))
    for command, options in (("pretrain", DEIT), ("dit-train", DIT)):
        options = {**options, "data": str(root / "ab"), "out": str(root / command)}
        train.work(resolve(command, options).run)
    return root


def old(run, to):
    """A copy of a run as earlier versions wrote it, without names, `ema` and `ema_warmup`."""
    shutil.copytree(run, to)
    config = yaml.safe_load((to / "config.yaml").read_text())
    del config["class_names"], config["ema"], config["optim"]["ema_warmup"]
    (to / "config.yaml").write_text(yaml.safe_dump(config))
    for file in to.glob("checkpoints/*/*.safetensors"):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        stored = json.loads(metadata["config"])
        del stored["class_names"]
        del metadata["crc32"]  # nor had they checksums
        save_file(load_file(file), file, {**metadata, "config": json.dumps(stored)})
    return to


def settled(source, data=None, **more):
    options = EvalOptions(sources=(str(source),), data=data and str(data), **more)
    return evaluate.settle(options, MachineConfig(nproc=1, device="cpu"), set())


def started(command, options, source, data):
    """The run of a training from a source, what is said of it, and its network's weights."""
    given = {**options, "data": str(data), "out": "unused"}
    start, _ = starting_point(find_source(str(source)), {}, dit=command == "dit-train")
    run = resolve(command, given, start=start).run
    return run, train.start_line(run)


def test_what_differs_is_said_by_class_number():
    assert (
        class_difference("ab", "ab")
        == class_difference((), "ab")
        == class_difference("ab", ())
        == ""
    )
    assert class_difference("abc", "ab") == "3 classes, now 2"
    assert class_difference("abc", "axc") == "class 1 was 'b', now 'x'"
    assert class_difference("abc", "xyz") == "class 0 was 'a', now 'x' (and 2 more)"


def test_folders_that_are_numbers_get_a_note_where_text_sorts_otherwise():
    assert numbering_note([f"{n:02}" for n in range(12)]) == numbering_note("01") == []
    assert numbering_note(sorted(map(str, range(12)))) == [
        "class folders are numbers, and are sorted as text: class 2 is '10'"
    ]
    assert numbering_note(["1", "2"]) != []
    assert numbering_note(["1", "2", "other"]) == []


def test_weights_without_names_say_so_but_for_imagenets_folders():
    assert nameless_note("x", ("a",), ("b",)) == []
    assert nameless_note("x", (), ("b",)) == [
        "x has no class names to compare with those of the data"
    ]
    assert nameless_note("x", (), [f"n{n:08}" for n in range(1000)]) == []


@pytest.mark.parametrize("command", ["pretrain", "dit-train"])
def test_names_are_stored_with_config_and_weights(here, command):
    assert yaml.safe_load((here / command / "config.yaml").read_text())["class_names"] == ["a", "b"]
    assert read_weights(find_source(str(here / command))).class_names == ("a", "b")


@pytest.mark.parametrize(("command", "options"), [("pretrain", DEIT), ("dit-train", DIT)])
def test_a_run_is_not_resumed_on_other_classes(here, command, options):
    given = {**options, "out": str(here / command), "data": str(here / "ab")}
    assert first_step(resolve(command, given).run) == 1
    (here / "ab/train/a").rename(here / "ab/train/c")
    (here / "ab/val/a").rename(here / "ab/val/c")
    try:
        with pytest.raises(CheckpointError, match="class 0 was 'a', now 'b' "):
            first_step(resolve(command, given).run)
    finally:
        (here / "ab/train/c").rename(here / "ab/train/a")
        (here / "ab/val/c").rename(here / "ab/val/a")


def test_eval_refuses_other_classes_of_the_same_number(here):
    assert settled(here / "pretrain")[1] == []
    with pytest.raises(ConfigError, match="class 0 was 'a', now 'b'") as refused:
        settled(here / "pretrain", here / "xb")
    assert "names that they had in training" in refused.value.hint
    assert "--ignore-class-names goes on" in refused.value.hint
    run, _ = settled(here / "pretrain", here / "xb", ignore_class_names=True)
    assert run.rows[0].protocol.data == str(here / "xb")


def test_runs_of_earlier_versions_work_and_say_that_names_are_missing(here, tmp_path):
    run = old(here / "pretrain", tmp_path / "old")
    note = f"{run} has no class names to compare with those of the data"
    for data in ("ab", "xb"):
        assert settled(run, here / data)[1] == [note]
    given = {**DEIT, "out": str(run), "data": str(here / "ab")}
    assert first_step(as_begun(resolve("pretrain", given)).run) == 1
    _, notes = train.settle(
        "finetune", {**DEIT, "source": str(run), "data": str(here / "xb")}, train.TrainOptions()
    )
    assert notes[-1] == note


@pytest.mark.parametrize(
    ("command", "options", "source", "what", "table"),
    [
        ("finetune", {**DEIT, "arch": "deit-32x1x2"}, "pretrain", "head", "head.weight"),
        ("dit-train", DIT, "dit-train", "label table", "y_embedder.embedding_table.weight"),
    ],
)
def test_training_from_weights_of_other_classes_has_a_new_head(
    here, runs, command, options, source, what, table
):
    found = {}
    for data in ("ab", "xb"):
        run, said = started(command, {**options, "lr": 0.0, "seed": 7}, here / source, here / data)
        assert (f"{what} re-initialised: class 0 was 'a', now 'b' (and 1 more)" in said) is (
            data == "xb"
        )
        shutil.rmtree(run.out, ignore_errors=True)
        train.work(run)
        found[data] = load_file(runs / "unused/checkpoints/0000001/model.safetensors")
    before = dict(read_weights(find_source(str(here / source)), ema=True).state)
    assert torch.equal(found["ab"][table], before[table])
    assert not torch.equal(found["xb"][table], before[table])
    others = [name for name in before if not name.startswith(table.split(".")[0] + ".")]
    assert all(torch.equal(found["xb"][name], before[name]) for name in others)


@pytest.mark.parametrize("layout", ["published", "safetensors"])
def test_exports_carry_the_names(here, tmp_path, layout):
    out = tmp_path / ("x.pth" if layout == "published" else "x")
    export({"source": str(here / "pretrain"), "layout": layout, "out": str(out), "ema": True})
    weights = read_weights(find_source(str(out)))
    assert weights.class_names == ("a", "b")
    with pytest.raises(ConfigError, match="was trained on other classes"):
        settled(out, here / "xb")


def test_samples_are_labelled_by_the_names_of_their_weights(here, runs, capsys):
    moved = shutil.copytree(here / "dit-train", runs / "drawn")
    given = {"source": str(moved), "num_samples": 2, "num_sampling_steps": "2", "classes": (1, 0)}
    run, weights = sample.settle(
        {**given, "out": str(runs / "s"), "nproc": 1, "device": "cpu", "png": True}
    )
    (here / "ab").rename(here / "gone")
    try:
        sample.carry_out(run, weights, dry_run=True)
        sample.work(run)
        images = images_in(runs / "s/samples.npz", "SAMPLES")
        assert plot.labels_of(images, range(2)) == ["b", "a"]
    finally:
        (here / "gone").rename(here / "ab")
    assert "classes b,a" in capsys.readouterr().err
    assert "class_names" in Image.open(runs / "s/samples.png").text["spiralrope"]
    assert "class_names" not in Image.open(runs / "s/png/000000.png").text["spiralrope"]
