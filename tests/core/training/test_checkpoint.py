"""Checkpoints are whole or absent."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from comparing import read_pointer, same_tensors
from torch import nn

from spiralrope_cli.core.config.training import OptimConfig
from spiralrope_cli.core.errors import CheckpointError, DiskError
from spiralrope_cli.core.runtime.run_folder import steps_on_disk
from spiralrope_cli.core.training import checkpoint
from spiralrope_cli.core.training.step import TrainState

OPTIM = OptimConfig(
    **{"epochs": 1, "max_steps": 0, "batch_size": 1, "micro_batch_size": 1, "lr": 1e-3},
    **{"lr_rule": "none", "min_lr": 0.0, "warmup_lr": 0.0, "warmup_epochs": 0},
    **{"schedule": "constant", "betas": (0.9, 0.95), "weight_decay": 0.1},
    **{"clip_grad": 0.0, "ema_decay": 0.5, "ema_warmup": False, "freeze": "none"},
)


@pytest.fixture
def state():
    torch.manual_seed(0)
    return TrainState.create(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), OPTIM)


def advance(state):
    state.model(torch.randn(5, 3)).square().sum().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.ema.update(state.model)
    state.step += 1


def save(folder, state, keep_last=9, keep_every=0):
    return checkpoint.save(
        folder, checkpoint.contents(state), {"config": "{}"}, keep_last, keep_every
    )


def everything(state):
    return [state.model.state_dict(), state.ema.module.state_dict(), state.optimizer.state_dict()]


def test_what_is_saved_comes_back_bit_for_bit(tmp_path, state):
    for _ in range(3):
        advance(state)
    state.best = {"step": 2, "acc1": 12.5}
    save(tmp_path, state)
    other = TrainState.create(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), OPTIM)
    assert not same_tensors(everything(other), everything(state))
    checkpoint.restore(tmp_path, 3, other)
    assert same_tensors(everything(other), everything(state))
    assert (other.step, other.best) == (3, {"step": 2, "acc1": 12.5})
    (file,) = tmp_path.rglob("trainer.pt")
    with file.open("r+b") as mapped:
        mapped.write(bytes(file.stat().st_size))
    assert same_tensors(everything(other), everything(state)), "nothing stays mapped to the file"
    assert read_pointer(tmp_path, "best") == {"step": 2, "acc1": 12.5}


def test_pruning_keeps_the_newest_the_best_and_every_mth(tmp_path, state):
    for step in range(1, 9):
        advance(state)
        if step == 2:
            state.best = {"step": 2, "acc1": 50.0}
        save(tmp_path, state, keep_last=2, keep_every=4)
    assert steps_on_disk(tmp_path) == [2, 4, 7, 8]


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("save_file", OSError(errno.ENOSPC, "No space left on device")),
        ("torch.save", RuntimeError("PytorchStreamWriter failed: No space left on device")),
    ],
)
def test_a_full_disk_leaves_the_old_checkpoint_and_no_rubbish(
    tmp_path, state, monkeypatch, where, what
):
    advance(state)
    save(tmp_path, state)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    advance(state)

    def full(*_, **__):
        raise what

    target = torch if where == "torch.save" else checkpoint
    monkeypatch.setattr(target, where.removeprefix("torch."), full)
    with pytest.raises(CheckpointError, match="no space left for checkpoint") as refused:
        save(tmp_path, state)
    assert len(str(refused.value).splitlines()) <= 2
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("calls", range(1, 8))
def test_a_crash_at_any_point_of_a_save_leaves_a_whole_checkpoint(
    tmp_path, state, monkeypatch, calls
):
    advance(state)
    save(tmp_path, state, keep_last=1)
    first = everything(state)
    first = [{k: v.clone() for k, v in part.items()} for part in first[:2]]
    advance(state)
    count = []

    class Died(BaseException):
        pass

    # Dies at the n-th touch of the disk: flushes, the rename, the pointers, the pruning.
    for name in ("fsync", "rename", "replace"):
        real = getattr(os, name)

        def touch(*args, real=real):
            count.append(1)
            if len(count) == calls:
                raise Died
            return real(*args)

        monkeypatch.setattr(os, name, touch)
    with pytest.raises(Died):
        save(tmp_path, state, keep_last=1)
    monkeypatch.undo()
    newest = steps_on_disk(tmp_path)[-1]
    other = TrainState.create(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), OPTIM)
    checkpoint.restore(tmp_path, newest, other)
    wanted = first if newest == 1 else everything(state)[:2]
    assert same_tensors(everything(other)[:2], wanted)
    save(tmp_path, state, keep_last=1)
    assert steps_on_disk(tmp_path) == [2]
    assert not list(tmp_path.rglob(checkpoint.UNFINISHED + "*"))


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "trainer.pt"])
def test_a_damaged_file_is_named(tmp_path, state, name):
    advance(state)
    path = save(tmp_path, state) / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="0000001 cannot be read"):
        checkpoint.restore(tmp_path, 1, state)


def test_a_run_that_cannot_be_saved_is_refused_at_once(tmp_path, state, monkeypatch):
    checkpoint.check_fits(tmp_path, state.model)
    monkeypatch.setattr(checkpoint, "needed_bytes", lambda model: 2**60)
    with pytest.raises(DiskError, match="are needed for a checkpoint"):
        checkpoint.check_fits(tmp_path, state.model)
