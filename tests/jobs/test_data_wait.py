"""A run says how much of its time it waited for data, and what would help."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.data import batches
from spiralrope_cli.core.data.streams import Shards
from spiralrope_cli.core.jobs import train
from spiralrope_cli.core.resolve import resolve
from spiralrope_cli.core.runtime.distributed import DistContext, StopRequest
from spiralrope_cli.core.runtime.progress import read_metrics
from spiralrope_cli.core.training import loop

CPU = torch.device("cpu")
SMALL = {"patch_size": 8, "image_size": (16, 16), "batch_size": 8, "mixup": 0.0, "cutmix": 0.0}
SHORT = {"max_steps": 4, "warmup_epochs": 0, "log_every": 2, "precision": "fp32", "nproc": 1}


def test_a_run_on_a_slow_disk_says_so_once_and_how_much(runs, image_folder, monkeypatch, capfd):
    real = batches.load

    def from_a_slow_disk(*given):
        for batch in real(*given):
            time.sleep(1)
            yield batch

    monkeypatch.setattr(batches, "load", from_a_slow_disk)
    data = {"data": str(image_folder), "workers": 0, "out": "run"}
    train.work(resolve("pretrain", {"arch": "deit-32x1x2", **SMALL, **SHORT, **data}).run)
    waits = [line["data_wait"] for line in read_metrics(runs / "run") if "loss" in line]
    assert len(waits) == 2
    assert all(0.05 <= wait <= 1 for wait in waits)
    said = capfd.readouterr().err
    assert said.count("training waits for data; this helps: ") == 1
    assert said.count(f"waits for data {waits[0]:.0%}") >= 1


def test_data_in_memory_are_never_waited_for():
    run = resolve("pretrain", {"arch": "deit-32x1x2", **SHORT}).run
    data = batches.classifier_data(run, CPU, 0, 1, {})
    assert len(list(data.train_steps(0, 4))) == 4
    assert (data.waits, data.helps) == ([], "")


@pytest.mark.parametrize(("waited", "told"), [([0.2, 0.2], {}), ([1.0, 2.0], {"data_wait": 0.3})])
def test_little_waiting_is_not_worth_a_word(waited, told):
    lines, data = [], SimpleNamespace(waits=waited, helps="a faster disk")
    reporter = SimpleNamespace(say_once=lines.append)
    ctx = DistContext(0, 1, CPU, "fp32", "", StopRequest())
    assert loop.data_wait(data, 10.0, ctx, reporter) == pytest.approx(told)
    assert len(lines) == len(told)
    assert data.waits == []  # the next window begins at 0


def test_what_helps_is_what_the_machine_has(monkeypatch):
    monkeypatch.setattr(batches, "cores_per_process", lambda: 16)
    stream = Shards((), (), ())
    for workers, shards, helps in (
        (3, stream, "--workers 15, in place of 3"),
        (15, None, "more cores (this process has 16), or files of smaller images"),
        (15, stream, "a faster network"),
    ):
        assert helps in batches.more_workers(MachineConfig(workers=workers), CPU, shards)
