"""What a recipe gives is fitted to small sets and short runs; what works, or was given, is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from spiralrope_cli.core.config import recipes
from spiralrope_cli.core.config.recipes import fitted_batch, usual_micro_batch
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.resolve import resolve


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A folder of 60 training images."""
    root = tmp_path_factory.mktemp("few")
    for split, count in (("train", 30), ("val", 2)):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (4, 4)).save(root / split / name / f"{number}.png")
    return str(root)


def settled(command="pretrain", **options):
    resolved = resolve(command, options)
    return resolved.run, [note for note in resolved.warnings if "not the recipe's" in note]


def test_a_small_set_trains_by_the_recipe_without_any_option(few):
    run, notes = settled(data=few)
    optim = run.optim
    assert (optim.batch_size, optim.warmup_epochs, run.steps_per_epoch) == (8, 20, 7)
    assert optim.peak_lr == 2e-4 > optim.min_lr
    assert notes == [
        "--batch-size 8, not the recipe's 4096: the set has 60 images",
        "--lr-rule none, not the recipe's linear: a batch of 8 would leave little of --lr",
    ]
    assert run.split_batch(1) == (8, 1)  # whole mixing groups
    origins = resolve("pretrain", {"data": few}).sources
    assert [origins[name] for name in ("batch_size", "lr_rule", "lr")] == ["fit", "fit", "recipe"]
    run, notes = settled("dit-train", data=few, vae="none", image_size=(32, 32))
    assert (run.optim.batch_size, len(notes)) == (8, 1)


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 0), (3, 0), (4, 3), (50, 3)])
def test_a_short_run_has_a_short_warm_up_and_longer_ones_keep_theirs(epochs, warmup):
    run, notes = settled(epochs=epochs)
    assert run.optim.warmup_epochs == warmup
    assert len(notes) == (warmup == 0)


def test_a_run_of_a_few_steps_says_that_its_warm_up_is_short():
    assert settled(max_steps=10)[1] == [
        "--warmup-epochs 0, not the recipe's 3: the run has 10 steps, 44 per epoch"
    ]
    assert settled("dit-train", max_steps=10)[0].optim.warmup_epochs == 0


def test_a_batch_is_split_into_equal_parts_where_the_recipe_says_how():
    for command, batch, processes, size in (
        ("pretrain", 32, 1, 32),
        ("pretrain", 50, 1, 25),
        ("pretrain", 64, 1, 32),
        ("pretrain", 8, 1, 32),
        ("pretrain", 96, 2, 24),
        ("pretrain", 101, 1, 32),  # which is then refused
        ("dit-train", 64, 1, 64),
    ):
        run, notes = settled(command, batch_size=batch)
        assert (usual_micro_batch(run, processes), notes) == (size, [])


def test_the_published_runs_have_their_micro_batches(monkeypatch):
    run, _ = settled()
    monkeypatch.setattr(recipes, "BUILT_IN", {})
    for command, size in (("pretrain", 256), ("finetune", 64), ("dit-train", 32)):
        of_paper = replace(run, command=command, optim=replace(run.optim, batch_size=1024))
        assert usual_micro_batch(of_paper, 1) == size


def test_what_the_user_gave_is_kept_and_told_at_once_where_it_cannot_work(few):
    with pytest.raises(ConfigError) as refused:
        resolve("pretrain", {"data": few, "batch_size": 99, "warmup_epochs": 400})
    assert "--batch-size 99 is more than the 60" in refused.value.message
    assert "--warmup-epochs 400 is as long" in refused.value.message
    with pytest.raises(ConfigError) as refused:
        resolve("pretrain", {"epochs": 0, "lr": "fast", "rotate": 2, "mixup": -1.0})
    lines = refused.value.message.splitlines()
    assert {line.split(" is ")[0] for line in lines} == {"--epochs", "--lr", "--mixup"}
    run, notes = settled(data=few, batch_size=16, warmup_epochs=0)
    assert (run.optim.lr_rule, notes) == ("linear", [])


@pytest.mark.parametrize(
    ("images", "batch"), [(1, 1), (3, 2), (9, 8), (60, 8), (100, 16), (1000, 128), (4000, 512)]
)
def test_a_fitted_batch_leaves_an_epoch_several_steps(images, batch):
    assert fitted_batch(images) == batch
