"""A SOURCE that does not tell all, in every command that takes one: said, or asked for."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from spiralrope_cli import load_model, main
from spiralrope_cli.core.config.option import build
from spiralrope_cli.core.config.runs import ClassifierRun
from spiralrope_cli.core.errors import CheckpointError, ConfigError, SpiralRopeError
from spiralrope_cli.core.models.factory import model_of
from spiralrope_cli.core.runtime.run_folder import read_config, write_json
from spiralrope_cli.core.storage import read_safetensors, with_checksum
from spiralrope_cli.core.training import checkpoint
from spiralrope_cli.core.training.step import TrainState

CLASSIFIER = [
    "finetune bare.pth --rotate 2 --max-steps 1 --dry-run",
    "eval bare.pth --rotate 2 --nproc 1",
    "export bare.pth --rotate 2 --layout published",
    "export bare.pth --rotate 2 --layout safetensors",
    "plot attention bare.pth digit.png --rotate 2",
]
DIFFUSION = [
    "dit-sample bare.pt --rotate 0 --image-size 8 --dry-run",
    "dit-train --init-from bare.pt --rotate 0 --image-size 8 --max-steps 1 --dry-run",
    "export bare.pt --rotate 0 --layout published",
]


@pytest.fixture
def bare(runs, trained_once, drawn_once, digit_pictures):
    """Tensors of two runs, saved alone, with heads of 32 channels; and an image."""
    from PIL import Image

    for run, name in ((trained_once, "bare.pth"), (drawn_once, "bare.pt")):
        last = sorted((run / "checkpoints").glob("0*"))[-1]
        torch.save(load_file(last / "model.safetensors"), runs / name)
    Image.fromarray(digit_pictures[0]).save(runs / "digit.png")
    return runs


def answer(words):
    """Exit code, and all that was said."""
    result = CliRunner().invoke(main.app, shlex.split(words))
    if isinstance(result.exception, SpiralRopeError):
        return result.exception.exit_code, str(result.exception)
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize("words", [*CLASSIFIER, *DIFFUSION])
def test_heads_that_nobody_tells_are_asked_for(bare, words):
    name, arch = (
        ("bare.pt", "dit-64x2xHEADS-2") if "bare.pt " in words else ("bare.pth", "deit-64x2xHEADS")
    )
    code, said = answer(words)
    assert code == 2
    assert said.startswith(f"{name} does not contain the number of heads (2 blocks of width 64)\n")
    assert f"give --arch {arch}" in said
    other = arch.replace("64", "32").replace("HEADS", "2")
    code, said = answer(f"{words} --arch {other}")
    assert (code, said.splitlines()[0]) == (
        2,
        f"--arch is {other}, but {name} is {other.replace('32', '64')}",
    )
    code, said = answer(f"{words} --arch {arch.replace('HEADS', '2')}")
    assert code == 0, said


def test_given_heads_give_the_results_of_the_run(bare, trained_once):
    def row(words):
        result = CliRunner().invoke(
            main.app, ["eval", *words, "--nproc", "1", "--json", "--out", "out"]
        )
        return json.loads(result.stdout)["rows"][0]

    own = row([str(trained_once)])
    given = row(["bare.pth", "--rotate", "2", "--arch", "deit-64x2x2"])
    assert (given["loss"], given["acc1"]) == (own["loss"], own["acc1"])
    other = row(["bare.pth", "--rotate", "2", "--arch", "deit-64x2x4"])
    assert other["loss"] != own["loss"]


def test_what_a_file_tells_stands_above_the_option(trained_once, drawn_once):
    for source, arch in ((trained_once, "deit-64x2x4"), (drawn_once, "deit-64x2x2")):
        with pytest.raises(ConfigError, match=f"--arch is {arch}, but .* is "):
            load_model(source, arch=arch)


def test_heads_of_a_published_size_are_taken_with_a_note(runs):
    from spiralrope_cli import RopeConfig, create_model

    state = create_model("deit-ti", num_classes=2, image_size=32).state_dict()
    save_file(state, "tiny.safetensors")
    with pytest.warns(UserWarning, match="does not contain") as said:
        load_model("tiny.safetensors", rope=RopeConfig())
    assert [str(each.message) for each in said] == [
        "tiny.safetensors does not contain the number of heads; 3 is used, as in deit-ti "
        "(--arch changes it)",
        "tiny.safetensors does not contain its grid; 2x2 patches are used",
    ]
    with pytest.warns(UserWarning, match="grid"):
        model = load_model("tiny.safetensors", rope=RopeConfig(), arch="deit-192x12x6")
    assert model.blocks[0].attn.num_heads == 6
    # Blocks of that width, but not of that depth, are of no published size.
    save_file({n: v for n, v in state.items() if ".11." not in n}, "short.safetensors")
    with pytest.raises(ConfigError, match=r"the number of heads \(11 blocks of width 192"):
        load_model("short.safetensors", rope=RopeConfig())


def test_a_number_of_heads_that_does_not_divide_the_width_is_no_number(bare):
    content = {"model": torch.load("bare.pth"), "args": {"rotate": 2, "num_heads": 3}}
    torch.save(content, "three.pth")
    code, said = answer("eval three.pth")
    assert code == 1
    assert said.startswith("three.pth is incomplete: a whole number of heads in its width of 64 is")


# --- Weights and results that are not finite.
def with_value(run, target, value, name="blocks.1.mlp.fc2.weight"):
    """A copy of a run with one other value in both of its sets of weights."""
    shutil.copytree(run, target)
    for path in target.rglob("*.safetensors"):
        tensors, metadata = read_safetensors(path)
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        tensors[name].view(-1)[3] = value
        save_file(tensors, path, with_checksum(tensors, metadata))
    return target


@pytest.mark.parametrize(
    "words",
    [
        "eval a --data digits --nproc 1",
        "eval a --data digits --all --json --nproc 1",
        "finetune a --max-steps 1 --dry-run",
        "export a --layout published",
        "export a --layout safetensors --ema",
        "plot attention a digit.png",
        "dit-sample b --num-samples 2 --num-sampling-steps 2 --nproc 1",
        "dit-sample b --no-ema --dry-run",
        "dit-train --init-from b --max-steps 1 --dry-run",
        "eval c.pth --data digits --rotate 2 --arch deit-64x2x2 --nproc 1",
    ],
)
def test_weights_that_are_not_finite_stop_every_command(bare, trained_once, drawn_once, words):
    with_value(trained_once, bare / "a", math.nan)
    with_value(drawn_once, bare / "b", -math.inf)
    state = torch.load("bare.pth")
    state["blocks.1.mlp.fc2.weight"][3] = math.nan
    torch.save(state, "c.pth")
    code, said = answer(words)
    assert code == 1
    assert said.startswith("weights are not finite in ")
    assert ": blocks.1.mlp.fc2.weight\n" in said
    assert not list(bare.rglob("eval.json")) + list(bare.rglob("samples.npz"))


def test_a_checkpoint_that_is_not_finite_is_not_resumed(bare, trained_once):
    with_value(trained_once, bare / "a", math.nan)
    run = build(ClassifierRun, read_config(trained_once / "config.yaml"))
    state = TrainState.create(model_of(run), run.optim)
    with pytest.raises(CheckpointError, match="0000008 cannot be read: its weights are not finite"):
        checkpoint.restore(bare / "a", 8, state)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("eval a --data digits --nproc 1 --json", "the loss of the raw weights of a is not finite"),
        ("plot attention a digit.png", "attention of a is not finite"),
        ("dit-sample b --num-samples 2 --num-sampling-steps 2 --nproc 1", "images are not finite"),
    ],
)
def test_results_that_are_not_finite_stop_too(bare, trained_once, drawn_once, words, told):
    """Of finite weights that are so large that sums of them are not."""
    with_value(trained_once, bare / "a", 3e38, "patch_embed.proj.weight")
    with_value(drawn_once, bare / "b", 3e38, "x_embedder.proj.weight")
    code, said = answer(words)
    assert (code, said.splitlines()[0]) == (1, told)
    assert not list(bare.rglob("eval.json")) + list(bare.rglob("samples.npz"))


def test_no_json_holds_what_is_no_number(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": [math.nan]})
    assert not list(tmp_path.iterdir())


# --- Guidance needs a null label.
@pytest.fixture
def without_null(runs, drawn_once):
    """The run, as if --class-dropout-prob had been 0, and perhaps had it started elsewhere."""

    def make(name, source=""):
        shutil.copytree(drawn_once, runs / name)
        for path in (runs / name).rglob("*.safetensors"):
            tensors, metadata = read_safetensors(path)
            config = json.loads(metadata["config"])
            config["model"]["class_dropout_prob"] = 0.0
            metadata["config"] = json.dumps({**config, "source": source})
            save_file(tensors, path, with_checksum(tensors, metadata))
        return name

    return make


def test_guidance_without_a_null_label_is_refused(runs, without_null, drawn_once):
    run = without_null("run")
    answer(f"export {run} --layout published --out a.pt")
    answer(f"export {run} --layout safetensors --out b")
    for source in (run, "a.pt", "b", "b/model.safetensors"):
        code, said = answer(f"dit-sample {source} --cfg-scale 4 --dry-run")
        assert code == 2
        assert f"--cfg-scale 4: {source} has no null label to guide by" in said
        assert answer(f"dit-sample {source} --dry-run")[0] == 0
    assert answer(f"dit-sample {drawn_once} --cfg-scale 4 --dry-run")[0] == 0
    of_another = without_null("later", "dit-xl2")
    code, said = answer(f"dit-sample {of_another} --cfg-scale 4 --dry-run")
    assert code == 0
    assert "the null label of later is that of dit-xl2" in said
    code, said = answer("dit-train --class-dropout-prob 0 --dry-run")
    assert code == 0
    assert "--class-dropout-prob 0 trains no null label" in said


def test_a_table_without_a_null_label_keeps_its_last_class(runs, drawn_once):
    """The original code has no row for the null label where it never drops one."""
    answer(f"export {drawn_once} --layout published --out a.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load("a.pt")
    name = "y_embedder.embedding_table.weight"
    for state in (content["model"], content["ema"]):
        state[name] = state[name][:10].clone()
    del content["args"]["class_dropout_prob"]
    torch.save(content, "b.pt")
    model, whole = load_model("b.pt"), load_model("a.pt")
    assert model.num_classes == 10
    assert torch.equal(model.y_embedder(torch.tensor([9])), whole.y_embedder(torch.tensor([9])))
    code, said = answer("dit-sample b.pt --cfg-scale 4 --dry-run")
    assert code == 2
    assert "b.pt has no null label to guide by" in said


# --- Averaged weights that are still the first ones.
@pytest.fixture
def slow_average(runs, trained_once, drawn_once, digit_pictures):
    """Runs `a` and `b` of 240 steps, as their files say, at the recipe's decay."""
    from PIL import Image

    for run, name in ((trained_once, "a"), (drawn_once, "b")):
        shutil.copytree(run, runs / name)
        for path in (runs / name).rglob("*.safetensors"):
            tensors, metadata = read_safetensors(path)
            config = json.loads(metadata["config"])
            config["optim"] |= {"ema_decay": 0.9999, "ema_warmup": False}
            metadata |= {"config": json.dumps(config), "step": "240"}
            save_file(tensors, path, with_checksum(tensors, metadata))
    Image.fromarray(digit_pictures[0]).save(runs / "digit.png")


STILL_FIRST = "98% of the EMA weights in "


@pytest.mark.parametrize(
    "words",
    [
        "finetune a --max-steps 1 --dry-run",
        "eval a --ema --data digits --nproc 1",
        "export a --layout safetensors --ema",
        "plot attention a digit.png --ema",
        "dit-sample b --dry-run",
        "dit-train --init-from b --max-steps 1 --dry-run",
    ],
)
def test_averages_that_are_still_the_first_weights_are_said_of_the_source(slow_average, words):
    code, said = answer(words)
    assert code == 0, said
    assert STILL_FIRST in said
    assert "240 steps were few for a decay of 0.9999" in said
    raw = words.replace("--ema", "") if "attention" in words else words.replace("--ema", "--no-ema")
    code, said = answer(raw if raw != words else f"{words} --no-ema")
    assert code == 0, said
    assert STILL_FIRST not in said


@pytest.mark.parametrize("words", ["finetune a", "dit-train --init-from b"])
def test_a_run_can_start_from_the_raw_weights(slow_average, words):
    """At a learning rate of 0 its weights are still those."""
    more = "--max-steps 1 --lr 0 --min-lr 0 --weight-decay 0 --warmup-epochs 0 --nproc 1"
    source = load_file(sorted(Path().glob(f"{words[-1]}/checkpoints/0*"))[-1] / "model.safetensors")
    for ema in ("ema", "no-ema"):
        code, said = answer(f"{words} {more} --{ema} --out {ema}")
        assert code == 0, said
        after = load_file(sorted(Path(ema).glob("checkpoints/0*"))[-1] / "model.safetensors")
        same = all(torch.equal(after[name], source[name]) for name in source)
        assert same == (ema == "no-ema")


def test_the_plan_says_which_decay_would_do(runs):
    few = "pretrain --max-steps 240 --dry-run --no-ema-warmup --ema-decay"
    code, said = answer(f"{few} 0.9999")
    assert code == 0
    assert "98% of the EMA weights will still be the first ones: 240 steps are few" in said
    assert "--ema-decay 0.9999; at 0.981 it would be 1%, and with --ema-warmup 0%" in said
    assert "first ones" not in answer(f"{few} 0.981")[1]
    assert "first ones" not in answer("pretrain --dry-run")[1]
    few = few.replace("pretrain", "dit-train")
    assert "first ones" in answer(f"{few} 0.9999")[1]
    assert "first ones" not in answer(f"{few.replace('--no-ema', '--ema')} 0.9999")[1]
