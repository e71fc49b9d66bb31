"""The promises of a diffusion transformer's training run, kept on the bundled digits."""

from __future__ import annotations

import json
import operator
from types import SimpleNamespace

import pytest
import torch
from comparing import relative_distance, same_tensors
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from workers import stop_at

from spiralrope_cli import load_model
from spiralrope_cli.core.config.samples import EncodeRun
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.data.batches import dit_data
from spiralrope_cli.core.diffusion.gaussian import GaussianDiffusion
from spiralrope_cli.core.diffusion.vae import load_vae
from spiralrope_cli.core.errors import CheckpointError, DataError, TrainingError
from spiralrope_cli.core.hub.source import find_source
from spiralrope_cli.core.jobs import encode, train
from spiralrope_cli.core.load import starting_point
from spiralrope_cli.core.models.dit import sincos_pos_embed
from spiralrope_cli.core.resolve import resolve
from spiralrope_cli.core.runtime import launch, run_folder
from spiralrope_cli.core.runtime.distributed import StopRequest
from spiralrope_cli.core.runtime.progress import read_metrics
from spiralrope_cli.core.training import diffusion, loop
from spiralrope_cli.core.training.step import LossMeter

CPU = torch.device("cpu")


@pytest.fixture
def tiny(runs):
    """Builds small runs on the digits: a few steps, fp32, everything random on."""

    def make(start=None, **options):
        base = {
            **{"arch": "dit-32x2x2-2", "max_steps": 6, "batch_size": 16, "micro_batch_size": 8},
            **{"precision": "fp32", "log_every": 2, "sample_every": 4, "hflip": 0.5},
            **{"class_dropout_prob": 0.5, "nproc": 1, "out": str(runs / "run")},
        }
        if start is not None:
            del base["arch"]
        return resolve("dit-train", {**base, **options}, start=start).run

    return make


def weights(folder, kind="model"):
    step = run_folder.steps_on_disk(folder)[-1]
    return load_file(run_folder.step_folder(folder, step) / f"{kind}.safetensors")


def logged(folder):
    keys = ("step", "loss", "vb", "lr", "grad_norm")
    return [tuple(line[key] for key in keys) for line in read_metrics(folder)]


def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tiny, runs, monkeypatch):
    options = {"clip_grad": 1.0, "log_every": 3}
    whole, parts = tiny(out="whole", **options), tiny(out="parts", **options)
    train.work(whole)
    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "agreed", stop_at(3))
        with pytest.raises(SystemExit) as left:
            train.work(parts)
    assert left.value.code == 143
    assert run_folder.steps_on_disk(runs / "parts") == [3]
    assert not (runs / "parts" / "samples.png").exists()
    train.work(parts)
    for kind in ("model", "ema"):
        assert same_tensors(weights(runs / "parts", kind), weights(runs / "whole", kind))
    assert not same_tensors(weights(runs / "whole", "model"), weights(runs / "whole", "ema"))
    assert [line[0] for line in logged(runs / "whole")] == [3, 6]
    assert logged(runs / "parts") == logged(runs / "whole")
    for picture in ("samples.png", "samples/0000004.png", "samples/0000006.png", "curves.png"):
        assert (runs / "whole" / picture).is_file()
    for picture in ("samples.png", "samples/0000004.png"):
        assert (runs / "parts" / picture).read_bytes() == (runs / "whole" / picture).read_bytes()


@pytest.mark.parametrize(("nproc", "micro"), [(2, 4), (1, 16)])
def test_any_split_of_a_batch_trains_the_same(tiny, runs, nproc, micro):
    same = {"max_steps": 4, "schedule": "constant"}
    train.work(tiny(out="one", **same))
    launch.launch(train.work, tiny(out="other", nproc=nproc, micro_batch_size=micro, **same))
    for kind in ("model", "ema"):
        assert relative_distance(weights(runs / "other", kind), weights(runs / "one", kind)) < 1e-5
    for mine, its in zip(logged(runs / "other"), logged(runs / "one"), strict=True):
        assert mine == pytest.approx(its, rel=1e-4)
    # The same comparison tells another seed, so that it could have failed above.
    train.work(tiny(out="control", seed=1, **same))
    control = weights(runs / "control")
    assert relative_distance(control, weights(runs / "one")) > 1e-2


def test_the_sample_grid_is_drawn_from_averaged_weights_and_fixed_noise(tiny, runs, monkeypatch):
    drawn = []
    samples = diffusion.grid_samples

    def spy(config, ctx, model):
        drawn.append(model)
        return samples(config, ctx, model)

    monkeypatch.setattr(diffusion, "grid_samples", spy)
    # Without a learning rate the weights stay, and so must the picture.
    train.work(tiny(lr=0.0, schedule="constant"))
    first, last = (runs / "run" / "samples" / f"000000{step}.png" for step in (4, 6))
    assert first.read_bytes() == last.read_bytes()
    with Image.open(runs / "run" / "samples.png") as grid:
        assert grid.mode == "RGB"
        assert grid.size == (10 * 66 + 2, 4 * 66 + 2)
    assert len(drawn) == 2
    assert not any(p.requires_grad for p in drawn[0].parameters())


def test_what_is_random_belongs_to_the_sample_and_not_to_the_process(tiny):
    run = tiny(hflip=0.5)
    whole = next(dit_data(run, CPU, 0, 1).train_steps(3, 4))
    halves = [next(dit_data(run, CPU, rank, 2).train_steps(3, 4)) for rank in (0, 1)]
    for name in ("images", "labels", "at.indices"):
        get = operator.attrgetter(name)
        one = torch.cat([torch.as_tensor(get(batch)) for batch in whole])
        two = torch.cat([torch.as_tensor(get(batch)) for half in halves for batch in half])
        assert torch.equal(one, two)
    plain = next(dit_data(tiny(hflip=0.0), CPU, 0, 1).train_steps(3, 4))
    mirrored = next(dit_data(tiny(hflip=1.0), CPU, 0, 1).train_steps(3, 4))
    assert torch.equal(plain[0].images.flip(-1), mirrored[0].images)
    some = [torch.equal(a, b) for a, b in zip(whole[0].images, plain[0].images, strict=True)]
    assert 0 < sum(some) < len(some)
    assert plain[0].images.min() == -1
    assert plain[0].images.max() == 1


def test_a_finished_run_that_lost_its_pictures_draws_them_again(tiny, runs):
    train.work(tiny())
    before = (runs / "run" / "samples.png").read_bytes()
    for name in ("samples.png", "curves.png"):
        (runs / "run" / name).unlink()
    train.work(tiny())
    assert (runs / "run" / "samples.png").read_bytes() == before
    assert (runs / "run" / "curves.png").exists()


def test_what_a_run_writes_is_read_by_load_model(tiny, runs):
    train.work(tiny(rotate=2, class_dropout_prob=0.1, qk_norm=True))
    model = load_model(runs / "run", ema=True)
    assert (model.grid, model.num_classes, model.in_chans) == ((4, 4), 10, 1)
    assert same_tensors(dict(model.state_dict()), weights(runs / "run", "ema"))
    with safe_open(runs / "run/checkpoints/0000006/ema.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    assert config["rope"]["rotate"] == 2
    assert config["model"]["input_size"] == [8, 8]


def test_init_starts_from_averaged_weights_and_keeps_what_fits(tiny, runs):
    train.work(tiny(out="first", rotate=3, lr=1e-2, ema_warmup=False))
    start, notes = starting_point(find_source(str(runs / "first")), {}, dit=True)
    assert len(notes) == 1
    assert "of the EMA weights" in notes[0]
    assert "6 steps were few for a decay of 0.995" in notes[0]
    same = tiny(start, out="same", max_steps=1, lr=0.0, schedule="constant")
    assert (same.arch, same.rope.rotate, same.data) == ("dit-32x2x2-2", 3, "digits")
    train.work(same)
    assert same_tensors(weights(runs / "same"), weights(runs / "first", "ema"))


def test_init_gives_other_classes_a_fresh_label_table(tiny, runs, image_folder):
    on_files = {"data": str(image_folder), "image_size": (8, 8), "vae": "none", "workers": 0}
    train.work(tiny(out="two", max_steps=1, **on_files))
    start, _ = starting_point(find_source(str(runs / "two")), {}, dit=True)
    third = image_folder.parent / "three"
    for number in range(3):
        folder = third / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(8):
            Image.new("RGB", (20, 20), (80 * number, 0, index)).save(folder / f"{index}.png")
    run = tiny(start, out="three", max_steps=1, lr=0.0, schedule="constant", data=str(third))
    assert run.model.num_classes == 3
    assert "label table re-initialised: 2 -> 3 classes" in train.plan_rows(run, 0)["start"]
    train.work(run)
    before, after = weights(runs / "two", "ema"), weights(runs / "three")
    table = "y_embedder.embedding_table.weight"
    assert after[table].shape == (4, 32)
    assert all(torch.equal(before[name], after[name]) for name in before if name != table)


def test_init_without_rope_takes_another_size_with_its_own_fixed_positions(tiny, runs):
    train.work(tiny(out="first", enabled=False, max_steps=1))
    start, _ = starting_point(find_source(str(runs / "first")), {}, dit=True)
    run = tiny(start, out="wide", max_steps=1, lr=0.0, schedule="constant", image_size=(8, 12))
    assert "fixed positions recomputed" in train.plan_rows(run, 0)["start"]
    train.work(run)
    before, after = weights(runs / "first", "ema"), weights(runs / "wide")
    assert torch.equal(after["pos_embed"], sincos_pos_embed((4, 6), 32))
    assert all(torch.equal(before[n], after[n]) for n in before if n != "pos_embed")


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_batch(tiny, runs, monkeypatch):
    step = loop.train_step

    def explode(state, *rest, **more):
        if state.step == 3:
            with torch.no_grad():
                state.model.final_layer.linear.weight.fill_(float("inf"))
        return step(state, *rest, **more)

    monkeypatch.setattr(loop, "train_step", explode)
    with pytest.raises(TrainingError, match="not finite at step 4; step 2 is the last good"):
        train.work(tiny(save_every=2, sample_every=0))
    (offending,) = (runs / "run" / "checkpoints").glob("nonfinite-*")
    assert torch.load(offending, weights_only=True)["images"].shape == (16, 1, 8, 8)


def test_resuming_with_other_options_is_refused(tiny, runs):
    (runs / "run" / "checkpoints" / "0000002").mkdir(parents=True)
    run_folder.write_config(tiny())
    for options, told in (
        ({"rotate": 4}, "--rotate was 0, now 4"),
        ({"class_dropout_prob": 0.2}, "--class-dropout-prob was 0.5, now 0.2"),
        ({"hflip": 0.25}, "--hflip was 0.5, now 0.25"),
    ):
        with pytest.raises(CheckpointError, match=told):
            run_folder.first_step(tiny(**options))
    assert run_folder.first_step(tiny(sample_every=7, micro_batch_size=4)) == 2


def test_image_folders_are_plain_or_hold_train(tiny, image_folder):
    options = {"data": str(image_folder), "image_size": (8, 8), "vae": "none", "workers": 0}
    run = tiny(max_steps=1, hflip=0.0, **options)
    assert (run.num_train, run.model.num_classes, run.model.in_chans) == (16, 2, 3)
    (batch, _) = next(dit_data(run, CPU, 0, 1).train_steps(0, 1))
    assert batch.images.shape == (8, 3, 8, 8)
    assert batch.images.abs().max() <= 1
    plain = tiny(max_steps=1, hflip=0.0, **{**options, "data": str(image_folder / "train")})
    (other, _) = next(dit_data(plain, CPU, 0, 1).train_steps(0, 1))
    assert torch.equal(batch.images, other.images)


def test_nothing_waits_for_the_device_between_log_points(tiny, monkeypatch):
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
    train.work(tiny(max_steps=8, log_every=4, sample_every=0))
    assert {when for when, _ in waits if when} <= {4, 8}


@pytest.fixture
def on_photographs(tiny, image_folder, tiny_vae):
    """Runs of four steps on image files at 32 px, through a VAE of random weights."""

    def make(**options):
        base = {"arch": "dit-32x2x2-2", "vae": str(tiny_vae), "data": str(image_folder)}
        more = {"image_size": (32, 32), "max_steps": 4, "workers": 0, "schedule": "constant"}
        return tiny(**{**base, **more, **options})

    return make


def test_cached_latents_train_as_the_vae_in_the_loop_does(
    on_photographs, tiny, runs, image_folder, tiny_vae
):
    of_encode = EncodeRun(
        data=str(image_folder),
        vae=str(tiny_vae),
        image_size=(32, 32),
        machine=MachineConfig(precision="fp32", workers=0),
        out=str(runs / "latents"),
    )
    encode.work(of_encode, encode.settle(of_encode))
    live = on_photographs(out="live")
    cached = tiny(out="cached", latents="latents", max_steps=4, schedule="constant")
    assert cached.model == live.model
    assert (cached.num_train, cached.images.vae) == (16, str(tiny_vae))
    train.work(live)
    train.work(cached)
    for kind in ("model", "ema"):
        assert (
            relative_distance(weights(runs / "cached", kind), weights(runs / "live", kind)) < 1e-5
        )
    for mine, its in zip(logged(runs / "cached"), logged(runs / "live"), strict=True):
        assert mine == pytest.approx(its, rel=1e-4)
    for folder in ("live", "cached"):
        with Image.open(runs / folder / "samples.png") as grid:
            assert grid.size == (2 * 66 + 2, 4 * 66 + 2)
    # Every epoch draws from the posterior anew: two steps are two epochs here.
    launch.launch(
        train.work, tiny(out="two", latents="latents", nproc=2, max_steps=4, schedule="constant")
    )
    assert relative_distance(weights(runs / "two"), weights(runs / "cached")) < 1e-5
    (shard,) = (runs / "latents").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-3] ^= 16
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"00000.safetensors is damaged"):
        train.work(tiny(out="damaged", latents="latents", max_steps=4))


def test_a_grid_whose_vae_is_not_here_is_one_line():
    said: list[str] = []
    config = SimpleNamespace(images=SimpleNamespace(latents="latents", vae="ema"))
    state = SimpleNamespace(ema=SimpleNamespace(module=nn.Identity()))
    ctx, reporter = SimpleNamespace(is_first=True), SimpleNamespace(say=said.append)
    diffusion.save_grid(config, ctx, None, lambda name: None, state, reporter)
    assert said == ["no samples: the VAE ema is not downloaded, so they cannot be decoded"]


def test_the_posterior_is_drawn_anew_for_every_sample(on_photographs, tiny_vae):
    run = on_photographs()
    vae = load_vae(tiny_vae, CPU)
    loss = diffusion.DiffusionLoss(
        run, CPU, torch.float32, vae, vae.scale, GaussianDiffusion(), LossMeter(CPU)
    )
    (first, _) = next(dit_data(run, CPU, 0, 1).train_steps(0, 1))
    one, again, other = (loss.clean(step, first) for step in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    mean, std = vae.encode(first.images)
    assert ((one / vae.scale - mean) / std).std() == pytest.approx(1, abs=0.2)


def test_grey_pictures_in_memory_go_through_a_vae_in_three_channels(tiny, tiny_vae):
    run = tiny(data="digits", vae=str(tiny_vae), image_size=(32, 32))
    assert run.model.in_chans == 4
    (first, _) = next(dit_data(run, CPU, 0, 1).train_steps(0, 1))
    assert first.images.shape == (8, 3, 32, 32)
    assert torch.equal(first.images[:, 0], first.images[:, 2])
