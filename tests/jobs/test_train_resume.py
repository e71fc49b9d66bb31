"""Runs that go on in their folder: of an earlier version, or longer than they were."""

from __future__ import annotations

import contextlib
import signal

import pytest
import torch
from comparing import same_tensors
from safetensors.torch import load_file

from spiralrope_cli.core.errors import CheckpointError
from spiralrope_cli.core.jobs import train
from spiralrope_cli.core.resolve import Resolved, as_begun, resolve
from spiralrope_cli.core.runtime import run_folder
from spiralrope_cli.core.runtime.distributed import StopRequest
from spiralrope_cli.core.runtime.progress import read_metrics

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
    train.work(as_begun(now).run)
    same_state(runs / "parts", runs / "whole", 6)
    assert not resolve("dit-train", {}, config_file=str(path)).run.optim.ema_warmup


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({}, 4),
        ({"micro_batch_size": 2}, 2),
        ({"micro_batch_size": None}, None),
        ({"nproc": 4}, 4),
        ({"nproc": 8}, 4),  # two images of a process
        ({"batch_size": 12, "nproc": 2}, None),
    ],
)
def test_a_resumed_run_keeps_its_micro_batch_unless_it_is_given(runs, given, size):
    (runs / "run" / "checkpoints" / "0000002").mkdir(parents=True)
    run_folder.write_config(tiny(out="run", micro_batch_size=4))
    options = {**TINY["dit-train"], "out": "run", "batch_size": 16, **given}
    resolved = as_begun(resolve("dit-train", options))
    assert resolved.run.optim.micro_batch_size == size
    origin = "option" if "micro_batch_size" in given else size and "config file"
    assert resolved.sources.get("micro_batch_size") == origin


@pytest.mark.parametrize(("command", "kind"), [("dit-train", "spiral"), ("pretrain", "mixed")])
def test_a_run_of_constant_rate_is_trained_on_bit_for_bit(runs, capfd, command, kind):
    same = {"schedule": "constant", "nproc": 1, "log_every": 3, "rope_kind": kind}
    carry_out(tiny(command, max_steps=12, out="whole", **same))
    carry_out(tiny(command, max_steps=6, out="longer", **same))
    capfd.readouterr()
    carry_out(tiny(command, max_steps=12, out="longer", **same))
    assert "longer, resumes at step 6 and goes on to 12" in capfd.readouterr().err
    same_state(runs / "longer", runs / "whole", 12)
    losses = [
        {line["step"]: line["loss"] for line in read_metrics(runs / name) if "loss" in line}
        for name in ("longer", "whole")
    ]
    assert losses[0] == losses[1]
    carry_out(tiny(command, max_steps=12, out="longer", **same))
    assert "longer is finished: 12 steps" in capfd.readouterr().err
    with pytest.raises(CheckpointError, match="longer is at step 12, and this run would end at 6"):
        carry_out(tiny(command, max_steps=6, out="longer", **same))


def test_curves_of_the_shorter_run_do_not_stand_for_those_of_the_longer(runs, monkeypatch):
    carry_out(tiny(schedule="constant", max_steps=1, out="run"))
    assert (runs / "run" / "curves.png").exists()
    monkeypatch.setattr(train, "report", lambda out: None)  # as if it was killed before it
    longer = tiny(schedule="constant", max_steps=2, out="run")
    carry_out(longer)
    assert not run_folder.is_finished(longer, run_folder.first_step(longer))


@pytest.mark.parametrize(
    ("command", "again"),
    [("dit-train", "dit-train --init-from run"), ("pretrain", "finetune run")],
)
def test_the_length_of_another_schedule_cannot_be_changed(runs, command, again):
    def begun(**options):
        (runs / "run" / "checkpoints" / "0000002").mkdir(parents=True, exist_ok=True)
        run_folder.write_config(tiny(command, out="run", **options))

    begun(max_steps=100)
    for length in ({"max_steps": 200}, {"epochs": 2, "max_steps": 0}, {"max_steps": 60}):
        with pytest.raises(CheckpointError, match="--max-steps was 100, now") as refused:
            run_folder.first_step(tiny(command, out="run", **length))
        assert "its cosine schedule depends on the length" in refused.value.hint
        assert again in refused.value.hint
    for others in ({"seed": 3}, {"schedule": "constant"}, {"max_steps": 100, "warmup_epochs": 1}):
        with pytest.raises(CheckpointError, match="holds a run with other options") as refused:
            run_folder.first_step(tiny(command, out="run", **{"max_steps": 200, **others}))
        assert refused.value.hint.startswith("repeat those")
    begun(epochs=1, schedule="constant")
    assert run_folder.first_step(tiny(command, out="run", max_steps=900, schedule="constant")) == 2
    with pytest.raises(CheckpointError, match="other options: --seed was 0, now 1\n"):
        run_folder.first_step(tiny(command, out="run", epochs=9, schedule="constant", seed=1))
    other = {"rope_kind": "axial", "schedule": "constant", "epochs": 1}
    with pytest.raises(CheckpointError, match="options: --rope-kind was spiral, now axial\n"):
        run_folder.first_step(tiny(command, out="run", **other))
