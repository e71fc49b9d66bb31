"""Words to config: every option arrives, and what cannot work is told in a line or two."""

from __future__ import annotations

import re
import shutil
import typing
from dataclasses import is_dataclass

import pytest
import yaml
from conftest import options_of
from typer.testing import CliRunner

from spiralrope_cli import main as cli
from spiralrope_cli.core.config import datasets, recipes
from spiralrope_cli.core.config.models import RopeConfig
from spiralrope_cli.core.config.option import leaves, to_nested
from spiralrope_cli.core.config.runs import ClassifierRun
from spiralrope_cli.core.errors import ConfigError, DataError, SpiralRopeError
from spiralrope_cli.core.jobs import train as training
from spiralrope_cli.core.resolve import resolve
from spiralrope_cli.core.training.advice import hints

NOT_FIELDS = {"config", "name", "dry_run", "slurm"}
TOGETHER = {"nnodes": ["--nnodes", "2", "--rdzv-endpoint", "host:1"]}


@pytest.fixture
def resolved(runs, monkeypatch):
    """Runs the command up to the launch, and gives the run that would be launched."""
    launched = []
    monkeypatch.setattr(training, "launch", lambda job, run: launched.append(run))

    def call(*words):
        launched.clear()
        result = CliRunner().invoke(cli.app, ["pretrain", *map(str, words)])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return launched[0]

    return call


def test_options_and_fields_have_the_same_names():
    options = options_of("pretrain")
    assert options - set(leaves(ClassifierRun)) == NOT_FIELDS


def test_finetune_has_the_options_of_pretrain_but_for_what_its_source_decides():
    of_pretrain, of_finetune = options_of("pretrain"), options_of("finetune")
    assert of_pretrain - of_finetune == {"patch_size"}
    assert of_finetune - of_pretrain == {"source", "ema", "freeze"}


def test_field_names_are_unique_over_all_groups():
    groups = [g for g in typing.get_type_hints(ClassifierRun).values() if is_dataclass(g)]
    names = [name for group in groups for name in leaves(group)]
    assert len(names) == len(set(names)) > 50


def test_machines_need_a_meeting_place(resolved):
    run = resolved(*TOGETHER["nnodes"])
    assert (run.machine.nnodes, run.machine.rdzv_endpoint) == (2, "host:1")
    with pytest.raises(ConfigError, match="without --rdzv-endpoint"):
        resolved("--nnodes", 2)


def test_defaults_are_in_one_place(resolved):
    run = resolved()
    assert (run.arch, run.data, run.rope) == ("deit-ti", "digits", RopeConfig())
    assert run.out == "runs/pretrain-deit-ti-digits-r2"
    assert recipes.PRETRAIN["rotate"] == RopeConfig().rotate
    assert resolved("--arch", "deit-s").optim == run.optim
    assert resolved("--no-rope", "--name", "b").out == "runs/pretrain-deit-ti-digits-norope-b"


def test_the_published_recipe_on_photographs(runs, image_folder, resolved):
    run = resolved("--data", image_folder, "--batch-size", 8, "--warmup-epochs", 0)
    assert run.arch == "deit-b"
    assert run.model.image_size == (224, 224)
    assert run.model.drop_path == 0.1
    assert run.augment.auto_augment == "3a"
    assert run.augment.color_jitter == 0.3
    assert (run.augment.mixup, run.augment.cutmix, run.augment.smoothing) == (0.8, 1.0, 0.1)
    assert run.optim.peak_lr == 2e-4 * 8 / 512
    assert run.optim.betas == (0.9, 0.95)
    large = resolved(
        "--data", image_folder, "--arch", "deit-l", "--batch-size", 8, "--warmup-epochs", 0
    )
    assert large.model.drop_path == 0.4


@pytest.mark.parametrize("command", ["pretrain", "finetune", "dit-train"])
def test_the_average_is_warmed_up_where_no_published_run_is_repeated(command, resolved):
    published, own = (recipes.recipe(command, "deit-b", classes) for classes in (1000, 10))
    assert not published["ema_warmup"]
    assert {**published, "ema_warmup": True} == own
    assert resolved().optim.ema_warmup
    assert not resolved("--no-ema-warmup").optim.ema_warmup


def test_the_data_folder_can_come_from_the_environment(monkeypatch, image_folder, resolved):
    monkeypatch.setenv("SPIRALROPE_DATA", str(image_folder))
    run = resolved("--batch-size", 8, "--warmup-epochs", 0)
    assert run.data == str(image_folder)
    assert resolved("--data", "digits").data == "digits"


def test_a_config_file_repeats_a_run_and_options_win(runs, resolved):
    first = resolved("--rotate", 4, "--lr", 0.5, "--epochs", 7, "--image-size", "12x8")
    path = runs / "kept.yaml"
    path.write_text(yaml.safe_dump(to_nested(first)))
    assert resolved("--config", path) == first
    other = resolved("--config", path, "--rotate", 1)
    assert other.rope.rotate == 1
    assert other.optim == first.optim
    assert other.out == "runs/pretrain-deit-ti-digits-r1"


def test_names_in_any_script_make_folders_of_their_own(resolved, runs):
    assert resolved("--name", "猫").out.endswith("-猫")
    assert resolved("--name", "a/b c").out.endswith("-a-b-c")


def test_epochs_win_over_the_steps_of_a_file(runs, resolved):
    path = runs / "kept.yaml"
    path.write_text(yaml.safe_dump(to_nested(resolved("--max-steps", 4))))
    assert resolved("--config", path).total_steps == 4
    run = resolved("--config", path, "--epochs", 7)
    assert run.total_steps == 7 * run.steps_per_epoch


def test_a_short_run_has_a_short_warm_up(resolved):
    assert resolved("--max-steps", 10).optim.warmup_epochs == 0
    assert resolved("--max-steps", 352).optim.warmup_epochs == 2
    assert resolved("--max-steps", 900).optim.warmup_epochs == resolved().optim.warmup_epochs


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("optim: {epochz: 3}", "did you mean 'epochs'"),
        ("rope: {rotate: two}", "--rotate is two; it must be a whole number, 0 or more"),
        ("arch: 5", "--arch is 5; it must be a text"),
        ("augment: {mean: 0.5}", "mean is 0.5; it must be a list, each a number"),
        ("model: {image_size: wide}", "--image-size is wide; it must be a side, as 224, or HxW"),
        ("image_size: [8, 8]", "it belongs in the group model:"),
        ("source: runs/before", "spiralrope finetune runs/before --config"),
        ("optim: 3", "must hold a group"),
        ("- a", "is not a config of a run"),
        ("a: [", "is not YAML"),
        ("model: {image_size: [8, 8, 8]}", "--image-size is"),
    ],
)
def test_a_config_file_is_read_strictly(runs, resolved, text, told):
    path = runs / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        resolved("--config", path)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--arch", "deit-xs"], "did you mean deit-s?"),
        (["--rotate", "-1"], "--rotate is -1; it must be a whole number, 0 or more"),
        (["--truncate-percentage", "1"], "--truncate-percentage is 1.0; it must be in [0, 1)"),
        (["--theta", "1"], "--theta is 1.0; it must be above 1"),
        (["--min-freq-lang", "2"], "--min-freq-lang is 2.0"),
        (["--freqs-for", "words"], "must be lang or pixel"),
        (["--same-theta", "--rotate", "3"], "--rotate 3 with --same-theta does not fit"),
        (["--image-size", "9"], "the nearest multiple: 8"),
        (["--batch-size", "50", "--micro-batch-size", "16"], "the nearest that do: 48, 64"),
        (["--batch-size", "2000"], "more than the 1437 training images"),
        (["--mixup", "1", "--micro-batch-size", "4"], "must be a multiple of 8"),
        (["--drop-path", "1"], "--drop-path is 1.0"),
        (["--smoothing", "-0.1"], "--smoothing is -0.1"),
        (["--lr", "inf"], "--lr is inf; it must be 0 or more, and finite"),
        (["--out", "x", "--name", "y"], "--name y and --out x both name the run folder"),
        (["--schedule", "linear"], "must be cosine, constant or published"),
        (["--epochs", "0"], "--epochs is 0"),
        (["--warmup-epochs", "400"], "as long as the whole run"),
        (["--precision", "fp16"], "must be auto, bf16, tf32 or fp32"),
        (["--auto-augment", "5a"], "--auto-augment is 5a; it must be none, 3a"),
        (["--auto-augment", "3a"], "works on photographs"),
        (["--crop-ratio", "1.5"], "--crop-ratio is 1.5"),
        (["--tracker", "wandb"], "pip install 'spiralrope[wandb]'"),
        (["--resume", "perhaps"], "must be auto, must or never"),
        (["--resume", "must"], "holds no checkpoint"),
        (["--rdzv-endpoint", "host:abc"], "it must be HOST:PORT"),
        (["--schedule", "published", "--max-steps", "500"], "counts epochs, not --max-steps"),
        (["--data", "~nosuchuser/x"], "is neither a folder nor a built-in name"),
    ],
)
def test_what_cannot_work_is_told(resolved, monkeypatch, words, told):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SpiralRopeError) as refused:
        resolved(*words)
    assert told in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 2


def test_data_folders_that_cannot_work(tmp_path, image_folder, resolved):
    def told(folder):
        with pytest.raises(DataError) as refused:
            resolved("--data", folder)
        return str(refused.value)

    assert "is neither a folder nor a built-in name" in told(tmp_path / "nowhere")
    assert "has no train/ and no val/" in told(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    assert "has no class folders" in told(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "cats").mkdir()
    assert "cats holds no images" in told(tmp_path)
    whole = tmp_path / "whole"
    shutil.copytree(image_folder, whole)
    shutil.rmtree(whole / "val" / "light")
    assert f"1 class folder(s) only in {whole}/train: light" in told(whole)


def test_an_unreadable_image_is_named_or_skipped_and_counted(tmp_path, image_folder, spiralrope):
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    (data / "val" / "light" / "broken.jpg").write_text("no picture")
    (data / "train" / "dark" / "0.png").write_bytes(b"\x89PNG cut off")
    words = (
        *("pretrain", "--arch", "deit-ti", "--data", data, "--image-size", 16, "--patch-size", 8),
        *("--batch-size", 8, "--warmup-epochs", 0, "--epochs", 1, "--workers", 0, "--mixup", 0),
    )
    said = spiralrope(*words, expect=1).stderr
    assert "0.png cannot be read" in said
    assert "--skip-bad" in said
    assert "Traceback" not in said
    done = spiralrope(*words, "--skip-bad", "--name", "skipping")
    assert "2 image(s) could not be read and were skipped" in done.stderr
    assert "broken.jpg" in done.stderr
    assert re.search(r"  10 +$", done.stdout, re.MULTILINE), (
        "the broken one of 11 must not be counted"
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"freqs_for": "pixel", "theta": 5.0}, "--theta has no effect: --freqs-for is pixel"),
        ({"max_freq": 5.0}, "--max-freq has no effect: --freqs-for is lang"),
        ({"rotate": 0, "min_freq_lang": 1.0}, "--min-freq-lang has no effect"),
        ({"rotate": 0, "truncate_percentage": 0.5}, "--truncate-percentage has no effect"),
        ({"enabled": False, "rotate": 4, "seed": 3}, "--rotate has no effect: RoPE is off"),
        ({"crop_scale": 0.5}, "--crop-scale has no effect: --geometry is shift"),
        ({"geometry": "crop", "translate": 2.0}, "--translate has no effect: --geometry is crop"),
        ({"max_steps": 900, "epochs": 9}, "--epochs has no effect: --max-steps is given"),
        ({"schedule": "constant", "min_lr": 1.0}, "--min-lr has no effect"),
        ({"workers": 3}, "--workers has no effect: digits is kept in memory"),
    ],
)
def test_options_that_cannot_act_are_a_note(options, told):
    assert [told in warning for warning in resolve("pretrain", options).warnings] == [True]


def test_elongated_grids_are_told_of_the_exact_projection():
    long = resolve("pretrain", {"image_size": (14, 56)}).run
    assert "--projection exact clamps none" in hints(long)[0]
    assert not hints(resolve("pretrain", {}).run)


def test_more_directions_than_channels_are_told(resolved):
    assert "heads of 64 channels support at most 8" in hints(resolved("--rotate", 9))[0]
    assert len(hints(resolved("--rotate", 8, "--projection", "exact"))) == 1


def test_notes_and_plan_go_to_stderr_and_the_world_stays_as_it_was(spiralrope, runs):
    done = spiralrope("pretrain", "--max-freq", 5, "--dry-run")
    assert "note: --max-freq has no effect" in done.stderr
    assert done.stdout == ""
    assert not list(runs.iterdir())


def test_the_plan_says_what_was_settled_and_why(spiralrope, runs):
    plan = spiralrope("pretrain", "--arch", "deit-s", "--nproc", 2, "--dry-run").stderr
    for part in (
        "runs/pretrain-deit-s-digits-r2",
        "1437 training and 360 validation images, 10 classes",
        "21.31 M parameters",
        "GFLOPs per image",
        "K = 4 directions, every 45 degrees",
        "2 process(es)",
        "/512 =",
        "steps, 44 per epoch",
        "by option",
        "by data set",
        "by recipe",
    ):
        assert part in plan
    assert not (runs / "runs").exists()


@pytest.mark.parametrize(("option", "code"), [("--name", 1), ("--data", 1), ("--config", 2)])
def test_what_the_system_refuses_about_a_path_is_one_line(spiralrope, option, code):
    said = spiralrope("pretrain", option, "x" * 300, "--max-steps", 1, expect=code).stderr
    assert "File name too long" in said
    assert "Traceback" not in said


def test_the_folder_of_a_run_is_as_a_shell_would_read_it(resolved, monkeypatch, runs):
    monkeypatch.setenv("HOME", str(runs))
    assert resolved("--out=~/kept").out == str(runs / "kept")
    with pytest.raises(ConfigError, match="--out is empty\ngive a value"):
        resolved("--out", "")


def test_a_rate_that_only_rises_is_told(resolved):
    run = resolved("--lr", 1e-5)
    assert "rises to the end: its peak of 6.25e-07 is below --min-lr 1e-05" in " ".join(hints(run))
    assert not hints(resolved())


@pytest.mark.parametrize("command", ["pretrain", "dit-train"])
def test_images_whose_positions_fill_the_memory_are_refused(spiralrope, command):
    told = spiralrope(command, "--image-size", 400_000, "--dry-run", expect=1).stderr
    assert "needed for 40,000,000,000 patches per image" in told


def test_names_are_shown_as_they_are_however_long(spiralrope, runs):
    name = f"{'deep/' * 20}a [red] and [/b] name"
    words = ("pretrain", "--arch", "deit-32x1x1", "--max-steps", 1, "--out", name)
    narrow = {"COLUMNS": "80"}
    for done in (spiralrope(*words, env=narrow), spiralrope(*words, env=narrow)):  # then finished
        assert f"report: {name}/report.html" in done.stdout
        assert "…" not in done.stderr
    plan = spiralrope(*words, "--dry-run", env={"COLUMNS": "300"})
    assert name in plan.stderr


def test_help_is_grouped_and_shows_examples():
    said = CliRunner().invoke(cli.app, ["pretrain", "--help"], env={"COLUMNS": "80"}).output
    for panel in ("Model", "Spiral RoPE", "Data and augmentation", "Recipe", "Run", "Machine"):
        assert f"─ {panel} ─" in said
    assert "spiralrope pretrain --arch deit-s --rotate 2" in said


def test_usage_errors_have_their_code(spiralrope):
    assert "no such option" in spiralrope("pretrain", "--rotat", 1, expect=2).stderr
    told = spiralrope("pretrain", "--image-size", "big", expect=2).stderr
    assert told == "error: --image-size is big; it must be a side, as 224, or HxW, as 224x448\n"
    assert spiralrope("pretrain", "--rotate", "x", expect=2).stderr.startswith(
        "error: --rotate is x;"
    )
    assert "error: --arch x" in spiralrope("pretrain", "--arch", "x", expect=2).stderr
    assert spiralrope("--version").stdout.startswith("spiralrope 0.")


def test_every_data_set_has_a_complete_recipe():
    for data_set in datasets.BUILT_IN.values():
        run = resolve("pretrain", {"data": data_set.data}).run
        assert run.model.num_classes == data_set.num_classes
        assert run.augment.hflip == 0 or data_set.data != "digits", "a mirrored digit is another"


def test_the_command_is_registered():
    assert "pretrain" in {c.name for c in cli.app.registered_commands}
