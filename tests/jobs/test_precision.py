"""Precision and compilation of a run: stored, kept by a resumed run, and changed where given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from comparing import relative_distance
from safetensors.torch import load_file

from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.jobs import train
from spiralrope_cli.core.resolve import resolve
from spiralrope_cli.core.runtime import run_folder
from spiralrope_cli.core.runtime.device import settle_precision
from spiralrope_cli.core.runtime.run_folder import write_config, write_json

SMALL = {"arch": "deit-32x2x2", "batch_size": 32, "warmup_epochs": 0, "nproc": 1, "device": "cpu"}


@pytest.fixture
def cpu(monkeypatch):
    """Sets whether this CPU has bf16 instructions."""

    def make(has_bf16):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)

    return make


def resolved(precision="auto", max_steps=2, **more):
    given = {**SMALL, "precision": precision, "max_steps": max_steps, "out": "run", **more}
    return resolve("pretrain", given)


def stored():
    return yaml.safe_load(Path("run/config.yaml").read_text())["machine"]["precision"]


def started(setting, **environment):
    """A run folder as it is after some steps."""
    run = resolved(setting).run
    Path("run").mkdir()
    write_config(run)
    write_json(Path("run/environment.json"), environment)


@pytest.mark.parametrize(
    ("has_bf16", "given", "precision"),
    [(False, "auto", "fp32"), (False, "tf32", "fp32"), (True, "fp32", "fp32")],
)
def test_config_yaml_says_what_the_precision_became(runs, cpu, has_bf16, given, precision):
    cpu(has_bf16)
    train.carry_out(resolved(given), dry_run=False)
    assert stored() == precision
    train.carry_out(resolved(given, max_steps=2), dry_run=False)  # the same command again


def test_a_resumed_run_keeps_its_precision(runs, cpu):
    started("fp32", device="cpu", tf32=False)
    cpu(has_bf16=True)
    assert settle_precision(resolved().run, step=1) == ("fp32", [])


def test_a_machine_that_lacks_the_precision_of_the_run_stops_unless_one_is_given(runs, cpu):
    started("bf16", device="cpu", tf32=False)
    cpu(has_bf16=False)
    with pytest.raises(ConfigError) as refused:
        settle_precision(resolved().run, step=1)
    assert refused.value.message == "run was trained in bf16, but this CPU has no bf16 instructions"
    assert refused.value.hint == "--precision fp32 resumes in fp32"
    assert settle_precision(resolved("fp32").run, step=1) == (
        "fp32",
        ["trained in bf16 up to step 1, in fp32 from there"],
    )
    precision, (note,) = settle_precision(resolved("bf16").run, step=1)
    assert (precision, "emulated" in note) == ("bf16", True)


def test_a_run_in_tf32_stops_on_a_cpu(runs, cpu):
    started("tf32", device="cuda", tf32=True)
    cpu(has_bf16=True)
    with pytest.raises(ConfigError, match="was trained in tf32, but this CPU has no TF32"):
        settle_precision(resolved().run, step=1)


def test_tf32_on_a_cpu_is_fp32_with_a_note(runs, cpu):
    cpu(has_bf16=True)
    assert settle_precision(resolved("tf32").run, step=0) == (
        "fp32",
        ["--precision tf32 is fp32 here: this CPU has no TF32"],
    )


@pytest.mark.parametrize(("word", "precision"), [("float32", "fp32"), ("bfloat16", "bf16")])
def test_runs_of_earlier_versions_keep_what_auto_became(runs, cpu, word, precision):
    started("auto", device="cpu", precision=word)
    cpu(has_bf16=True)
    assert settle_precision(resolved().run, step=1) == (precision, [])


def test_fp32_of_earlier_versions_on_gpus_is_said_to_be_tf32(runs, cpu):
    started("fp32", device="cuda", precision="float32")
    precision, (note,) = settle_precision(resolved().run, step=1)
    assert precision == "fp32"
    assert note.endswith("whose fp32 was TF32 on GPUs; --precision tf32 is that")


def weights(folder):
    step = run_folder.steps_on_disk(Path(folder))[-1]
    return load_file(Path(folder) / "checkpoints" / f"{step:07d}" / "model.safetensors")


def test_a_run_goes_on_compiled_and_eager_again(runs, monkeypatch):
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module: compile_module(module, backend="eager")
    )
    options = {"precision": "fp32", "max_steps": 6, "schedule": "constant"}
    whole, parts = (resolved(**options, out=out).run for out in ("whole", "parts"))
    train.work(whole)
    for steps, setting in ((2, "on"), (4, "off"), (6, "on")):
        optim, machine = replace(parts.optim, max_steps=steps), replace(parts.machine)
        part = replace(parts, optim=optim, machine=replace(machine, compile=setting))
        if steps > 2:  # the same run, as far as its folder knows
            write_config(part)
        train.work(part)
    assert relative_distance(weights("parts"), weights("whole")) < 1e-3
    torch._dynamo.reset()


def test_a_dry_run_may_plan_for_a_gpu_that_is_not_here(runs, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    planned = resolve("pretrain", {**SMALL, "device": "cuda", "out": "run"})
    train.carry_out(planned, dry_run=True)
    assert "torch finds no GPU" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="torch finds no GPU"):
        train.carry_out(planned, dry_run=False)
