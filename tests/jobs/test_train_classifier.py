"""The promises of a training run, kept on the bundled digits."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from comparing import read_pointer, relative_distance, same_tensors
from safetensors import safe_open
from safetensors.torch import load_file
from workers import stop_at, workers_of

from spiralrope_cli.core.errors import CheckpointError, SpiralRopeError, TrainingError
from spiralrope_cli.core.jobs import train
from spiralrope_cli.core.runtime import launch, run_folder
from spiralrope_cli.core.runtime.distributed import StopRequest
from spiralrope_cli.core.runtime.progress import read_metrics
from spiralrope_cli.core.training import classification, loop

EVERYTHING_RANDOM = {
    "mixup": 0.8,
    "cutmix": 1.0,
    "drop_path": 0.2,
    "random_erasing": 0.25,
    "clip_grad": 1.0,
    "max_steps": 12,
    "log_every": 3,
    "schedule": "cosine",
}
SMALL_PICTURES = ("--image-size", 16, "--patch-size", 8, "--batch-size", 4, "--warmup-epochs", 0)


def weights(folder: Path, kind: str = "model", step: int | None = None) -> dict[str, torch.Tensor]:
    step = step or run_folder.steps_on_disk(folder)[-1]
    return load_file(folder / "checkpoints" / f"{step:07d}" / f"{kind}.safetensors")


def trainer(folder: Path) -> dict:
    step = run_folder.steps_on_disk(folder)[-1]
    return torch.load(folder / f"checkpoints/{step:07d}/trainer.pt", weights_only=True)


def logged(folder: Path) -> list[tuple]:
    keys = ("step", "loss", "lr", "grad_norm", "acc1", "ema_acc1", "val_loss", "ema_val_loss")
    return [tuple(line.get(key) for key in keys) for line in read_metrics(folder)]


def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tiny, runs, monkeypatch):
    whole, parts = tiny(out="whole", **EVERYTHING_RANDOM), tiny(out="parts", **EVERYTHING_RANDOM)
    train.work(whole)
    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "agreed", stop_at(6))
        with pytest.raises(SystemExit) as left:
            train.work(parts)
    assert left.value.code == 143
    assert run_folder.steps_on_disk(runs / "parts") == [6]
    train.work(parts)

    for kind in ("model", "ema"):
        assert same_tensors(weights(runs / "parts", kind), weights(runs / "whole", kind))
    assert not same_tensors(weights(runs / "whole", "model"), weights(runs / "whole", "ema"))
    assert same_tensors(trainer(runs / "parts"), trainer(runs / "whole"))
    assert logged(runs / "parts") == logged(runs / "whole")


def assert_quiet(said):
    """Neither a traceback nor a line of torch's own logs."""
    assert "Traceback" not in said
    assert not re.search(r"^[WE]\d{4} ", said, re.MULTILINE)


def wait_for(condition, child=None):
    """Polls until something is true; a child that ends first fails the test with what it said."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        assert child is None or child.poll() is None, child.stdout.read()
        time.sleep(0.002)


@pytest.fixture
def on_pictures(image_folder):
    """Words of a fast run on image files, 4 steps per epoch, with everything random on."""
    return (
        *("pretrain", "--arch", "deit-64x2x2", "--data", image_folder, *SMALL_PICTURES),
        *("--micro-batch-size", 4, "--mixup", 0, "--cutmix", 0, "--drop-path", 0.2, "--workers", 1),
        *("--precision", "fp32", "--lr-rule", "none", "--lr", 1e-3, "--log-every", 2),
    )


def test_killed_at_any_moment_nothing_is_lost(on_pictures, started, spiralrope, runs):
    words = (*on_pictures, "--epochs", 8)
    spiralrope(*words, "--out", "whole")
    out = runs / "killed"
    checkpoints = out / "checkpoints"

    child = started(*words, "--out", "killed")
    wait_for(lambda: len(run_folder.steps_on_disk(out)) == 1, child)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()

    child = started(*words, "--out", "killed")
    wait_for(lambda: any(checkpoints.glob(".unfinished*/*")), child)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()

    spiralrope(*words, "--out", "killed")
    for kind in ("model", "ema"):
        assert same_tensors(weights(out, kind), weights(runs / "whole", kind))
    assert logged(out) == logged(runs / "whole")
    assert not list(checkpoints.glob(".unfinished*"))


@pytest.mark.parametrize(
    ("number", "code", "nproc"),
    [
        (signal.SIGINT, 130, 1),
        (signal.SIGTERM, 143, 2),
        (signal.SIGINT, 130, 2),
        (signal.SIGHUP, 129, 2),
    ],
)
def test_a_signal_saves_and_leaves_with_its_code(on_pictures, started, runs, number, code, nproc):
    words = (*on_pictures, "--epochs", 10000, "--nproc", nproc)
    words = (*words, "--save-every", 5000, "--validate-every", 5000)
    words = (*words, "--micro-batch-size", 2, "--out", "run")
    child = started(*words)
    wait_for(lambda: len(read_metrics(runs / "run")) > 2, child)
    # A terminal sends its signals to all, a scheduler may send SIGTERM to the first one alone.
    to_all = nproc == 1 or number != signal.SIGTERM
    os.killpg(child.pid, number) if to_all else child.send_signal(number)
    said, _ = child.communicate(timeout=120)
    assert child.returncode == code, said
    assert_quiet(said)
    assert said.count("the same command resumes") == 1
    steps = run_folder.steps_on_disk(runs / "run")
    assert len(steps) == 1
    assert f"stopped at step {steps[0]}" in said


def test_a_killed_worker_is_named_with_its_signal(on_pictures, started, runs):
    words = (*on_pictures, "--epochs", 10000, "--nproc", 2, "--micro-batch-size", 2)
    child = started(*words, "--save-every", 5000, "--validate-every", 5000, "--out", "run")
    wait_for(lambda: len(read_metrics(runs / "run")) > 2, child)
    os.kill(workers_of(child.pid)[1], signal.SIGSEGV)
    said, _ = child.communicate(timeout=120)
    assert child.returncode == 1
    assert "error: worker 1 was killed by SIGSEGV" in said
    assert_quiet(said)


@pytest.fixture
def trained_by(runs, tiny):
    """Trains in so many processes and gives the folder."""

    def call(nproc, **options):
        run = tiny(out=f"by{nproc}-{options.get('seed', 0)}", nproc=nproc, **options)
        launch.launch(train.work, run)
        return runs / run.out

    return call


def test_any_number_of_processes_trains_and_counts_the_same(trained_by):
    same = {
        **{"max_steps": 10, "batch_size": 48, "micro_batch_size": 8, "log_every": 5},
        **{"schedule": "constant", "lr": 1e-3, "lr_rule": "none", "drop_path": 0.1},
        **{"mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.25},
    }
    one = trained_by(1, **same)
    figures = [line for line in read_metrics(one) if "count" in line]
    assert [line["count"] for line in figures] == [360]
    other = trained_by(3, **same)
    assert relative_distance(weights(other), weights(one)) < 1e-5
    assert relative_distance(weights(other, "ema"), weights(one, "ema")) < 1e-5
    for mine, its in zip(read_metrics(other), read_metrics(one), strict=True):
        assert mine.get("loss", 0) == pytest.approx(its.get("loss", 0), rel=1e-5)
        assert mine.get("count") == its.get("count")
        assert mine.get("acc1") == its.get("acc1")
    # The same comparison tells other data, so that it could have failed above.
    control = trained_by(1, **same, seed=1)
    assert relative_distance(weights(control), weights(one)) > 1e-2


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_was_good(tiny, runs):
    good = tiny(max_steps=44, batch_size=32, micro_batch_size=32, log_every=4)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StopRequest, "agreed", lambda self, device, ask_all: signal.SIGTERM)
        with pytest.raises(SystemExit):
            train.work(good)
    assert run_folder.steps_on_disk(runs / "run") == [1]
    spoiled = weights(runs / "run")

    def explode(state, forward, *rest, **more):
        with torch.no_grad():
            state.model.head.weight.fill_(float("inf" if state.step == 6 else 0.01))
        return step(state, forward, *rest, **more)

    step = loop.train_step
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "train_step", explode)
        with pytest.raises(TrainingError, match="not finite at step 7; step 1 is the last good"):
            train.work(good)
    assert run_folder.steps_on_disk(runs / "run") == [1]
    assert same_tensors(weights(runs / "run"), spoiled)
    (offending,) = (runs / "run" / "checkpoints").glob("nonfinite-*")
    batch = torch.load(offending, weights_only=True)
    assert batch["step"] == 7
    assert batch["images"].shape == (32, 1, 8, 8)
    assert len(batch["numbers"]) == 32


def test_weights_that_are_not_finite_are_never_saved(tiny, runs):
    # One huge step: its loss is still finite, what it leaves behind is not.
    run = tiny(max_steps=1, lr=1e38, lr_rule="none", schedule="constant", weight_decay=1e3)
    with pytest.raises(TrainingError, match="not finite"):
        train.work(run)
    assert run_folder.steps_on_disk(runs / "run") == []


def test_two_workers_say_one_thing(spiralrope, image_folder, on_pictures):
    words = (*on_pictures, "--nproc", 2, "--micro-batch-size", 2, "--epochs", 3, "--lr", 1e30)
    said = spiralrope(*words, expect=1).stderr
    assert said.count("error:") == 1
    assert "not finite" in said
    assert_quiet(said)


def test_the_same_command_on_a_finished_run_says_so(on_pictures, spiralrope, runs):
    words = (*on_pictures, "--epochs", 1, "--out", "run")
    first = spiralrope(*words)
    before = {path: path.stat().st_mtime_ns for path in (runs / "run").rglob("*")}
    again = spiralrope(*words)
    assert "is finished: 4 steps" in again.stderr
    assert again.stdout == first.stdout
    assert "validation acc@1" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in (runs / "run").rglob("*")} == before


def test_two_runs_in_one_folder_the_second_is_refused(on_pictures, spiralrope, runs):
    words = (*on_pictures, "--epochs", 1, "--nproc", 2, "--micro-batch-size", 2, "--out", "run")
    with run_folder.hold_folder(runs / "run"):
        (runs / "run" / "sources.json").write_text('{"of": "the first"}')
        said = spiralrope(*words, expect=1, apart=True).stderr
    assert "the first" in (runs / "run" / "sources.json").read_text()
    assert said.count("error:") == 1
    assert f"another run is writing to run (process {os.getpid()})" in said
    assert_quiet(said)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rotate": 4}, "--rotate was 2, now 4"),
        ({"enabled": False}, "--rope was True, now False"),
        ({"drop_path": 0.3}, "--drop-path was 0.0, now 0.3"),
        ({"seed": 3}, "--seed was 0, now 3"),
    ],
)
def test_resuming_with_other_options_is_refused_with_both_values(tiny, runs, options, told):
    (runs / "run" / "checkpoints" / "0000002").mkdir(parents=True)
    run_folder.write_config(tiny())
    with pytest.raises(CheckpointError) as refused:
        train.work(tiny(**options))
    assert told in refused.value.message
    assert run_folder.first_step(tiny(workers=1, tracker="none", keep_last=7)) == 2


@pytest.mark.parametrize("name", ["rotate", "projection", "arch", "lr"])
def test_a_saved_config_that_lacks_a_value_is_refused(tiny, runs, name):
    (runs / "run" / "checkpoints" / "0000002").mkdir(parents=True)
    run_folder.write_config(tiny())
    path = runs / "run" / "config.yaml"
    kept = [line for line in path.read_text().splitlines() if line.split(":")[0].strip() != name]
    path.write_text("\n".join(kept))
    with pytest.raises(CheckpointError, match=rf"lacks {name}\n"):
        run_folder.first_step(tiny())


def test_resume_modes(tiny, runs):
    assert run_folder.first_step(tiny()) == 0
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        run_folder.first_step(tiny(resume="must"))
    (runs / "run" / "checkpoints" / "0000002").mkdir(parents=True)
    run_folder.write_config(tiny())
    assert run_folder.first_step(tiny(resume="must")) == 2
    with pytest.raises(CheckpointError, match="already holds checkpoints up to step 2"):
        run_folder.first_step(tiny(resume="never"))


@pytest.mark.draws
def test_what_a_run_writes_can_be_read_without_pickle(tiny, runs):
    train.work(tiny(max_steps=45, log_every=44))
    folder = runs / "run"
    assert (folder / "curves.png").stat().st_size > 10_000
    assert (folder / "config.yaml").exists()
    checkpoints = folder / "checkpoints"
    newest = checkpoints / "0000045"
    assert {p.name for p in newest.iterdir()} == {
        "model.safetensors",
        "ema.safetensors",
        "trainer.pt",
    }
    with safe_open(newest / "ema.safetensors", "pt") as file:
        assert '"rotate": 2' in file.metadata()["config"]
        assert file.metadata()["weights"] == "ema"
        assert not [name for name in file.keys() if "freqs" in name]  # noqa: SIM118
    assert read_pointer(folder, "last") == {"step": 45}
    assert read_pointer(folder, "best")["step"] == 45
    assert set(trainer(folder)) == {"optimizer", "step", "best"}


def test_the_best_is_remembered_across_a_resume(tiny, runs, monkeypatch):
    run = tiny(max_steps=88, log_every=44, validate_every=1, save_every=1, keep_last=1)
    given = iter([50.0, 40.0])

    def validate(config, ctx, val_images, state, reporter):
        acc1 = next(given)
        if not state.best or acc1 > state.best["acc1"]:
            state.best = {"step": state.step, "acc1": acc1}
        if acc1 == 50.0:
            ctx.stop.signal_number = signal.SIGTERM

    monkeypatch.setattr(classification, "validate", validate)
    with pytest.raises(SystemExit):
        train.work(run)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StopRequest, "agreed", lambda self, device, ask_all: 0)
        train.work(run)
    # The best one stays although only the last is to be kept.
    assert run_folder.steps_on_disk(runs / "run") == [44, 88]
    assert read_pointer(runs / "run", "best") == {"step": 44, "acc1": 50.0}


def test_the_best_is_on_disk_however_seldom_is_saved(tiny, runs):
    run = tiny(max_steps=132, log_every=44, validate_every=1, save_every=3, keep_last=1)
    given = iter([50.0, 40.0, 30.0])

    def validate(config, ctx, val_images, state, reporter):
        acc1 = next(given)
        if not state.best or acc1 > state.best["acc1"]:
            state.best = {"step": state.step, "acc1": acc1}

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(classification, "validate", validate)
        train.work(run)
    assert run_folder.steps_on_disk(runs / "run") == [44, 132]
    assert read_pointer(runs / "run", "best")["step"] == 44


def test_nothing_waits_for_the_device_between_log_points(tiny, monkeypatch):
    run = tiny(max_steps=8, log_every=4, clip_grad=1.0, mixup=0.8, drop_path=0.1)
    waits, steps = [], []
    step = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *a, **k: (steps.append(1), step(*a, **k))[1])
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        method = getattr(torch.Tensor, name)

        def spy(self, *rest, method=method, name=name, **more):
            if self.requires_grad or self.grad_fn is not None or self.dtype.is_floating_point:
                waits.append((len(steps), name))
            return method(self, *rest, **more)

        monkeypatch.setattr(torch.Tensor, name, spy)
    train.work(run)
    assert {when for when, _ in waits if when} <= {4, 8}


def test_an_error_of_a_worker_keeps_its_code():
    error = SpiralRopeError("what", "how")
    assert str(error) == "what\nhow"
