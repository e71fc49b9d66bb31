"""From the words of `spiralrope finetune` to its run, and the run itself on the digits."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from comparing import same_tensors
from safetensors.torch import load_file
from typer.testing import CliRunner

from spiralrope_cli import load_model
from spiralrope_cli import main as cli
from spiralrope_cli.core.config import recipes
from spiralrope_cli.core.errors import SpiralRopeError
from spiralrope_cli.core.hub.catalog import WEIGHTS_REPO
from spiralrope_cli.core.hub.source import find_source
from spiralrope_cli.core.jobs import train
from spiralrope_cli.core.jobs import train as training
from spiralrope_cli.core.load import starting_point
from spiralrope_cli.core.resolve import resolve
from spiralrope_cli.core.runtime import run_folder
from spiralrope_cli.core.runtime.distributed import StopRequest

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints"
DEIT = GOLDEN / "deit_tiny_checkpoint.pth"


@pytest.fixture
def finetune(runs, monkeypatch):
    """The run that `spiralrope finetune ...` would launch, and what was said."""
    launched = []
    monkeypatch.setattr(training, "launch", lambda job, run: launched.append(run))

    def call(*words, expect=0):
        launched.clear()
        result = CliRunner().invoke(cli.app, ["finetune", *map(str, words)])
        if isinstance(result.exception, SpiralRopeError):
            assert result.exception.exit_code == expect, result.exception
            return None, str(result.exception)
        assert result.exit_code == expect, result.output
        return (launched[0] if launched else None), " ".join(result.stderr.split())

    return call


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run of a few steps whose raw and averaged weights differ."""
    folder = tmp_path_factory.mktemp("runs") / "before"
    options = {
        **{"arch": "deit-32x2x2", "rotate": 3, "out": str(folder), "lr": 0.05, "max_steps": 4},
        **{"warmup_epochs": 0, "precision": "fp32", "nproc": 1},
    }
    train.work(resolve("pretrain", options).run)
    return folder


def small(source, **more):
    """A finetuning run of a few steps."""
    chosen = {
        **{"max_steps": 4, "batch_size": 32, "micro_batch_size": 16, "precision": "fp32"},
        **{"log_every": 2, "nproc": 1, "warmup_epochs": 0, "out": "after", **more},
    }
    start, _ = starting_point(find_source(str(source)), {})
    return resolve("finetune", chosen, start=start).run


def weights(folder, kind="model"):
    steps = sorted((Path(folder) / "checkpoints").glob("0*"))
    return load_file(steps[-1] / f"{kind}.safetensors")


def test_the_recipe_of_stage_two_on_photographs(finetune, image_folder):
    small_set = ("--batch-size", 16, "--warmup-epochs", 1, "--mixup", 0, "--cutmix", 0)
    run, _ = finetune(DEIT, "--data", image_folder, *small_set)
    augment, optim = run.augment, run.optim
    assert (optim.epochs, optim.lr, optim.min_lr, optim.peak_lr) == (20, 1e-5, 1e-5, 1e-5)
    assert (optim.weight_decay, optim.betas, optim.ema_decay) == (0.1, (0.9, 0.999), 0.99996)
    assert (augment.auto_augment, augment.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.0)
    assert (augment.smoothing, run.model.drop_path) == (0.1, 0.1)
    assert recipes.FINETUNE["batch_size"] == 512
    assert recipes.PUBLISHED_MICRO_BATCH["finetune"] == 64
    assert (recipes.FINETUNE["mixup"], recipes.FINETUNE["cutmix"]) == (0.8, 1.0)


def test_model_and_rope_come_from_the_source_and_fresh_things_are_said(finetune, image_folder):
    words = ("--batch-size", 16, "--warmup-epochs", 0, "--mixup", 0, "--cutmix", 0)
    run, said = finetune(DEIT, "--data", image_folder, "--image-size", 96, *words)
    assert (run.arch, run.rope.rotate, run.model.patch_size) == ("deit-64x2x2", 2, 16)
    assert run.model.num_classes == 2
    assert "head re-initialised: 10 -> 2 classes" in said
    assert "position embedding resampled: 64 -> 96 px" in said
    assert "averaged (EMA) weights of deit-64x2x2, rotate 2, epoch 17" in said
    # The trained range of positions is kept, as the published code itself would not.
    assert run.model.pretrain_grid == (4, 4)
    assert run.rope.scaling == "interpolate"
    assert run.out.startswith("runs/finetune-deit-64x2x2-")


def test_scaling_can_be_wanted_otherwise(finetune):
    run, _ = finetune(DEIT, "--image-size", 96, "--scaling", "extrapolate", "--max-steps", 1)
    assert run.rope.scaling == "extrapolate"
    run, _ = finetune(DEIT, "--max-steps", 1, "--name", "own")
    assert run.rope.scaling == "extrapolate"
    assert run.model.pretrain_grid is None


def test_a_rope_option_that_contradicts_the_source_is_said(finetune):
    run, said = finetune(DEIT, "--rotate", 4, "--max-steps", 1)
    assert run.rope.rotate == 4
    assert "--rotate 4 contradicts" in said


def test_a_file_of_another_run_does_not_decide_how_the_weights_are_read(finetune, pretrained, runs):
    """Its recipe is repeated on these weights, which were trained with their own options."""
    (runs / "first").mkdir()
    first = small(DEIT, out=str(runs / "first"), lr=0.125)
    run_folder.write_config(first)
    run, _ = finetune(pretrained, "--config", runs / "first" / "config.yaml")
    assert (first.rope.rotate, run.rope.rotate, run.optim.lr) == (2, 3, 0.125)


def test_a_slash_at_the_end_names_the_same_weights(finetune, pretrained):
    plain, _ = finetune(pretrained, "--max-steps", 1)
    completed, _ = finetune(f"{pretrained}/", "--max-steps", 1)
    assert plain == completed


def test_grey_weights_on_colour_pictures_take_the_mean_of_the_colours(
    finetune, pretrained, image_folder
):
    words = ("--batch-size", 16, "--warmup-epochs", 0, "--mixup", 0, "--cutmix", 0)
    run, _ = finetune(pretrained, "--data", image_folder, "--image-size", 16, *words)
    assert run.model.in_chans == 1
    assert run.augment.mean == pytest.approx(((0.485 + 0.456 + 0.406) / 3,), abs=1e-4)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ([""], 2, "SOURCE is empty"),
        (["nosuch"], 2, "nosuch is not a file, a run folder or a published name"),
        (["vae-ema"], 1, "is not a DeiT"),
        ([GOLDEN / "dit_tiny_0000007.pt"], 1, "a DiT, not a classifier"),
        ([GOLDEN / "dit_tiny_raw.pth"], 2, "does not contain its RoPE options"),
        ([DEIT, "--freeze", "all"], 2, "--freeze is all"),
        ([DEIT, "--image-size", "50"], 2, "--image-size 50 is not a multiple"),
        ([DEIT, "--rotate", "-1"], 2, "--rotate is -1"),
        ([DEIT, "--data", "nowhere"], 1, "--data nowhere is neither a folder nor"),
    ],
)
def test_bad_input_has_its_own_line(finetune, words, code, told):
    run, said = finetune(*words, expect=code)
    assert run is None
    assert told in said
    assert len(said.splitlines()) <= 2


def test_it_starts_from_the_averaged_weights(runs, pretrained):
    run = small(pretrained, lr=0.0, min_lr=0.0, weight_decay=0.0)
    assert (run.rope.rotate, run.data) == (3, "digits")
    train.work(run)
    # At a learning rate of 0 the raw weights are still those it started from.
    assert same_tensors(weights("after"), weights(pretrained, "ema"))
    assert not same_tensors(weights("after"), weights(pretrained, "model"))


def test_a_stopped_and_resumed_finetune_equals_an_uninterrupted_one(runs, pretrained, monkeypatch):
    train.work(small(pretrained, out="whole", mixup=0.8, drop_path=0.1))
    parts = small(pretrained, out="parts", mixup=0.8, drop_path=0.1)
    answers = iter([0, signal.SIGTERM])
    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "agreed", lambda *_, **__: next(answers))
        with pytest.raises(SystemExit):
            train.work(parts)
    train.work(parts)
    for kind in ("model", "ema"):
        assert same_tensors(weights("parts", kind), weights("whole", kind))


@pytest.mark.parametrize(
    ("freeze", "trained"),
    [("attn-only", ("attn.", "head.", "pos_embed")), ("head-only", ("head.",))],
)
def test_what_is_frozen_stays_bit_for_bit(runs, pretrained, freeze, trained):
    train.work(small(pretrained, freeze=freeze, lr=1e-2))
    before, after = weights(pretrained, "ema"), weights("after")
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {name for name in after if any(part in name for part in trained)}


def test_a_finetuned_run_is_a_source_again(runs, pretrained):
    train.work(small(pretrained, image_size=(12, 12)))
    model = load_model("after", ema=True)
    assert model.rope.pretrain_grid == (4, 4)
    assert model.grid == (6, 6)
    start, _ = starting_point(find_source("after"), {})
    assert start.model.pretrain_grid == (4, 4)


def test_published_weights_come_by_themselves_after_their_size_was_said(
    spiralrope, hub, tmp_path, monkeypatch
):
    file = "deit_small_patch16_LS_rms_rope/checkpoint.pth"
    hub.repos[WEIGHTS_REPO] = {file: DEIT.read_bytes()}
    monkeypatch.setenv("SPIRALROPE_CACHE", str(tmp_path / "ours"))
    dry = spiralrope("finetune", "deit-s", "--dry-run", expect=1)
    assert "the weights of deit-s are not downloaded, and --dry-run does not download" in dry.stderr
    assert not hub.asked
    done = spiralrope("finetune", "deit-s", "--max-steps", 1, "--nproc", 1)
    hub.close()
    assert "1.24 MB" in done.stderr.split("averaged (EMA) weights")[0]
    # Now it is here, and no server is asked.
    again = spiralrope("finetune", "deit-s", "--max-steps", 1, "--nproc", 1, "--dry-run")
    assert "deit-s: averaged (EMA) weights of deit-64x2x2" in " ".join(again.stderr.split())
