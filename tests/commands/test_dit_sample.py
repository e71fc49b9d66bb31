"""From the words of `spiralrope dit-sample` to images that follow from (seed, number) alone."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from spiralrope_cli import main as cli
from spiralrope_cli.core.diffusion import samplers as guidance
from spiralrope_cli.core.errors import SpiralRopeError
from spiralrope_cli.core.hub.catalog import WEIGHTS_REPO
from spiralrope_cli.core.jobs import sample as job
from spiralrope_cli.core.jobs import train
from spiralrope_cli.core.resolve import resolve
from spiralrope_cli.core.runtime.distributed import StopRequest

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints"
DIT = GOLDEN / "dit_tiny_0000007.pt"
FAST = ("--num-sampling-steps", 8, "--precision", "fp32", "--nproc", 1)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """A run that learned for a moment: what nothing has learned draws black and white alone."""
    folder = tmp_path_factory.mktemp("runs") / "drawn"
    options = {
        **{"arch": "dit-32x2x2-2", "rotate": 2, "max_steps": 120, "lr": 4e-3, "batch_size": 32},
        **{"ema_decay": 0.9, "precision": "fp32", "nproc": 1, "out": str(folder)},
        **{"schedule": "constant", "sample_every": 0},
    }
    train.work(resolve("dit-train", options).run)
    return folder


@pytest.fixture
def sample(runs):
    """Runs the command here; gives what it printed, or its error."""

    def call(*words, expect=0):
        result = CliRunner().invoke(cli.app, ["dit-sample", *map(str, words)])
        if isinstance(result.exception, SpiralRopeError):
            assert result.exception.exit_code == expect, result.exception
            return str(result.exception)
        assert result.exit_code == expect, result.output + repr(result.exception)
        return " ".join((result.stdout + result.stderr).split())

    return call


def images(folder):
    with np.load(Path(folder) / "samples.npz") as arrays:
        return arrays["arr_0"]


def test_the_result_is_an_npz_a_grid_and_what_made_them(sample, pixels, runs):
    printed = sample(
        pixels, "--num-samples", 12, *FAST, "--png", "--out", "here", "--batch-size", 5
    )
    drawn = images("here")
    assert (drawn.shape, drawn.dtype) == ((12, 8, 8, 3), np.uint8)
    assert 0.2 < np.isin(drawn, (0, 255)).mean() < 0.9
    assert "12 images: here/samples.npz" in printed
    assert sorted(path.name for path in (runs / "here").iterdir() if path.name[0] != ".") == [
        *("environment.json", "png", "report.html"),
        *("samples.json", "samples.npz", "samples.png", "sources.json"),
    ]
    files = sorted((runs / "here" / "png").iterdir())
    assert [path.name for path in files][:2] == ["000000.png", "000001.png"]
    assert all(
        np.array_equal(np.asarray(Image.open(path)), image)
        for path, image in zip(files, drawn, strict=True)
    )
    metadata = json.loads((runs / "here" / "samples.json").read_text())
    assert len(metadata["sha256"]) == 64
    assert (metadata["seed"], metadata["steps"], metadata["sampler"]) == (100, "8", "ddpm")
    with zipfile.ZipFile("here/samples.npz") as archive:
        assert json.loads(archive.comment) == metadata
    with Image.open("here/samples.png") as grid:
        assert json.loads(grid.text["spiralrope"]) == metadata
        assert min(grid.size) >= 3 * 64


def test_an_image_is_the_same_in_any_batch_and_process(spiralrope, sample, pixels, runs):
    words = ("--cfg-scale", 3, "--cfg-channels", "all")
    sample(pixels, "--num-samples", 7, *FAST, *words, "--batch-size", 7, "--out", "one")
    sample(pixels, "--num-samples", 7, *FAST, *words, "--batch-size", 2, "--out", "parts")
    two = ("--nproc", 2, "--batch-size", 2, "--out", "two")
    (runs / "temporary").mkdir()
    env = {"TMPDIR": str(runs / "temporary")}
    spiralrope("dit-sample", pixels, "--num-samples", 7, *FAST[:-2], *words, *two, env=env)
    assert not list((runs / "temporary").iterdir()), "workers leave nothing"
    sample(pixels, "--num-samples", 4, *FAST, *words, "--out", "fewer")
    whole = images("one").astype(int)
    for other in ("parts", "two", "fewer"):
        assert abs(images(other).astype(int) - whole[: len(images(other))]).max() <= 1
    sample(pixels, "--num-samples", 7, *FAST, *words, "--seed", 1, "--out", "other")
    assert abs(images("other").astype(int) - whole).mean() > 5


def test_an_interrupted_run_goes_on_with_the_missing_images(sample, pixels, monkeypatch, runs):
    words = (pixels, "--num-samples", 9, *FAST, "--batch-size", 2)
    sample(*words, "--out", "whole")
    answers = iter([0, 0, signal.SIGTERM])
    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "agreed", lambda *_, **__: next(answers))
        printed = sample(*words, "--out", "parts", expect=143)
    assert "stopped with 6 of 9 images" in printed
    assert not (runs / "parts" / "samples.npz").exists()
    drawn = []
    draw = job.Sampler.__call__
    monkeypatch.setattr(
        job.Sampler,
        "__call__",
        lambda self, mine, *rest: (drawn.extend(mine), draw(self, mine, *rest))[1],
    )
    sample(*words, "--out", "parts")
    assert drawn == [6, 7, 8]
    assert (runs / "parts/samples.npz").read_bytes() == (runs / "whole/samples.npz").read_bytes()
    assert "is finished: 9 images" in sample(*words, "--out", "parts")


@pytest.mark.parametrize("at", ["zlib", "zipfile.ZipFile", "flush"])
def test_ended_while_the_archive_is_made_nothing_is_lost(sample, pixels, monkeypatch, runs, at):
    def end(first, *more):
        if at == "zipfile.ZipFile":  # the file, amid what follows the images
            first.write(b"PK")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "samples.npz.part")

    words = (pixels, "--num-samples", 3, *FAST)
    sample(*words, "--out", "whole")
    with monkeypatch.context() as patched:
        # Not `zlib.crc32` itself, which reading the weights calls too.
        ends = SimpleNamespace(crc32=end) if at == "zlib" else end
        patched.setattr(f"spiralrope_cli.core.data.sample_files.{at}", ends)
        assert "no space left on the disk" in sample(*words, "--out", "parts", expect=1)
    sample(*words, "--out", "parts")
    assert (runs / "parts/samples.npz").read_bytes() == (runs / "whole/samples.npz").read_bytes()
    assert not (runs / "parts/samples.npz.part").exists()


def test_a_signal_within_a_batch_ends_it_at_once(sample, pixels, monkeypatch, runs):
    def ask(self):
        self.signal_number = signal.SIGINT

    monkeypatch.setattr(StopRequest, "listen", ask)
    printed = sample(pixels, "--num-samples", 3, *FAST, "--out", "here", expect=130)
    assert "stopped with 0 of 3 images; the same command resumes" in printed
    assert (runs / "here" / "samples.npz.part").exists()


@pytest.mark.parametrize("lost", ["samples.npz.part", "samples.json", "samples.done"])
def test_parts_that_are_not_whole_are_drawn_again(sample, pixels, monkeypatch, runs, lost):
    words = (pixels, "--num-samples", 5, *FAST, "--num-sampling-steps", 2, "--batch-size", 2)
    sample(*words, "--out", "whole")
    answers = iter([0, signal.SIGTERM])
    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "agreed", lambda *_, **__: next(answers))
        sample(*words, "--out", "parts", expect=143)
        assert "4 are finished" in sample(*words, "--out", "parts", "--dry-run")
    if lost == "samples.npz.part":
        os.truncate(runs / "parts" / lost, 200)
    else:
        (runs / "parts" / lost).unlink()
    sample(*words, "--out", "parts")
    assert (runs / "parts/samples.npz").read_bytes() == (runs / "whole/samples.npz").read_bytes()


def test_what_does_not_fit_the_folder_is_refused(sample, pixels, runs):
    run = shutil.copytree(pixels, runs / "trained")
    words = ("--num-samples", 2, *FAST)
    assert "is a training run" in sample(run, *words, "--out", run, expect=2)
    (runs / "file").touch()
    assert "it is a file" in sample(run, *words, "--out", "file", expect=2)
    sample(run, *words, "--out", "here")
    last = run / "checkpoints" / "0000120"
    shutil.copyfile(last / "model.safetensors", last / "ema.safetensors")
    printed = sample(run, *words, "--out", "here", expect=1)
    assert "holds samples of other weights" in printed
    (runs / "here" / "samples.json").write_text("[1]")
    assert "cannot be read" in sample(run, *words, "--out", "here", expect=1)


def test_a_finished_run_makes_what_is_asked_for_later(sample, pixels, monkeypatch, runs):
    words = (pixels, "--num-samples", 5, *FAST, "--out", "here")
    sample(*words)
    folder = runs / "here"
    npz, grid = ((folder / name).read_bytes() for name in ("samples.npz", "samples.png"))
    monkeypatch.setattr(job, "Sampler", None)  # no network is needed for what is drawn
    sample(*words, "--png")
    assert len(list((folder / "png").glob("*.png"))) == 5
    (folder / "png" / "000003.png").unlink()
    (folder / "samples.png").unlink()
    kept = (folder / "png" / "000002.png").stat().st_mtime_ns
    assert "files: here/png" in sample(*words, "--png")
    with Image.open(folder / "png" / "000003.png") as image:
        assert np.array_equal(np.asarray(image), images("here")[3])
        assert json.loads(image.text["spiralrope"])["index"] == 3
    assert (folder / "png" / "000002.png").stat().st_mtime_ns == kept
    assert (folder / "samples.png").read_bytes() == grid
    assert (folder / "samples.npz").read_bytes() == npz
    assert "is finished" in sample(*words, "--png")


def test_the_settled_weights_are_used_whatever_is_saved_meanwhile(
    sample, pixels, monkeypatch, runs
):
    run = shutil.copytree(pixels, runs / "trained")
    sample(run, "--num-samples", 2, *FAST, "--out", "before")

    def saved_meanwhile(entry, config):
        older, newer = (run / "checkpoints" / f"0000{step}" for step in (120, 121))
        shutil.copytree(older, newer, dirs_exist_ok=True)
        shutil.copyfile(newer / "model.safetensors", newer / "ema.safetensors")
        job.work(config)

    monkeypatch.setattr(job, "launch", saved_meanwhile)
    sample(run, "--num-samples", 2, *FAST, "--out", "meanwhile")
    assert np.array_equal(images("meanwhile"), images("before"))
    sample(run / "checkpoints" / "0000121", "--num-samples", 2, *FAST, "--out", "control")
    assert not np.array_equal(images("control"), images("before"))


def test_images_that_nothing_tells_of_are_not_overwritten(sample, pixels, runs):
    (runs / "here").mkdir()
    (runs / "here" / "samples.npz").write_bytes(b"somebody's")
    printed = sample(pixels, "--num-samples", 2, *FAST, "--out", "here", expect=1)
    assert "samples.json is missing: its options are unknown" in printed
    assert (runs / "here" / "samples.npz").read_bytes() == b"somebody's"


def test_guidance_that_cannot_act_is_a_note(sample, pixels):
    words = (pixels, "--num-samples", 2, "--dry-run", "--cfg-interval", "100,500")
    assert "have no effect: --cfg-scale is 1" in sample(*words)
    assert "no effect" not in sample(*words, "--cfg-scale", 2)


def test_other_options_do_not_mix_with_what_is_there(sample, pixels):
    sample(pixels, "--num-samples", 2, *FAST, "--out", "here")
    printed = sample(pixels, "--num-samples", 2, *FAST, "--cfg-scale", 2, "--out", "here", expect=1)
    assert "here holds other samples: cfg_scale was 1.0, now 2.0" in printed


def test_classes_are_dealt_out_in_turn_or_drawn_by_number(pixels, sample, monkeypatch):
    asked = []
    guided = guidance.guided
    monkeypatch.setattr(
        guidance,
        "guided",
        lambda net, labels, g: (asked.extend(labels.tolist()), guided(net, labels, g))[1],
    )
    sample(
        pixels, "--num-samples", 5, *FAST, "--classes", "7, 3", "--batch-size", 2, "--out", "dealt"
    )
    assert asked == [7, 3, 7, 3, 7]
    asked.clear()
    sample(pixels, "--num-samples", 40, *FAST, "--out", "drawn")
    assert len(set(asked)) > 5
    before = list(asked)
    asked.clear()
    sample(pixels, "--num-samples", 40, *FAST, "--batch-size", 7, "--out", "again")
    assert asked == before


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_other_samplers_draw_other_images(sample, pixels, sampler):
    sample(pixels, "--num-samples", 3, *FAST, "--out", "ddpm")
    sample(pixels, "--num-samples", 3, *FAST, "--sampler", sampler, "--out", "other")
    assert not np.array_equal(images("ddpm"), images("other"))


def test_a_published_file_draws_through_a_vae_in_any_rectangle(sample, tiny_vae):
    words = (DIT, "--vae", tiny_vae, "--num-samples", 2, *FAST)
    sample(*words, "--image-size", "32x48", "--out", "wide")
    assert images("wide").shape == (2, 32, 48, 3)
    sample(*words, "--image-size", "32x48", "--no-ema", "--out", "raw")
    assert not np.array_equal(images("wide"), images("raw"))


@pytest.mark.parametrize(
    ("words", "code", "printed"),
    [
        (["--classes", "10"], 2, "--classes 10: the weights have 10 classes, 0 to 9"),
        (["--classes", "a"], 2, "it must be a list of class numbers"),
        (["--cfg-scale", "0.5"], 2, "--cfg-scale is 0.5"),
        (["--cfg-interval", "5"], 2, "it must be LO,HI"),
        (
            ["--cfg-interval", "0.1,0.75"],
            2,
            "it must be LO,HI in timesteps of 0 to 1000, as 100,750",
        ),
        (["--cfg-interval", "9,5"], 2, "--cfg-interval 9,5"),
        (["--image-size", "9"], 2, "--image-size 9 does not split"),
        (["--vae", "mse"], 2, "generates pixels (1 channel(s))"),
        (["--num-samples", "0"], 2, "--num-samples is 0"),
        (["--num-samples", "2147483647"], 1, "are needed for 2147483647 images"),
        (["--num-sampling-steps", "1"], 2, "--num-sampling-steps 1"),
        (["--sampler", "euler"], 2, "--sampler is euler"),
        (["--sampler", "dpm++", "--num-sampling-steps", "1000"], 2, "dpm++ takes at most 999"),
        (
            ["--sampler", "dpm++", "--num-sampling-steps", "10,15"],
            2,
            "dpm++ chooses the timesteps itself",
        ),
        (["--out", ""], 2, "--out is empty"),
    ],
)
def test_bad_input_has_its_own_line(sample, pixels, words, code, printed):
    said = sample(pixels, *words, expect=code)
    assert printed in said


def test_sources_that_draw_nothing(sample):
    printed = sample(GOLDEN / "deit_tiny_checkpoint.pth", expect=1)
    assert "a classifier, not a DiT" in printed
    assert "only a VAE decodes these" in sample(DIT, "--vae", "none", expect=2)
    assert "neither ema nor mse nor a folder" in sample(DIT, "--vae", "gone", expect=2)
    assert "or a published name" in sample("dit-xxl", expect=2)
    printed = sample(DIT, "--name", "x", "--out", "y", expect=2)
    assert "--name x and --out y both name the run folder" in printed


def test_published_weights_come_by_themselves_after_their_size_was_said(
    spiralrope, hub, tmp_path, tiny_vae, monkeypatch
):
    hub.repos[WEIGHTS_REPO] = {"dit_s2/0400000.pt": DIT.read_bytes()}
    monkeypatch.setenv("SPIRALROPE_CACHE", str(tmp_path / "ours"))
    words = ("dit-s2", "--num-samples", 2, "--vae", tiny_vae, "--num-sampling-steps", 2)
    dry = spiralrope("dit-sample", *words, "--nproc", 1, "--dry-run", expect=1)
    assert "the weights of dit-s2 are not downloaded, and --dry-run does not download" in dry.stderr
    assert not hub.asked
    done = spiralrope("dit-sample", *words, "--nproc", 1)
    before, _, after = done.stderr.partition("averaged (EMA) weights of dit-72x2x3-2")
    assert "1.85 MB" in before
    assert "rotate 2" in after
