"""Files of ours are whole or absent, and a flipped bit anywhere is found or changes nothing."""

from __future__ import annotations

import errno
import json
import random
import shutil

import pytest
import torch
import yaml
from comparing import same_tensors
from safetensors.torch import load_file, save_file

from spiralrope_cli.core.errors import CheckpointError
from spiralrope_cli.core.hub.source import find_source
from spiralrope_cli.core.load import build_network
from spiralrope_cli.core.storage import (
    DamagedError,
    atomic_write,
    parse,
    read_safetensors,
    with_checksum,
    write_whole,
)
from spiralrope_cli.core.training import checkpoint
from spiralrope_cli.core.training.step import TrainState
from spiralrope_cli.core.weights import read_weights

FLIPS = 60


def flipped(content, rng, first=0):
    """The content with one bit changed, from a place on."""
    damaged = bytearray(content)
    damaged[rng.randrange(first, len(content))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def everything(state):
    states = [state.model.state_dict(), state.ema.module.state_dict()]
    return [*states, state.optimizer.state_dict()], state.step, state.best


def test_a_flipped_bit_in_a_checkpoint_is_refused_when_it_is_resumed(tmp_path, trained_once):
    """60 flips at random places in all three files; a few hit what carries nothing."""
    from spiralrope_cli.core.config.option import build
    from spiralrope_cli.core.config.runs import ClassifierRun
    from spiralrope_cli.core.models.factory import model_of
    from spiralrope_cli.core.runtime.run_folder import read_config

    run = build(ClassifierRun, read_config(trained_once / "config.yaml"))
    first, other = (TrainState.create(model_of(run), run.optim) for _ in range(2))
    checkpoint.restore(trained_once, 8, first)
    folder = tmp_path / "run" / "checkpoints" / "0000008"
    shutil.copytree(trained_once / "checkpoints" / "0000008", folder)
    rng, refused = random.Random(0), 0
    for number in range(FLIPS):
        path = folder / ("model.safetensors", "ema.safetensors", "trainer.pt")[number % 3]
        content = path.read_bytes()
        path.write_bytes(flipped(content, rng))
        try:
            checkpoint.restore(tmp_path / "run", 8, other)
        except CheckpointError as error:
            refused += error.hint == "remove that folder to resume from the one before it"
        else:
            (tensors, *rest), (wanted, *expected) = everything(other), everything(first)
            assert same_tensors(tensors, wanted)
            assert rest == expected
        path.write_bytes(content)
    assert refused >= 0.9 * FLIPS


def test_a_flipped_bit_in_a_source_is_refused_by_whoever_reads_it(tmp_path, trained_once):
    content = (trained_once / "checkpoints" / "0000008" / "ema.safetensors").read_bytes()
    path = tmp_path / "ema.safetensors"
    path.write_bytes(flipped(content, random.Random(1), first=len(content) // 2))
    with pytest.raises(CheckpointError, match=r"its checksum is not the one in its metadata"):
        read_weights(find_source(str(path)))
    read_weights(find_source(str(path)), verify=False)  # as workers, after the plan


def test_an_export_carries_checksums_in_both_layouts(runs, trained_once):
    from spiralrope_cli.core.jobs.export import export

    for layout, out in (("safetensors", "folder"), ("published", "file.pth")):
        export({"source": str(trained_once), "layout": layout, "out": out})
        path = runs / out / "model.safetensors" if layout == "safetensors" else runs / out
        content = path.read_bytes()
        read_weights(find_source(out))
        path.write_bytes(flipped(content, random.Random(2), first=len(content) // 2))
        with pytest.raises(CheckpointError, match="checksum"):
            read_weights(find_source(out))


def test_files_without_a_checksum_are_read_as_before(tmp_path, trained_once):
    old = trained_once / "checkpoints" / "0000008" / "model.safetensors"
    tensors, metadata = read_safetensors(old)
    assert len(metadata.pop("crc32")) == 8
    save_file(load_file(old), tmp_path / "old.safetensors", metadata)
    weights = read_weights(find_source(str(tmp_path / "old.safetensors")))
    assert same_tensors(build_network(weights).state_dict(), tensors)


def test_names_shapes_types_and_metadata_count(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1, dtype=torch.bfloat16)}
    metadata = with_checksum(tensors, {"config": "{}"})
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata)
    assert read_safetensors(path)[1] == metadata
    for changed, said in (
        ({**tensors, "a": tensors["a"].view(3, 2)}, metadata),
        ({"c": tensors["a"], "b": tensors["b"]}, metadata),
        ({**tensors, "b": tensors["b"].half()}, metadata),
        (tensors, {**metadata, "config": "[]"}),
    ):
        save_file(changed, path, said)
        with pytest.raises(DamagedError):
            read_safetensors(path)


# --- Atomic writes


@pytest.mark.parametrize("options", [{}, {"sole": True}, {"durable": True}])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, options):
    target = tmp_path / "figures.json"
    write_whole(target, "old")

    def fill_the_disk():
        with atomic_write(target, **options) as beside:
            beside.write_text("ne")
            assert target.read_text() == "old"
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        fill_the_disk()
    assert {path: path.read_text() for path in tmp_path.iterdir()} == {target: "old"}
    with atomic_write(target, **options) as beside:
        beside.write_text("new")
    assert {path: path.read_text() for path in tmp_path.iterdir()} == {target: "new"}


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    def fill(times):
        with atomic_write(tmp_path / "export", durable=True) as beside:
            (beside / "inner").mkdir(parents=True)
            for number in range(times):
                (beside / "inner" / f"{number}.txt").write_text("whole")
            if times < 2:
                raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        fill(1)
    assert not list(tmp_path.iterdir())
    fill(2)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert len(list(tmp_path.glob("export/inner/*.txt"))) == 2


def test_a_sole_writer_writes_over_what_a_killed_one_left(tmp_path):
    with atomic_write(tmp_path / "large.npz", sole=True) as left:
        left.write_text("whole")
    left.write_text("half of another")
    with atomic_write(tmp_path / "large.npz", sole=True) as beside:
        assert beside == left
        beside.write_text("again")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["again"]


def test_two_machines_may_write_one_file_by_processes_of_one_number(tmp_path):
    target = tmp_path / "list.json"
    with atomic_write(target) as one, atomic_write(target) as other:
        one.write_text("one")
        other.write_text("other")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"list.json": "one"}


def test_an_error_names_the_file_that_was_to_be_written(tmp_path):
    with pytest.raises(OSError, match="No space") as full, atomic_write(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert full.value.filename == str(tmp_path / "a")
    with pytest.raises(FileNotFoundError) as missing:
        write_whole(tmp_path / "nowhere" / "a", "text")
    assert missing.value.filename == str(tmp_path / "nowhere" / "a")


@pytest.mark.parametrize("read", [json.loads, yaml.safe_load])
def test_what_is_nested_without_end_is_damaged(read):
    assert parse('{"a": [1]}', read) == {"a": [1]}
    with pytest.raises(ValueError, match="nested too deeply"):
        parse("[" * 20_000, read)
