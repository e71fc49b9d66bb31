"""`--shard` and DDP with two gloo processes: the weights of each other, in files of one form."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from comparing import relative_distance, same_tensors
from packaging.version import Version
from safetensors.torch import load_file
from sharded import train_and_listen

from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.jobs import train
from spiralrope_cli.core.resolve import resolve
from spiralrope_cli.core.runtime import device
from spiralrope_cli.core.runtime.launch import launch
from spiralrope_cli.core.runtime.progress import read_metrics

splits = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.11"), reason="torch before 2.11 cannot shard on a CPU"
)
ARCHS = {"pretrain": "deit-32x3x2", "dit-train": "dit-32x3x2-2"}
ROUNDING = 1e-6
"""Adam's vector instructions round in another way than what it does with the last few numbers of a
tensor, and a shard ends elsewhere. Norms of gradients are summed in another order."""


def run_of(command, out, **options):
    base = {"arch": ARCHS[command], "max_steps": 4, "batch_size": 16, "micro_batch_size": 4}
    base |= {"precision": "fp32", "nproc": 2, "device": "cpu", "schedule": "constant", "lr": 1e-3}
    base |= {"lr_rule": "none", "warmup_epochs": 0, "log_every": 1, "out": out, "ema_decay": 0.9}
    if command == "pretrain":
        base |= {"drop_path": 0.2, "clip_grad": 0.5}
    else:
        base |= {"grad_checkpointing": True, "rope_kind": "mixed", "qk_norm": True}
    return resolve(command, {**base, **options}).run


@pytest.fixture(scope="module")
def fid(inception_weights, digit_pictures, tmp_path_factory):
    """Options of a FID after the last step."""
    reference = tmp_path_factory.mktemp("reference") / "real.npz"
    np.savez(reference, arr_0=digit_pictures[:3])
    options = {"fid_every": 4, "fid_num": 3, "fid_sampling_steps": 3}
    return options | {"fid_reference": str(reference), "fid_weights": str(inception_weights)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, fid):
    """The folder of all runs, by two processes."""
    folder = tmp_path_factory.mktemp("sharded")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setenv("SPIRALROPE_CACHE", str(folder / "cache"))
        runs = [
            run_of("pretrain", "pretrain-whole"),
            run_of("dit-train", "dit-train-whole", **fid),
            run_of("pretrain", "pretrain-shard", shard=True),
            run_of("pretrain", "pretrain-first", shard=True, max_steps=2),
            run_of("dit-train", "dit-train-resumed", max_steps=2),
            run_of("dit-train", "dit-train-resumed", shard=True, **fid),
        ]
        wide = {"arch": "deit-192x4x3", "compile": "on", "clip_grad": 0.0}
        listened = [
            run_of("pretrain", out, shard=out == "split", **wide) for out in ("ddp", "split")
        ]
        launch(train_and_listen, runs[0], runs, listened)
    return folder


def files(folder):
    stored = folder / "checkpoints/0000004"
    weights = [load_file(stored / f"{kind}.safetensors") for kind in ("model", "ema")]
    return *weights, torch.load(stored / "trainer.pt", weights_only=True)


def assert_same_state(folder, other):
    ours, theirs = files(folder), files(other)
    for mine, its in zip(ours[:2], theirs[:2], strict=True):
        assert {n: (t.shape, t.dtype) for n, t in mine.items()} == {
            n: (t.shape, t.dtype) for n, t in its.items()
        }
        assert relative_distance(mine, its) < ROUNDING
    assert not same_tensors(*ours[:2])
    mine, its = (each[2]["optimizer"] for each in (ours, theirs))
    assert mine["param_groups"] == its["param_groups"]
    assert mine["state"].keys() == its["state"].keys()
    for number, moments in mine["state"].items():
        assert {n: t.shape for n, t in moments.items()} == {
            n: t.shape for n, t in its["state"][number].items()
        }
    for name in ("exp_avg", "exp_avg_sq"):
        moments = [{n: m[name] for n, m in each["state"].items()} for each in (mine, its)]
        assert relative_distance(*moments) < ROUNDING


def logged(folder):
    names = ("step", "loss", "vb", "grad_norm", "acc1", "val_loss", "ema_val_loss", "count")
    return [{n: line[n] for n in names if n in line} for line in read_metrics(folder)]


@splits
@pytest.mark.parametrize(
    ("whole", "shard"),
    [("pretrain-whole", "pretrain-shard"), ("dit-train-whole", "dit-train-resumed")],
)
def test_a_sharded_run_has_the_losses_weights_and_samples_of_a_whole_one(trained, whole, shard):
    """That of the DiT is whole up to step 2."""
    whole, shard = trained / whole, trained / shard
    assert_same_state(shard, whole)
    for mine, its in zip(logged(shard), logged(whole), strict=True):
        assert mine == pytest.approx(its, rel=1e-5)
    if "acc1" in logged(whole)[-1]:
        assert logged(whole)[-1]["count"] == 360
    else:
        pictures = [(each / "samples.png").read_bytes() for each in (shard, whole)]
        assert pictures[0] == pictures[1]


@splits
def test_a_sharded_run_goes_on_in_one_process(trained, runs):
    shutil.copytree(trained / "pretrain-first", "first")
    train.work(run_of("pretrain", "first", nproc=1, shard=True))
    assert_same_state(runs / "first", trained / "pretrain-whole")


@splits
def test_two_processes_give_the_fid_of_one_also_sharded(trained, runs, fid):
    of_two = [
        [line["fid"] for line in read_metrics(trained / name) if "fid" in line]
        for name in ("dit-train-whole", "dit-train-resumed")
    ]
    shutil.copytree(trained / "dit-train-whole", "one")
    lines = (runs / "one/metrics.jsonl").read_text().splitlines(keepends=True)
    lacking = "".join(line for line in lines if '"fid"' not in line)
    (runs / "one/metrics.jsonl").write_text(lacking)
    train.work(run_of("dit-train", "one", **{**fid, "nproc": 1}))
    [of_one] = [line["fid"] for line in read_metrics(runs / "one") if "fid" in line]
    assert of_two == [[pytest.approx(of_one, rel=1e-4)]] * 2


@splits
def test_gradients_are_reduced_once_per_step_while_the_backward_pass_goes_on(trained):
    """By DDP, with compiled blocks, each of them one graph. Nothing else is sent."""
    found = json.loads((trained / "ddp/events.json").read_text())
    assert found["graphs"] == 1
    first, second = found["events"][:4], found["events"][4:]
    assert first == [3, 2, 1, 0]
    assert [event for event in second if event != "reduce"] == [3, 2, 1, 0]
    assert second.count("reduce") == 2, "7 MiB in messages of 4 MiB"
    assert second.index("reduce") < second.index(0)


@splits
def test_sharded_gradients_are_reduced_once_per_step_too(trained):
    found = json.loads((trained / "split/events.json").read_text())
    assert found["graphs"] == 1
    events = found["events"]
    assert events.count("scatter") == 5, "four blocks and the rest"
    assert events[events.index("scatter") :].count("gather") >= 2, "the backward pass went on"
    assert events.index("scatter") < events.index(0)
    assert set(events) == {0, 1, 2, 3, "gather", "scatter"}


def test_one_process_has_nothing_to_split(capfd, runs):
    for nproc, told in ((1, True), (2, False)):
        resolved = resolve("pretrain", {"device": "cpu", "nproc": nproc, "shard": True})
        if nproc == 1 or Version(torch.__version__) >= Version("2.11"):
            train.carry_out(resolved, dry_run=True)
            note = "note: --shard has no effect: there is one process"
            assert (note in capfd.readouterr().err) is told


def test_a_torch_that_cannot_split_on_a_cpu_is_told(monkeypatch, runs):
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu128")
    run = resolve("pretrain", {"device": "cpu", "nproc": 2, "shard": True}).run
    with pytest.raises(ConfigError, match=r"--shard on a CPU needs torch 2.11 or newer, this is"):
        device.check_shard(run.machine, 2)
