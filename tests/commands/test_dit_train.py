"""Words to config: every option of dit-train arrives, and what cannot work is told."""

from __future__ import annotations

import json
import typing
from dataclasses import is_dataclass

import pytest
import yaml
from conftest import options_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from spiralrope_cli import main as cli
from spiralrope_cli.core.config import recipes
from spiralrope_cli.core.config.dit_runs import DiTRun
from spiralrope_cli.core.config.models import DIT_SIZES
from spiralrope_cli.core.config.option import leaves, to_nested
from spiralrope_cli.core.errors import ConfigError, SpiralRopeError
from spiralrope_cli.core.jobs import train as training
from spiralrope_cli.core.resolve import resolve
from spiralrope_cli.core.training.advice import hints

NOT_FIELDS = {"config", "name", "dry_run", "slurm"}


@pytest.fixture
def resolved(runs, monkeypatch):
    """Runs the command up to the launch, and gives the run that would be launched."""
    launched = []
    monkeypatch.setattr(training, "launch", lambda job, run: launched.append((job, run)))

    def call(*words):
        launched.clear()
        result = CliRunner().invoke(cli.app, ["dit-train", *map(str, words)])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        job, run = launched[0]
        assert job is training.work
        return run

    return call


def test_options_and_fields_have_the_same_names():
    options = options_of("dit-train")
    fields = set(leaves(DiTRun))
    assert options - fields == NOT_FIELDS
    groups = [g for g in typing.get_type_hints(DiTRun).values() if is_dataclass(g)]
    names = [name for group in groups for name in leaves(group)]
    assert len(names) == len(set(names)) > 50


def test_without_options_digits_are_trained_on_as_pixels(resolved):
    run = resolved()
    assert (run.arch, run.data, run.images.vae) == ("dit-ti2", "digits", "none")
    assert (run.model.input_size, run.model.in_chans, run.model.num_classes) == ((8, 8), 1, 10)
    assert run.images.hflip == 0, "a mirrored digit is another"
    assert run.rope.rotate == recipes.DIT["rotate"] == 0
    assert run.out == "runs/dit-train-dit-ti2-digits-r0"
    assert resolved("--rotate", 4, "--name", "b").out == "runs/dit-train-dit-ti2-digits-r4-b"
    # An architecture beside digits keeps their recipe.
    assert resolved("--arch", "DiT-S/2").optim == run.optim
    assert resolve("dit-train", {"data": "fashion-mnist"}).run.arch == "dit-ti4"


def test_the_published_recipe_on_photographs(resolved, image_folder, tiny_vae):
    run = resolved("--data", image_folder, "--batch-size", 8, "--vae", tiny_vae)
    assert run.arch == "dit-b4"
    assert (run.images.image_size, run.images.hflip) == ((256, 256), 0.5)
    assert (run.model.input_size, run.model.in_chans) == ((32, 32), 4)
    assert (run.optim.lr, run.optim.schedule, run.optim.weight_decay) == (1e-4, "constant", 0)
    assert (run.optim.ema_decay, run.model.class_dropout_prob) == (0.9999, 0.1)
    assert (run.checkpoint.log_every, run.checkpoint.save_every) == (100, 50_000)
    assert recipes.DIT["vae"] == "ema"
    assert recipes.DIT["epochs"] * (1281167 // recipes.DIT["batch_size"]) == 400_320
    plain = resolve("dit-train", {"data": str(image_folder / "train"), "batch_size": 8}).run
    assert (plain.num_train, plain.model.num_classes, plain.out) == (16, 2, run.out)
    pixels = resolve("dit-train", {"data": str(image_folder), "batch_size": 8, "vae": "none"}).run
    assert (pixels.model.input_size, pixels.model.in_chans) == ((256, 256), 3)


@pytest.mark.parametrize("arch", DIT_SIZES)
def test_every_architecture_is_taken(arch):
    assert resolve("dit-train", {"arch": arch, "image_size": (16, 16)}).run.arch == arch


def test_a_vaes_folder_is_known_by_its_whole_path(runs, image_folder, tiny_vae):
    (runs / "vae").symlink_to(tiny_vae)
    options = {"data": str(image_folder), "image_size": (32, 32), "batch_size": 8, "vae": "vae"}
    assert resolve("dit-train", options).run.images.vae == str(tiny_vae.resolve())


def test_a_config_file_repeats_a_run_and_options_win(runs, resolved):
    first = resolved("--rotate", 4, "--lr", 0.5, "--epochs", 7, "--image-size", "12x8")
    path = runs / "kept.yaml"
    path.write_text(yaml.safe_dump(to_nested(first)))
    assert resolved("--config", path) == first
    assert resolved("--config", path, "--rotate", 1).optim == first.optim
    path.write_text(yaml.safe_dump(to_nested(resolve("pretrain", {}).run)))
    with pytest.raises(ConfigError, match="is of another kind of run, pretrain"):
        resolved("--config", path)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--arch", "dit-q2"], "--arch dit-q2 is unknown"),
        (["--image-size", "9"], "--image-size 9 does not split into patches of 2 for dit-ti2"),
        (["--image-size", "9"], "the nearest that does: 8"),
        (["--vae", "ema"], "through the VAE, which divides by 8"),
        (["--vae", "nowhere", "--image-size", "16"], "--vae nowhere is neither"),
        (["--latents", "nowhere"], "--latents nowhere holds no latents"),
        (["--class-dropout-prob", "1"], "--class-dropout-prob is 1.0"),
        (["--hflip", "2"], "--hflip is 2.0"),
        (["--schedule", "published"], "must be cosine or constant"),
        (["--save-every", "0"], "--save-every is 0"),
        (["--sample-every", "-1"], "--sample-every is -1"),
        (["--batch-size", "50", "--micro-batch-size", "16"], "the nearest that do: 48, 64"),
        (["--batch-size", "2000"], "more than the 1437 training images"),
        (["--init-from", ""], "--init-from is empty"),
        (["--resume", "must"], "holds no checkpoint"),
        (["--data", "nowhere"], "is neither a folder nor a built-in name"),
        (["--init-from", "nowhere/at-all"], "does not exist"),
    ],
)
def test_what_cannot_work_is_told(resolved, words, told):
    with pytest.raises(SpiralRopeError) as refused:
        resolved(*words)
    assert told in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"freqs_for": "pixel", "theta": 5.0}, "--theta has no effect: --freqs-for is pixel"),
        ({"max_steps": 900, "epochs": 9}, "--epochs has no effect: --max-steps is given"),
        ({"schedule": "constant", "min_lr": 1.0}, "--min-lr has no effect"),
        ({"workers": 3}, "--workers has no effect: digits is kept in memory"),
        ({"projection": "exact"}, "--projection has no effect: with --rotate 0"),
    ],
)
def test_options_that_cannot_act_are_a_note(options, told):
    *_, warning = resolve("dit-train", options).warnings  # after the note on axial RoPE
    assert told in warning


def test_a_dry_run_looks_at_a_vaes_folder_and_fetches_none(resolved, monkeypatch):
    with pytest.raises(ConfigError, match="--vae nowhere is neither"):
        resolved("--vae", "nowhere", "--image-size", 16, "--dry-run")
    monkeypatch.setattr(
        "spiralrope_cli.core.hub.download.fetch_published", lambda row: pytest.fail("fetched")
    )
    words = ["dit-train", "--vae", "ema", "--image-size", "16", "--dry-run"]
    assert "through the VAE ema" in CliRunner().invoke(cli.app, words).stderr


def test_the_plan_says_what_was_settled_and_why(spiralrope, runs):
    done = spiralrope("dit-train", "--max-steps", 30, "--dry-run")
    for part in (
        "runs/dit-train-dit-ti2-digits-r0",
        "1437 training images, 10 classes; 8 px, never flipped, as pixels, in [-1, 1]",
        "dit-ti2, 8 px, 4x4 patches of 2 px; 8.16 M parameters",
        "K = 2 directions",
        "30 steps, 22 per epoch: 1.36 epochs",
        "by option    max_steps 30",
        "by data set",
        "by recipe",
    ):
        assert part in done.stderr
    assert done.stdout == ""
    assert not (runs / "runs").exists()


OLD_NAMES = {"max_steps": "steps", "class_dropout_prob": "label_dropout", "images": "pictures"}


def with_names_of_an_earlier_version(folder):
    """Rewrites a run as it was before some of its keys were renamed and others were added."""

    def rename(tree):
        if not isinstance(tree, dict):
            return tree
        return {OLD_NAMES.get(key, key): rename(value) for key, value in tree.items()}

    config = folder / "config.yaml"
    old = rename(yaml.safe_load(config.read_text()))
    assert {"pictures"} < old.keys()
    del old["ema"], old["class_names"], old["optim"]["ema_warmup"]  # which are of later versions
    config.write_text(yaml.safe_dump(old))
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            metadata = {**opened.metadata(), "config": json.dumps(old)}
        del metadata["crc32"]  # which earlier versions did not write
        save_file(load_file(file), file, metadata)


def test_the_command_from_start_to_finish_and_again(spiralrope, runs):
    words = (
        "dit-train",
        "--arch",
        "dit-32x2x2-2",
        "--max-steps",
        2,
        "--batch-size",
        8,
        "--out",
        "run",
    )
    first = spiralrope(*words)
    assert "samples: run/samples/0000002.png" in first.stderr
    assert "samples: run/samples.png" in first.stdout
    assert "training loss" in first.stdout
    again = spiralrope(*words)
    assert "run is finished: 2 steps" in again.stderr
    assert again.stdout == first.stdout
    with_names_of_an_earlier_version(runs / "run")
    again = spiralrope(*words)
    assert "run is finished: 2 steps" in again.stderr
    plan = spiralrope("dit-train", "--init-from", "run", "--dry-run").stderr
    assert "as pixels" in plan
    said = spiralrope("dit-train", "--init-from", "run", "--arch", "dit-s2", expect=2).stderr
    assert "--arch is dit-s2, but run is dit-32x2x2-2" in said
    assert "Traceback" not in said


def test_help_is_grouped_and_shows_examples():
    said = CliRunner().invoke(cli.app, ["dit-train", "--help"], env={"COLUMNS": "80"}).output
    for panel in ("Model", "Spiral RoPE", "Data and augmentation", "Recipe", "Run", "Machine"):
        assert f"─ {panel} ─" in said
    assert "spiralrope dit-train --rotate 2" in said
    assert "plain axial RoPE" in " ".join(said.replace("│", " ").split())


def test_a_setting_that_hardly_differs_from_axial_rope_is_said():
    *_, note = hints(resolve("pretrain", {"rotate": 4}).run)
    assert note.startswith(
        "on 4x4 patches and heads of 64 channels, rotate 4 changes queries by 6.7% against axial"
    )
    for rotate in (0, 2):
        assert hints(resolve("pretrain", {"rotate": rotate}).run) == []


def test_the_default_is_axial_and_says_so():
    note = "RoPE is axial by default, as published: --rotate 2 gives four directions"
    assert resolve("dit-train", {}).warnings == (note,)
    for options in ({"rotate": 0}, {"rotate": 2}, {"enabled": False}):
        assert resolve("dit-train", options).warnings == ()
