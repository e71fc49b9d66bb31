from __future__ import annotations

import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spiralrope_cli.core.runtime.launch import share_the_machine

share_the_machine()  # before the first test loads torch
ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "spiralrope_cli"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Loopback alone: a test that needs the world must fail here too."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise OSError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.delenv("SPIRALROPE_DATA", raising=False)


@pytest.fixture(autouse=True)
def few_figures(request, monkeypatch):
    """Curves take a second of each run, so they are drawn only for the marker `draws`."""
    if request.node.get_closest_marker("draws") is None:
        # Loaded first, so that these keep the real one whichever test of a process comes first.
        import_module("spiralrope_cli.core.jobs.evaluate")
        import_module("spiralrope_cli.core.jobs.plot")
        monkeypatch.setattr("spiralrope_cli.core.report.page.drawings", lambda *_: ())
        curves = "spiralrope_cli.core.plots.curves.save_figure"
        monkeypatch.setattr(curves, lambda figure, path: path.touch())


def options_of(command, *inner):
    """Names of the fields that a command's options and arguments set."""
    import typer

    from spiralrope_cli import main

    group = typer.main.get_command(main.app)
    for word in (command, *inner):
        _, group, _ = group.resolve_command(typer.Context(group), [word])
    shown = (each for each in group.params if not getattr(each, "hidden", False))
    return {parameter.name for parameter in shown} - {"help"}


@functools.cache
def modules_that_launch():
    """Modules of the package that start workers."""
    imported = re.compile(r"^from \S+\.runtime\.launch import (\([^)]*|.*)\blaunch\b", re.MULTILINE)
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "spiralrope_cli").rglob("*.py"))
        if imported.search(path.read_text())
    ]


def call_launch_instead(monkeypatch):
    """The list where (work, run) goes in place of workers, whichever module would start them."""
    called = []
    for module in modules_that_launch():
        monkeypatch.setattr(f"{module}.launch", lambda *given: called.append(given))
    return called


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """An empty working folder, where `runs/` goes."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def spiralrope(runs, monkeypatch, capfd):
    """Runs the real command here, or in its own process: `apart`, with variables or options."""
    from spiralrope_cli import main

    def here(words, expect, columns):
        monkeypatch.setattr(sys, "argv", ["spiralrope", *words])
        monkeypatch.setenv("COLUMNS", columns)
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main.main()
        done = subprocess.CompletedProcess(words, left.value.code or 0, *capfd.readouterr())
        assert done.returncode == expect, done.stdout + done.stderr
        return done

    def call(*words, expect=0, env=None, apart=False, **more):
        words, env = [*map(str, words)], {"COLUMNS": "200", **(env or {})}
        if env.keys() == {"COLUMNS"} and not more and not apart:
            return here(words, expect, env["COLUMNS"])
        done = subprocess.run(
            [*COMMAND, *words],
            cwd=runs,
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, **env},
            **more,
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done

    return call


@pytest.fixture
def started(runs):
    """Starts the real command, or another one, and leaves it running; it is ended with the test."""
    children = []

    def call(*words, program=COMMAND, **variables):
        child = subprocess.Popen(
            [*program, *map(str, words)],
            cwd=runs,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "COLUMNS": "200", **variables},
            start_new_session=True,
        )
        children.append(child)
        return child

    yield call
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """16 training and 10 validation pictures of two classes, that noise and brightness tell."""
    root = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 5)):
        for number, name in enumerate(("dark", "light")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = noise.integers(120 * number, 120 + 120 * number, (20, 24, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory):
    """Folder of a VAE with random weights, of the published one's shape but for its widths."""
    import torch
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
    )
    with torch.no_grad():
        model.quant_conv.weight *= 4  # deviations that differ, as those of trained weights do
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def digit_pictures():
    """[1797, 8, 8, 3] uint8: the bundled scans as pictures."""
    from spiralrope_cli.core.data.memory import load_digits

    images = np.concatenate([split.images.numpy() for split in load_digits()])
    return (images * 15).astype(np.uint8).repeat(3, axis=1).transpose(0, 2, 3, 1).copy()


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory, digit_pictures):
    """A file of random weights for Inception, alive on digits."""
    import torch
    from random_inception import write_random_weights

    pictures = torch.from_numpy(digit_pictures[-16:]).permute(0, 3, 1, 2)
    return write_random_weights(tmp_path_factory.mktemp("inception") / "random.pth", pictures)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub of this process, whose token may write for `me` and `lab`."""
    from hub_server import HubServer, use_hub

    server = HubServer()
    use_hub(server, monkeypatch, tmp_path / "hf-home")
    yield server
    server.close()


@pytest.fixture
def tiny(runs):
    """Builds small runs on the digits: a few steps, fp32, no warm-up."""
    from spiralrope_cli.core.resolve import resolve

    def make(**options):
        base = {
            "arch": "deit-64x2x2",
            "max_steps": 4,
            "batch_size": 32,
            "micro_batch_size": 16,
            "warmup_epochs": 0,
            "precision": "fp32",
            "log_every": 2,
            "nproc": 1,
            "out": str(runs / "run"),
        }
        return resolve("pretrain", {**base, **options}).run

    return make


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """8 steps on the digits, also in TensorBoard; the best checkpoint, of step 4, differs."""
    from safetensors.torch import load_file, save_file

    from spiralrope_cli.core.config.option import to_nested
    from spiralrope_cli.core.jobs import train
    from spiralrope_cli.core.resolve import resolve

    out = tmp_path_factory.mktemp("trained") / "tiny"
    fast = {"lr": 1e-2, "lr_rule": "none", "schedule": "constant", "warmup_epochs": 0}
    options = {
        "arch": "deit-64x2x2",
        "max_steps": 8,
        "precision": "fp32",
        "nproc": 1,
        "ema_decay": 0.9,
        "tracker": "tensorboard",
    }
    run = resolve("pretrain", {**options, **fast, "out": str(out)}).run
    train.work(run)
    last, best = (out / "checkpoints" / f"{step:07d}" for step in (8, 4))
    best.mkdir()
    for kind in ("model", "ema"):
        state = load_file(last / f"{kind}.safetensors")
        state["head.weight"] *= 0.5
        told = {"config": json.dumps(to_nested(run)), "step": "4", "weights": kind}
        save_file(state, best / f"{kind}.safetensors", told)
    (out / "checkpoints" / "best.json").write_text('{"step": 4}')
    return out


@pytest.fixture(scope="session")
def drawn_once(tmp_path_factory):
    """2 steps of dit-train on the digits, also in TensorBoard; raw and averaged weights differ."""
    from spiralrope_cli.core.jobs import train
    from spiralrope_cli.core.resolve import resolve

    out = tmp_path_factory.mktemp("drawn") / "tiny"
    options = {"arch": "dit-64x2x2-2", "max_steps": 2, "nproc": 1, "precision": "fp32"}
    options |= {"out": str(out), "warmup_epochs": 0, "ema_warmup": False}
    options |= {"tracker": "tensorboard"}
    train.work(resolve("dit-train", options).run)
    return out
