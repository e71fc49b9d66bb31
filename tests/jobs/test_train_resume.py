"""Runs that go on in their folder: of an earlier version, or longer than they were."""

from __future__ import annotations

import contextlib
import signal

import pytest
import torch
from comparing import same_tensors
from safetensors.torch import load_file

from spiralrope_cli.core.config.resolve import Resolved, resolve
from spiralrope_cli.core.errors import CheckpointError
from spiralrope_cli.core.jobs import train
from spiralrope_cli.core.runtime import run_folder
from spiralrope_cli.core.runtime.distributed import StopRequest

TINY = {
    "pretrain": {"arch": "deit-32x2x2", "drop_path": 0.2, "mixup": 0.8, "random_erasing": 0.25},
    "dit-train": {"arch": "dit-32x2x2-2", "hflip": 0.5, "class_dropout_prob": 0.5},
}


def tiny(command="dit-train", **options):
    base = {"batch_size": 16, "micro_batch_size": 8, "precision": "fp32", "nproc": 1}
    return resolve(command, {**TINY[command], **base, **options}).run


def carry_out(run):
    train.carry_out(Resolved(run, {}, ()), dry_run=False)


def same_state(a, b, step):
    folders = [run_folder.step_folder(folder, step) for folder in (a, b)]
    for file in ("model.safetensors", "ema.safetensors"):
        assert same_tensors(*(load_file(folder / file) for folder in folders))
    trainers = [torch.load(folder / "trainer.pt", weights_only=True) for folder in folders]
    assert same_tensors(*(each["optimizer"] for each in trainers))


def test_a_run_of_an_earlier_version_goes_on_without_ema_warm_up(runs, monkeypatch):
    for name in ("whole", "parts"):
        calls = []

        def stop_at_three(self, device, ask_all, name=name, calls=calls):
            calls.append(1)
            return signal.SIGTERM if name == "parts" and len(calls) == 3 else 0

        with monkeypatch.context() as patched, contextlib.suppress(SystemExit):
            patched.setattr(StopRequest, "agreed", stop_at_three)
            train.work(tiny(max_steps=6, out=name, ema_warmup=False))
    path = runs / "parts" / "config.yaml"
    kept = [line for line in path.read_text().splitlines() if "ema_warmup" not in line]
    path.write_text("\n".join(kept))
    now = Resolved(tiny(max_steps=6, out="parts"), {"ema_warmup": "recipe"}, ())
    assert now.run.optim.ema_warmup
    with pytest.raises(CheckpointError, match="--ema-warmup was False, now True"):
        run_folder.first_step(now.run)
    train.work(run_folder.as_begun(now).run)
    same_state(runs / "parts", runs / "whole", 6)
    assert not resolve("dit-train", {}, config_file=str(path)).run.optim.ema_warmup
