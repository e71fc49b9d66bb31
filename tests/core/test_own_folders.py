"""Folders of this package are recognised where another command gets them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from spiralrope_cli.core.config.training import TrainOptions
from spiralrope_cli.core.data.image_sets import images_in, inspect_side
from spiralrope_cli.core.data.shards import read_cache
from spiralrope_cli.core.data.splits import find_data_set, find_train_set, find_val_set
from spiralrope_cli.core.errors import CheckpointError, ConfigError, DataError
from spiralrope_cli.core.hub.source import find_source
from spiralrope_cli.core.jobs.encode import data_folder
from spiralrope_cli.core.storage import check_writable, own_folder, samples_in

FOLDERS = {
    "a folder of samples": ("samples.json", "samples.npz"),
    "a training run": ("config.yaml", "checkpoints/0000001/model.safetensors", "samples/1.png"),
    "the folder of a pipeline": ("pipeline.json", "dit-train/config.yaml"),
    "the folder of a sweep": ("sweep.json", "report.html"),
    "a folder of latents": ("00000.safetensors",),
}


@pytest.fixture(params=FOLDERS)
def ours(request, tmp_path):
    """A folder of each kind, with a picture as many of them have, and what it is."""
    for name in (*FOLDERS[request.param], "curves.png"):
        path = tmp_path / "ours" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    Image.new("RGB", (8, 8)).save(tmp_path / "ours" / "curves.png")
    return tmp_path / "ours", request.param


def test_no_folder_of_ours_is_a_data_set(ours):
    folder, kind = ours
    for read in (find_data_set, find_train_set, find_val_set, data_folder):
        with pytest.raises(DataError) as refused:
            read(str(folder))
        assert refused.value.message == f"--data {folder} is {kind}, not a folder of images"
        assert refused.value.hint


def test_their_curves_and_grids_are_no_images_to_score(ours):
    folder, kind = ours
    if kind == "a folder of samples":
        np.savez(folder / "samples.npz", np.zeros((3, 8, 8, 3), np.uint8))
        side = inspect_side(folder, "SAMPLES")
        assert (side.path, side.num) == (folder / "samples.npz", 3)
        assert len(images_in(folder, "SOURCE")) == 3
        return
    for read in (inspect_side, images_in):
        with pytest.raises(DataError, match=f"SAMPLES {folder} is {kind}, not a folder of images"):
            read(folder, "SAMPLES")


def test_a_source_and_latents_that_are_something_else_are_told_what(ours):
    folder, kind = ours
    if kind != "a training run":
        with pytest.raises(CheckpointError, match=f"holds no checkpoint: it is {kind}"):
            find_source(str(folder))
    if kind != "a folder of latents":
        with pytest.raises(DataError, match=f"--latents {folder} is {kind}"):
            read_cache(folder)


def test_unfinished_samples_are_none_and_those_of_a_pipeline_are_found(tmp_path):
    drawn = tmp_path / "dit-sample"
    drawn.mkdir()
    for name in ("pipeline.json", "dit-sample/samples.json", "dit-sample/samples.npz.part"):
        (tmp_path / name).touch()
    for folder in (tmp_path, drawn):
        with pytest.raises(DataError, match="dit-sample is not finished"):
            samples_in(folder)
    (drawn / "samples.npz.part").rename(drawn / "samples.npz")
    assert samples_in(tmp_path) == samples_in(drawn) == drawn / "samples.npz"


def test_no_command_takes_the_folder_of_another_for_its_own(ours):
    folder, kind = ours
    for wanted in FOLDERS.keys() - {kind}:
        with pytest.raises(ConfigError, match=f"--out {folder} is {kind}\n"):
            TrainOptions().check_folder(str(folder), wanted)
    TrainOptions().check_folder(str(folder), kind)


def test_other_folders_are_left_alone(tmp_path):
    for name in ("config.yaml", "train/a/0.png", "val/a/0.png", "sources.json"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert find_train_set(str(tmp_path / "images")).num_train == 1
    assert own_folder(tmp_path / "images" / "train") == ("", "")


def test_what_cannot_be_written_is_told_before_and_nothing_is_created(runs, monkeypatch):
    (runs / "file").touch()
    (runs / "folder.png").mkdir()
    check_writable("not/there/x.png")
    check_writable("file")
    check_writable("folder.png", folder=True)
    for given, folder, why in (
        ("file/not/there", False, f"{runs}/file is a file"),
        ("file", True, "it is a file"),
        ("folder.png", False, "it is a folder"),
    ):
        with pytest.raises(ConfigError) as refused:
            check_writable(given, folder=folder)
        assert refused.value.message == f"--out {given} cannot be written: {why}"
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=f"x cannot be written: nothing can .* to {runs}\n"):
        check_writable("not/there/x", "--save-stats")
    assert sorted(path.name for path in runs.iterdir()) == ["file", "folder.png"]
