"""FID while a DiT trains: that of dit-sample and fid, and no weight is another for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import same_tensors
from safetensors.torch import load_file
from typer.testing import CliRunner
from workers import stop_at

from spiralrope_cli import main as cli
from spiralrope_cli.core.errors import SpiralRopeError
from spiralrope_cli.core.jobs import train
from spiralrope_cli.core.plots.curves import curves_figure
from spiralrope_cli.core.report.results import print_results
from spiralrope_cli.core.resolve import resolve
from spiralrope_cli.core.runtime import run_folder
from spiralrope_cli.core.runtime.distributed import StopRequest
from spiralrope_cli.core.runtime.progress import read_metrics

SMALL = {"arch": "dit-32x2x2-2", "batch_size": 16, "micro_batch_size": 8, "precision": "fp32"}
SMALL |= {"max_steps": 4, "log_every": 2, "nproc": 1, "class_dropout_prob": 0.5}


@pytest.fixture(scope="module")
def here(tmp_path_factory, digit_pictures, inception_weights):
    """A folder with a reference and two runs of 4 steps, with FIDs and without."""
    root = tmp_path_factory.mktemp("fid")
    np.savez(root / "real.npz", arr_0=digit_pictures[:4])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPIRALROPE_CACHE", str(root / "cache"))
        options = {"fid_every": 2, "fid_num": 3, "fid_sampling_steps": 4}
        options |= {"fid_reference": str(root / "real.npz"), "fid_weights": str(inception_weights)}
        train.work(resolve("dit-train", {**SMALL, **options, "out": str(root / "with")}).run)
        patch.setattr(train, "report", lambda out: None)  # which takes seconds
        train.work(resolve("dit-train", {**SMALL, "out": str(root / "without")}).run)
        yield root, options


@pytest.fixture
def tiny(here, runs, monkeypatch):
    monkeypatch.setattr(train, "report", lambda out: None)

    def make(**options):
        return resolve("dit-train", {**SMALL, **here[1], "out": "run", **options}).run

    return make


def fids(folder):
    lines = read_metrics(folder)
    return [
        (line["step"], line["epoch"], line["fid"], line["fid_num"])
        for line in lines
        if "fid" in line
    ]


def same_weights(a, b, step):
    folders = [run_folder.step_folder(folder, step) for folder in (a, b)]
    for kind in ("model", "ema"):
        assert same_tensors(*(load_file(folder / f"{kind}.safetensors") for folder in folders))
    trainers = [torch.load(folder / "trainer.pt", weights_only=True) for folder in folders]
    assert same_tensors(*(each["optimizer"] for each in trainers))


def invoke(*words):
    result = CliRunner().invoke(cli.app, [*map(str, words)])
    if isinstance(result.exception, SpiralRopeError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def by_both_commands(run, options):
    """The FID of the first images of `dit-sample`, by `fid`."""
    count, steps = options["fid_num"], options["fid_sampling_steps"]
    words = ["--num-samples", count, "--num-sampling-steps", steps, "--precision", "fp32"]
    more = ["--vae", run.images.vae] if run.images.in_latents else []
    invoke("dit-sample", run.out, *words, *more, "--out", "drawn", "--nproc", 1)
    words = ["--weights", options["fid_weights"], "--select", "fid", "--json", "--nproc", 1]
    done = invoke("fid", "drawn/samples.npz", options["fid_reference"], *words)
    return json.loads(done.stdout)["fid"]


def test_it_is_the_fid_that_dit_sample_and_fid_give_and_changes_no_weight(here, tiny, capsys):
    root, options = here
    found = fids(root / "with")
    assert [(step, count) for step, _, _, count in found] == [(2, 3), (4, 3)]
    run = tiny(out=str(root / "with"))
    assert found[-1][2] == pytest.approx(by_both_commands(run, options), rel=1e-6)
    assert found[0][2] != found[-1][2]
    same_weights(root / "with", root / "without", 4)
    assert "FID (EMA weights)" in {
        axis.get_title("left") for axis in curves_figure([root / "with"]).axes
    }
    assert f"{found[-1][2]:.2f}" in (root / "with" / "report.html").read_text()
    print_results(root / "with")
    assert f"FID {found[-1][2]:.4f}, EMA weights, 3 images" in capsys.readouterr().out


def test_a_run_that_was_stopped_at_a_fid_has_the_same_figures(here, tiny, runs, monkeypatch):
    def stopped_at(call):
        with monkeypatch.context() as patched:
            patched.setattr(StopRequest, "agreed", stop_at(call))
            with pytest.raises(SystemExit, match="143"):
                train.work(tiny())
        assert run_folder.steps_on_disk(runs / "run") == [2]
        assert fids(runs / "run") == []

    stopped_at(2)  # the step after which a FID is due
    stopped_at(1)  # that FID, which comes first now
    train.work(tiny())
    assert fids(runs / "run") == fids(here[0] / "with")
    same_weights(runs / "run", here[0] / "with", 4)


def test_latents_are_decoded_as_dit_sample_does(here, tiny, tiny_vae):
    options = {"image_size": (16, 16), "vae": str(tiny_vae), "max_steps": 1, "fid_num": 2}
    run = tiny(**options)
    train.work(run)
    ((step, _, fid, count),) = fids(Path(run.out))
    assert (step, count) == (1, 2)
    assert fid == pytest.approx(by_both_commands(run, {**here[1], "fid_num": 2}), rel=1e-6)


def test_what_cannot_be_measured_is_told_before_training(here, runs, monkeypatch):
    _, options = here
    real, weights = options["fid_reference"], options["fid_weights"]
    ones = {"mu": np.ones(2048), "sigma": np.eye(2048)}
    np.savez("other.npz", **ones, protocol="another", num_images=9)
    np.savez("spatial.npz", mu_s=np.ones(2023), sigma_s=np.eye(2023))
    monkeypatch.setattr(train, "launch", lambda *given: pytest.fail("it began"))
    every = ["--fid-every", 5]
    for words, told in (
        (every, "--fid-every 5 needs --fid-reference"),
        ([*every, "--fid-reference", "gone"], "--fid-reference gone does not exist"),
        ([*every, "--fid-reference", real], "or --fid-weights FILE"),
        ([*every, "--fid-reference", real, "--fid-weights", "x"], "--fid-weights x does not exist"),
        ([*every, "--fid-reference", "spatial.npz", "--fid-weights", weights], "no mu and sigma"),
        (
            [*every, "--fid-reference", "other.npz", "--fid-weights", weights],
            "--fid-reference: another; this run",
        ),
        (["--fid-num", 1], "--fid-num is 1; it must be a whole number, 2 or more"),
        (["--fid-sampling-steps", 1001], "--fid-sampling-steps is 1001"),
    ):
        for more in ([], ["--dry-run"]):
            with pytest.raises(SpiralRopeError) as refused:
                invoke("dit-train", *words, *more, "--out", "none")
            assert told in str(refused.value)
            assert len(str(refused.value).splitlines()) <= 2
    assert "--fid-num has no effect: --fid-every is 0" in " ".join(
        invoke("dit-train", "--fid-num", 9, "--dry-run").stderr.split()
    )
