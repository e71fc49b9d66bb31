"""Weights of any origin load as what they are, or are refused in a line."""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
from pathlib import Path

import pytest
import torch
from comparing import same_tensors
from safetensors.torch import load_file, save_file

from spiralrope_cli import RopeConfig, create_model, load_model
from spiralrope_cli.core.errors import CheckpointError, ConfigError
from spiralrope_cli.core.hub.source import find_source
from spiralrope_cli.core.load import build_network, load_pretrained, starting_point
from spiralrope_cli.core.weights import read_weights

GOLDEN = Path(__file__).parents[1] / "golden"
DEIT = GOLDEN / "checkpoints" / "deit_tiny_checkpoint.pth"
DIT = GOLDEN / "checkpoints" / "dit_tiny_0000007.pt"
BARE = GOLDEN / "checkpoints" / "dit_tiny_raw.pth"
EXPECTED = load_file(GOLDEN / "checkpoints" / "expected.safetensors")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def published(path=DEIT, **changes):
    """The content of a golden file, with changes."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return {**torch.load(path, weights_only=True), **changes}


@pytest.mark.parametrize(("ema", "kind"), [(False, "model"), (True, "ema")])
def test_a_published_deit_gives_the_golden_logits(ema, kind):
    model = load_model(DEIT, ema=ema)
    images = load_file(GOLDEN / "deit" / "deit_tiny_io.safetensors")["images"]
    assert not model.training
    torch.testing.assert_close(model(images), EXPECTED[f"deit_logits_{kind}"], **TOLERANCE)


@pytest.mark.parametrize(("ema", "kind"), [(False, "model"), (True, "ema")])
def test_a_published_dit_gives_the_golden_output(ema, kind):
    given = load_file(GOLDEN / "dit" / "dit_rope_io.safetensors")
    out = load_model(str(DIT), ema=ema)(given["x"], given["t"], given["y"])
    torch.testing.assert_close(out, EXPECTED[f"dit_out_{kind}"], **TOLERANCE)


def test_a_bare_state_dict_needs_its_options_and_gives_its_one_set():
    with pytest.raises(ConfigError, match="does not contain its RoPE options") as refused:
        load_model(BARE)
    assert "--rotate" in refused.value.hint
    given = load_file(GOLDEN / "dit" / "dit_rope_io.safetensors")
    rope = RopeConfig(rotate=2, scaling="extrapolate")
    with pytest.warns(UserWarning, match="only one set of weights"):
        model = load_model(BARE, ema=True, rope=rope)
    out = model(given["x"], given["t"], given["y"])
    torch.testing.assert_close(out, EXPECTED["dit_out_ema"], **TOLERANCE)


def test_sizes_come_from_the_tensors_and_options_from_args():
    weights = read_weights(find_source(str(DEIT)))
    assert weights.arch == "deit-64x2x2"
    assert weights.options["image_size"] == (64, 64)  # args name a 224 px model of width 768
    assert weights.rope == RopeConfig(rotate=2, scaling="extrapolate")
    assert weights.progress == "epoch 17"
    assert read_weights(find_source(str(DIT))).arch == "dit-72x2x3-2"


def with_rope(path, kind, **more):
    """A plain state dict of a small DeiT with the RoPE of a kind."""
    torch.manual_seed(0)
    model = create_model("deit-32x2x2", rope=RopeConfig(rope_kind=kind), **SMALL)
    torch.save(model.state_dict(), path)
    return model


SMALL = {"image_size": 16, "patch_size": 4, "num_classes": 5}


def test_learned_frequencies_say_the_kind_and_the_heads(tmp_path):
    model = with_rope(tmp_path / "mixed.pth", "mixed")
    weights = read_weights(find_source(str(tmp_path / "mixed.pth")))
    assert (weights.arch, weights.rope.rope_kind) == ("deit-32x2x2", "mixed")
    assert same_tensors(build_network(weights).state_dict(), model.state_dict())
    with pytest.raises(ConfigError, match="--rotate 2 does not fit --rope-kind mixed"):
        read_weights(find_source(str(tmp_path / "mixed.pth")), rope={"rotate": 2})
    spiral = {"rope_kind": "spiral"}
    other = read_weights(find_source(str(tmp_path / "mixed.pth")), rope=spiral)
    with pytest.raises(CheckpointError, match=r"1 unexpected \(rope.freqs\)") as refused:
        build_network(other)
    assert str(refused.value).endswith(": leave --rope-kind out")


@pytest.mark.parametrize(("before", "now"), [("mixed", "spiral"), ("spiral", "mixed")])
def test_training_starts_from_weights_of_another_kind(tmp_path, before, now):
    old = with_rope(tmp_path / "old.pth", before)
    rope = {"rope_kind": now}
    weights = read_weights(find_source(str(tmp_path / "old.pth")), rope=rope, arch="deit-32x2x2")
    torch.manual_seed(1)
    new = create_model("deit-32x2x2", rope=weights.rope, **SMALL)
    fresh = {n: v.clone() for n, v in new.state_dict().items() if n == "rope.freqs"}
    load_pretrained(weights, new)
    kept = {n: v for n, v in old.state_dict().items() if n != "rope.freqs"}
    assert same_tensors(new.state_dict(), {**new.state_dict(), **kept, **fresh})
    assert len(fresh) == (now == "mixed")


def test_an_option_wins_over_the_file_and_contradiction_is_told():
    weights = read_weights(find_source(str(DEIT)), rope={"rotate": 4, "max_freq_lang": 1.5})
    assert weights.rope.rotate == 4
    message = weights.notes[0]
    assert message.startswith("--rotate 4 contradicts")
    assert message.endswith("trained with --rotate 2")
    # R changes the directions alone: with the file's theta the frequencies stay the same.
    assert len(weights.notes) == 1


def test_frequencies_that_do_not_follow_from_the_options_are_told(tmp_path):
    args = argparse.Namespace(**{**vars(published()["args"]), "max_freq_lang": 1.0})
    torch.save(published(args=args), tmp_path / "other.pth")
    notes = read_weights(find_source(str(tmp_path / "other.pth"))).notes
    assert len(notes) == 1
    assert "--max-freq-lang" in notes[0]
    crept = published()
    for name, value in crept["model_ema"].items():
        if name.endswith("freqs"):
            value.mul_(1 + 2e-4)
    torch.save(crept, tmp_path / "crept.pth")
    assert not read_weights(find_source(str(tmp_path / "crept.pth")), ema=True).notes


def test_another_size_resamples_the_position_embedding():
    weights = read_weights(find_source(str(DEIT)))
    model = build_network(weights, image_size=96)
    assert model.pos_embed.shape == (1, 36, 64)
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 10)


def test_other_classes_leave_a_fresh_head_and_everything_else_is_taken():
    weights = read_weights(find_source(str(DEIT)), ema=True)
    torch.manual_seed(0)
    model = create_model(weights.arch, rope=weights.rope, **{**weights.options, "num_classes": 3})
    head = model.head.weight.clone()
    load_pretrained(weights, model)
    assert torch.equal(model.head.weight, head)
    ours = model.state_dict()
    theirs = {name: value for name, value in weights.state.items() if "head." not in name}
    assert same_tensors({name: ours[name] for name in theirs}, theirs)


def test_what_is_missing_left_over_or_misshaped_is_listed(tmp_path):
    state = published()["model"]
    del state["norm.scale"]
    state["extra.weight"] = torch.zeros(2)
    state["head.bias"] = torch.zeros(3)
    torch.save(published(model=state), tmp_path / "other.pth")
    with pytest.raises(CheckpointError) as refused:
        load_model(tmp_path / "other.pth")
    message = refused.value.message
    assert "1 missing (norm.scale)" in message
    assert "1 unexpected (extra.weight)" in message
    assert "1 of another shape (head.bias)" in message


def test_a_head_that_is_not_whole_is_no_head_of_other_classes():
    weights = read_weights(find_source(str(DEIT)))
    del weights.state["head.bias"]
    model = create_model(weights.arch, rope=weights.rope, **weights.options)
    with pytest.raises(CheckpointError, match=r"1 missing \(head.bias\)"):
        load_pretrained(weights, model)


class Evil:
    """Pickles as a call that leaves a file behind."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_nothing_in_a_pickle_is_ever_run(runs):
    torch.save({"model": Evil()}, "evil.pth")
    torch.save({"model": Evil()}, "old.pth", _use_new_zipfile_serialization=False)
    for name in ("evil.pth", "old.pth"):
        with pytest.raises(CheckpointError, match=r"refused: reading it would run posix.mkdir"):
            load_model(name)
    assert not (runs / "ran").exists()


def test_a_config_is_no_checkpoint_whose_words_would_be_run(runs):
    (runs / "config.yaml").write_text("command: pretrain\nout: runs/a\n")
    with pytest.raises(CheckpointError, match=r"config\.yaml is not a checkpoint of torch"):
        load_model("config.yaml")


def test_a_namespace_with_more_than_plain_values_is_refused(runs):
    args = argparse.Namespace(rotate=2, output_dir=pathlib.PurePosixPath("x"))
    torch.save(published(args=args), "path.pth")
    with pytest.raises(CheckpointError, match=r"would run pathlib\.PurePosixPath"):
        load_model("path.pth")


def test_files_in_the_old_format_load_too(runs):
    torch.save(published(), "old.pth", _use_new_zipfile_serialization=False)
    same = load_model("old.pth").state_dict()
    assert same_tensors(same, load_model(DEIT).state_dict())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>Not found</html>", "is a web page, not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        (DEIT.read_bytes()[:400_000], r"is truncated or damaged \(400000 bytes\)"),
        (DEIT.read_bytes()[:-40], "is truncated or damaged"),
        (b"hello, this is a text", "is not a checkpoint of torch"),
        (bytes(1000), "is not a checkpoint of torch"),
    ],
)
def test_what_is_no_checkpoint_has_its_own_line(runs, content, message):
    (runs / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as refused:
        load_model("x.pth")
    assert "\n" not in refused.value.message


def test_state_dicts_of_other_models_have_their_own_line(runs):
    import timm

    vit = timm.create_model("test_vit", pretrained=False)
    torch.save(vit.state_dict(), "vit.pth")
    torch.save({"model": torch.nn.Linear(2, 2).state_dict()}, "linear.pth")
    torch.save({"state_dict": {}, "epoch": 3}, "wrapped.pth")
    torch.save([1, 2], "list.pth")
    save_file({"weight": torch.zeros(2)}, "plain.safetensors")
    (runs / "broken.safetensors").write_bytes(b"12345678901234567890")
    for name, message in (
        ("vit.pth", "is not a DeiT or DiT"),
        ("linear.pth", "2 tensors such as weight, bias"),
        ("wrapped.pth", "it holds state_dict, epoch"),
        ("list.pth", "holds a list"),
        ("plain.safetensors", "is not a DeiT or DiT"),
        ("broken.safetensors", "cannot be read"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_model(name)


def test_a_bare_state_dict_in_safetensors_is_read_with_options(runs):
    save_file(dict(torch.load(BARE, weights_only=True)), "bare.safetensors")
    weights = read_weights(find_source("bare.safetensors"), rope={"rotate": 2})
    assert weights.arch == "dit-72x2x3-2"


def test_unknown_sources(runs):
    for given, message in (
        ("deit-bb", "not a file, a run folder or a published name"),
        ("gone/checkpoint.pth", "does not exist"),
        (".", "holds no checkpoint"),
    ):
        with pytest.raises((CheckpointError, ConfigError), match=message):
            find_source(given)


def test_published_weights_at_their_own_size_keep_extrapolating():
    start, notes = starting_point(find_source(str(DEIT)), {})
    assert start.rope.scaling == "extrapolate"
    assert not notes


# --- Checkpoints of neighbours.


def renamed(state, name):
    """The state with other names."""
    return {name(each): value for each, value in state.items()}


@pytest.mark.parametrize(
    "name",
    [
        lambda each: f"module.{each}",
        lambda each: f"_orig_mod.{each}",
        lambda each: f"module._orig_mod.{each}",
        lambda each: f"_orig_mod.module.{each}",
        lambda each: f"model.{each}",
        lambda each: f"net.module.{each}",
        lambda each: each.replace("blocks.0.", "blocks.0._orig_mod."),
        lambda each: f"_fsdp_wrapped_module.{each}",
        lambda each: each.replace(".attn.", ".attn._checkpoint_wrapped_module."),
    ],
)
def test_names_of_wrappers_are_left_out(runs, name):
    content = published()
    torch.save({**content, "model": renamed(content["model"], name)}, "x.pth")
    assert same_tensors(load_model("x.pth").state_dict(), load_model(DEIT).state_dict())
    averaged = {**renamed(content["model"], name), "n_averaged": torch.tensor(3)}
    torch.save(averaged, "bare.pth")
    save_file(averaged, "bare.safetensors")
    for bare in ("bare.pth", "bare.safetensors"):
        weights = read_weights(find_source(bare), rope={"rotate": 2})
        assert same_tensors(build_network(weights).state_dict(), load_model(DEIT).state_dict())


def test_the_layout_of_timms_script_is_read(runs):
    content, args = published(), {"model": "spiralrope_deit_tiny_patch16_224", "hflip": 0.5}
    content["args"] = argparse.Namespace(**args, model_kwargs={"rotate": 2}, gp=None)
    names = {"state_dict": "model", "state_dict_ema": "model_ema", "args": "args", "epoch": "epoch"}
    theirs = {name: content[ours] for name, ours in names.items()}
    torch.save({**theirs, "arch": args["model"], "version": 2, "metric": 71.5}, "timm.pth.tar")
    for ema in (False, True):
        weights = read_weights(find_source("timm.pth.tar"), ema=ema)
        assert (weights.ema, weights.rope.rotate, weights.progress) == (ema, 2, "epoch 17")
        ours = load_model(DEIT, ema=ema)
        assert same_tensors(build_network(weights).state_dict(), ours.state_dict())
    content["args"].gp = "avg"
    torch.save({**theirs, "args": content["args"]}, "avg.pth.tar")
    with pytest.raises(CheckpointError, match="the pooling avg, and here the class token is read"):
        load_model("avg.pth.tar")


def test_layouts_of_lightning_and_of_the_diffusion_scripts_are_read(runs):
    content = published(DIT)
    dit = load_model(DIT, ema=True).state_dict()
    torch.save({"ema": content["ema"], "opt": {}, "config": {"train": 1}}, "lightning-dit.pt")
    torch.save({"state_dict": renamed(content["ema"], "model.{}".format)}, "lightning.ckpt")
    for name in ("lightning-dit.pt", "lightning.ckpt"):
        weights = read_weights(find_source(name), ema=True, rope={"rotate": 2})
        assert same_tensors(build_network(weights).state_dict(), dit)
    sit = argparse.Namespace(model="SiT-XL/2", path_type="Linear", prediction="velocity")
    torch.save({**content, "args": sit}, "sit.pt")
    with pytest.raises(CheckpointError, match="holds a SiT: it predicts a velocity"):
        load_model("sit.pt")


def test_a_layout_that_nobody_knows_says_what_it_needs(runs):
    torch.save({"network": published()["model"], "epoch": 3}, "x.pth")
    with pytest.raises(CheckpointError, match="it holds network, epoch") as refused:
        load_model("x.pth")
    assert "under 'model', 'state_dict', 'model_ema'" in refused.value.hint
    assert "torch.save(network.state_dict(), FILE)" in refused.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>Not found</html>", "is a web page, not a checkpoint"),
        (b"\n<html>Sign in</html>", "is a web page, not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer"),
    ],
)
def test_a_failed_download_is_called_that_whatever_its_name(runs, content, message):
    for name in ("x.safetensors", "x.bin", "x.ckpt"):
        (runs / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            load_model(name)


def test_a_wrong_suffix_is_said_or_does_not_matter(runs, trained_once):
    shutil.copyfile(DEIT, "x.safetensors")
    with pytest.raises(CheckpointError, match=r"is a file of torch.save\nname it .pth"):
        load_model("x.safetensors")
    shutil.copyfile(trained_once / "checkpoints" / "0000008" / "model.safetensors", "y.bin")
    assert same_tensors(load_model("y.bin").state_dict(), load_model(trained_once).state_dict())
