"""The micro-batch that `auto` finds: the largest that fits in all processes, by real steps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from short_of_memory import on_two_processes, short_of_memory

from spiralrope_cli.core.config.recipes import micro_batch_sizes
from spiralrope_cli.core.errors import ConfigError, TrainingError, system_error
from spiralrope_cli.core.jobs import train
from spiralrope_cli.core.resolve import resolve
from spiralrope_cli.core.runtime.distributed import DistContext, StopRequest
from spiralrope_cli.core.runtime.launch import launch
from spiralrope_cli.core.training import advice
from spiralrope_cli.core.training.advice import largest_that_fits, trial_steps

CPU = DistContext(0, 1, torch.device("cpu"), "fp32", "", StopRequest())
SIZES = [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]


@pytest.mark.parametrize("guess", [-5.0, 1, 5.5, 16, 1000])
@pytest.mark.parametrize("limit", [1, 7, 16, 47, 48])
def test_the_largest_is_found_from_any_guess_and_few_sizes_are_tried(limit, guess):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= limit

    found = largest_that_fits(SIZES, guess, fits)
    assert found == max(size for size in SIZES if size <= limit)
    first = max((size for size in SIZES if size <= guess), default=SIZES[0])
    between = abs(SIZES.index(first) - SIZES.index(found))
    assert len(tried) == len(set(tried)) <= between + 2


def test_nothing_is_found_where_nothing_fits():
    assert largest_that_fits(SIZES, 6, lambda size: False) is None


def run_of(command="pretrain", **options):
    small = {"arch": "deit-32x1x2" if command == "pretrain" else "dit-32x1x2-2"}
    fast = {"max_steps": 2, "warmup_epochs": 0, "precision": "fp32", "nproc": 1}
    return resolve(command, {**small, **fast, "batch_size": 48, **options}).run


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("pretrain", {"mixup": 0.8, "clip_grad": 1.0, "drop_path": 0.2}),
        ("pretrain", {}),
        ("dit-train", {"class_dropout_prob": 0.5}),
    ],
)
def test_trial_steps_tell_what_fits_and_go_on_after_they_ran_out_of_memory(command, options):
    run = run_of(command, **options)
    sizes = micro_batch_sizes(run, 1)
    assert sizes == [size for size in SIZES if size % (8 if "mixup" in options else 1) == 0]
    fits = trial_steps(run, CPU, short_of_memory(20, run, CPU))
    for guess in (1, 48):
        assert largest_that_fits(sizes, guess, fits) == 16


def test_images_through_the_vae_and_cached_latents_are_tried_too(image_folder, tiny_vae, runs):
    options = {"image_size": (32, 32), "vae": str(tiny_vae), "batch_size": 4, "workers": 0}
    run = run_of("dit-train", data=str(image_folder), **options)
    assert trial_steps(run, CPU, train.open_task(run, CPU))(4)
    batch = train.open_task(run, CPU).black(3)
    assert (batch.images.shape, batch.std) == ((3, 3, 32, 32), None)


def test_all_processes_take_what_fits_in_the_smallest(runs):
    launch(on_two_processes, run_of(nproc=2, device="cpu"))
    assert json.loads(Path("found.json").read_text()) == [4, 4]


def test_on_a_gpu_the_run_keeps_what_was_found(monkeypatch, capsys):
    """What is asked of CUDA is given here; search and steps are real."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 2 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    fractions = []
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda *given: fractions.append(given[0])
    )
    real = advice.trial_steps
    monkeypatch.setattr(advice, "trial_steps", lambda run, ctx, task: real(run, CPU, task))
    gpu = dataclasses.replace(CPU, device=torch.device("cuda"))
    run = run_of()
    task, none = (short_of_memory(most, run, CPU) for most in (20, 0))
    with pytest.raises(TrainingError, match=r"a step of 1 image\(s\) does not fit into 900 MB"):
        advice.with_fitting_micro_batch(run, gpu, none)
    fractions.clear()
    run = advice.with_fitting_micro_batch(run, gpu, task)
    assert (run.optim.micro_batch_size, run.split_batch(1)) == (16, (16, 3))
    assert fractions == [0.45, 1.0]
    assert "micro-batch: 16 of the 48 images" in capsys.readouterr().err
    assert advice.with_fitting_micro_batch(run, gpu, None) is run
    [batches] = task.split_as(run, CPU).data.train_steps(0, 1)
    assert [len(batch.labels) for batch in batches] == [16, 16, 16]
    dit = run_of("dit-train")
    task = train.open_task(dit, CPU)
    advice.with_fitting_micro_batch(dit, gpu, task)
    assert task.extra() == {"vb": 0}, "the log is that of the run alone"


def test_out_of_memory_of_a_gpu_says_what_to_do():
    told = system_error(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. x"))
    assert told.message == "out of GPU memory: 2.00 GiB more"
    assert "--micro-batch-size auto" in told.hint
    assert "--grad-checkpointing" in told.hint


def test_without_a_gpu_auto_is_the_recipes(image_folder):
    run = run_of()
    assert run.optim.micro_batch_size is None
    assert advice.with_fitting_micro_batch(run, CPU, None).split_batch(1) == (24, 2)


def test_a_batch_that_no_size_divides_is_refused():
    with pytest.raises(ConfigError, match="--batch-size 48 does not split into 5 process"):
        micro_batch_sizes(run_of(), 5)


def test_the_plan_for_a_gpu_says_auto_and_that_for_a_cpu_a_number(capfd, runs):
    for device in ("cuda", "cpu"):
        resolved = resolve("pretrain", {"device": device, "batch_size": 48, "nproc": 1})
        train.carry_out(resolved, dry_run=True)
    gpu, cpu = (
        " ".join(plan.split()) for plan in capfd.readouterr().err.split("48 = 1 process(es)")[1:]
    )
    assert gpu.startswith("x 48 images, accumulated in parts if not all fit (--micro-batch-size")
    assert cpu.startswith("x 24 images x 2 gradient accumulation step(s)")


def test_a_micro_batch_of_more_images_than_a_process_has_is_told(capfd, runs):
    for size, told in ((64, True), (48, False)):
        given = {"device": "cpu", "batch_size": 48, "nproc": 1, "micro_batch_size": size}
        train.carry_out(resolve("pretrain", given), dry_run=True)
        note = "note: --micro-batch-size 64 has the effect of 48: a process has no more images"
        assert (note in capfd.readouterr().err) is told
