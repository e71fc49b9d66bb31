"""A worker that is killed in the middle of a job is replaced, and the results stay the same.

`pretrain` and `eval`: tests/core/runtime/test_machines.py.
"""

from __future__ import annotations

import json
import shutil

import killed_once
import numpy as np
import pytest
from comparing import same_tensors
from PIL import Image
from safetensors.torch import load_file

from spiralrope_cli.core.jobs import encode, sample, score, train

KILLED = "worker 0 was killed by SIGKILL; restart 1 of 1"


@pytest.fixture
def killed(runs, spiralrope, monkeypatch):
    """Runs a command undisturbed, then again with a worker that is killed; gives what both said."""

    def call(job, *words):
        words = (*words, "--device", "cpu", "--precision", "fp32", "--nproc", 1)
        whole = spiralrope(*words)
        if (runs / "out").exists():
            shutil.move("out", "whole")
        monkeypatch.setattr(job, "work", killed_once.work)
        now = spiralrope(*words, "--max-restarts", 1)
        assert now.stderr.count(KILLED) == 1
        assert (runs / "killed").exists()
        return whole, now

    return call


def test_training_of_a_dit(killed, runs):
    words = ("--arch", "dit-32x2x2-1", "--max-steps", 4, "--save-every", 1, "--batch-size", 8)
    _, now = killed(train, "dit-train", *words, "--warmup-epochs", 0, "--out", "out")
    assert now.stderr.count("resumed at step 2") == 1
    for kind in ("model", "ema"):
        file = f"checkpoints/0000004/{kind}.safetensors"
        assert same_tensors(load_file(runs / "out" / file), load_file(runs / "whole" / file))


def test_encoding(killed, runs, tiny_vae):
    noise = np.random.default_rng(0)
    (runs / "photos/one").mkdir(parents=True)
    for number in range(20):
        picture = noise.integers(0, 256, (32, 32, 3)).astype(np.uint8)
        Image.fromarray(picture).save(runs / f"photos/one/{number:02d}.png")
    words = ("--data", "photos", "--vae", tiny_vae, "--image-size", 32, "--batch-size", 4)
    _, now = killed(encode, "dit-encode", *words, "--workers", 0, "--out", "out")
    assert "out/00001.safetensors is missing; encoding again" in now.stderr, "and not the first"
    names = sorted(path.name for path in (runs / "whole").glob("*.safetensors"))
    assert len(names) == 2
    for name in names:
        assert same_tensors(load_file(runs / "out" / name), load_file(runs / "whole" / name))


def test_sampling(killed, runs, drawn_once):
    words = (drawn_once, "--num-samples", 6, "--num-sampling-steps", 3, "--batch-size", 2)
    killed(sample, "dit-sample", *words, "--out", "out")
    both = [np.load(runs / folder / "samples.npz")["arr_0"] for folder in ("out", "whole")]
    assert np.array_equal(*both)


def test_scores(killed, runs, digit_pictures, inception_weights, monkeypatch):
    monkeypatch.setenv("SPIRALROPE_CACHE", "cache")
    np.savez("a.npz", digit_pictures[:3])
    np.savez("b.npz", digit_pictures[20:24])
    words = ("a.npz", "b.npz", "--weights", inception_weights, "--select", "fid", "--json")
    whole, now = (json.loads(each.stdout) for each in killed(score, "fid", *words))
    assert now["fid"] == whole["fid"]
