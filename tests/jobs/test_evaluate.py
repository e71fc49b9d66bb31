"""The promises of an evaluation: right weights, every image once, and a record of it."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from spiralrope_cli import load_model
from spiralrope_cli.core import load
from spiralrope_cli.core.config.evals import EvalOptions
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.data.memory import load_digits
from spiralrope_cli.core.jobs import evaluate, train
from spiralrope_cli.core.jobs.export import export
from spiralrope_cli.core.report.results import print_evaluation
from spiralrope_cli.core.resolve import resolve
from spiralrope_cli.core.storage import sha256_of
from spiralrope_cli.core.training import classification

METRICS = ("acc1", "acc5", "loss", "count")
GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints" / "deit_tiny_checkpoint.pth"
FP32 = MachineConfig(nproc=1, device="cpu", precision="fp32")


@pytest.fixture
def source(trained_once, runs):
    return Path(shutil.copytree(trained_once, runs / "runs" / "tiny"))


def settled(options, machine=FP32):
    return evaluate.settle(options, machine, set())[0]


@pytest.fixture
def rows_of(capfd):
    """Runs an evaluation here; gives what `--json` says."""

    def call(*sources, machine=FP32, **options):
        options = EvalOptions(sources=tuple(map(str, sources)), json=True, **options)
        evaluate.work(settled(options, machine))
        return json.loads(capfd.readouterr().out)

    return call


def by_hand(source, **which):
    """Metrics of `load_model` on the digits, without the command's own loaders."""
    model = load_model(source, **which)
    _, val = load_digits()
    images = (val.images.float() / 255 - 0.3054) / 0.3760
    batches = [(images, val.labels)]
    none = contextlib.nullcontext
    return classification.measure_accuracy({"": model}, batches, torch.device("cpu"), none)[""]


def test_ema_is_ema_and_raw_is_raw(source, rows_of):
    found = {ema: rows_of(source, ema=ema)["rows"][0] for ema in (False, True)}
    assert found[False]["loss"] != pytest.approx(found[True]["loss"], rel=1e-4)
    for ema, row in found.items():
        expected = by_hand(source, ema=ema)
        assert (row["acc1"], row["acc5"], row["count"]) == (expected.acc1, expected.acc5, 360)
        assert row["loss"] == pytest.approx(expected.loss, rel=1e-6)
        assert row["weights"] == ("EMA" if ema else "raw")


def test_a_published_file_has_the_figures_of_the_run_that_it_came_from(
    source, rows_of, runs, capfd
):
    path = runs / "tiny.pth"
    export({"source": str(source), "layout": "published", "out": str(path)})
    capfd.readouterr()
    for ema in (False, True):
        (row,) = rows_of(path, data="digits", ema=ema)["rows"]
        (expected,) = rows_of(source, ema=ema)["rows"]
        assert {name: row[name] for name in METRICS} == {name: expected[name] for name in METRICS}


def test_all_decodes_every_image_once_per_crop_ratio(source, rows_of):
    result = rows_of(source, every=True)
    assert len(result["rows"]) == 8
    assert result["decoded"] == 2 * 360
    assert {row["count"] for row in result["rows"]} == {360}
    assert len({row["loss"] for row in result["rows"]}) == 8
    assert {(row["checkpoint"], row["step"]) for row in result["rows"]} == {
        ("best", 4),
        ("last", 8),
    }
    single = rows_of(source, best=True, ema=True, crop_ratios=(0.875,))["rows"][0]
    again = next(
        row
        for row in result["rows"]
        if (row["checkpoint"], row["weights"], row["crop_ratio"]) == ("best", "EMA", 0.875)
    )
    assert {name: single[name] for name in METRICS} == {name: again[name] for name in METRICS}


def test_equal_checkpoints_are_measured_once_and_shown_twice(source, rows_of, monkeypatch):
    (source / "checkpoints/best.json").write_text('{"step": 8}')
    loaded = []
    build = load.build_network
    monkeypatch.setattr(
        load, "build_network", lambda *of, **size: loaded.append(of) or build(*of, **size)
    )
    rows = rows_of(source, every=True)["rows"]
    assert len(rows) == 8
    assert len(loaded) == 4
    assert [row["loss"] for row in rows[:4]] == [row["loss"] for row in rows[4:]]


def test_images_are_opened_once_per_crop_ratio(image_folder, runs, rows_of, monkeypatch, capfd):
    size = {"image_size": (16, 16), "patch_size": 8, "batch_size": 4, "micro_batch_size": 4}
    plain = {
        "mixup": 0.0,
        "cutmix": 0.0,
        "workers": 0,
        "max_steps": 2,
        "warmup_epochs": 0,
        "nproc": 1,
    }
    options = {"arch": "deit-64x2x2", "data": str(image_folder), "out": "photos", **size, **plain}
    train.work(resolve("pretrain", options).run)
    capfd.readouterr()
    out = runs / "photos"
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or real(path))
    machine = MachineConfig(nproc=1, device="cpu", precision="fp32", workers=0)
    result = rows_of(out, every=True, machine=machine)
    assert len(result["rows"]) == 8
    assert result["decoded"] == len(opened) == 2 * 10
    assert len(set(opened)) == 10


def test_figures_do_not_depend_on_the_number_of_processes(source, rows_of, spiralrope):
    one = rows_of(source, every=True)
    words = ("runs/tiny", "--all", "--json", "--precision", "fp32", "--device", "cpu")
    several = json.loads(spiralrope("eval", *words, "--nproc", 2).stdout)
    assert several["decoded"] == one["decoded"]
    for ours, theirs in zip(several["rows"], one["rows"], strict=True):
        assert ours["processes"] == 2
        assert (ours["acc1"], ours["acc5"], ours["count"]) == (
            *(theirs["acc1"], theirs["acc5"]),
            360,
        )
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)


def test_as_typed_after_a_training(source, spiralrope):
    done = spiralrope("eval", "--ema", "--crop-ratio")
    assert "newest run: runs/tiny" in done.stderr
    assert "decoded 720 images for 2 row(s)" in done.stderr
    rows = json.loads((source / "eval.json").read_text())["rows"]
    assert [(row["weights"], row["crop_ratio"]) for row in rows] == [("EMA", 0.875), ("EMA", 1.0)]
    for row in rows:
        assert f"{row['acc1']:.2f}" in done.stdout


def test_eval_json_says_what_produced_the_figures_and_keeps_other_rows(source, rows_of):
    rows_of(source)
    rows_of(source, ema=True)
    rows_of(source)
    rows = json.loads((source / "eval.json").read_text())["rows"]
    assert [row["weights"] for row in rows] == ["EMA", "raw"]
    row = rows[0]
    file = source / "checkpoints/0000008/ema.safetensors"
    assert Path(row["file"]) == file
    assert row["sha256"] == sha256_of(file)
    assert (row["arch"], row["data"], row["precision"]) == ("deit-64x2x2", "digits", "fp32")
    assert (row["image_size"], row["crop_ratio"], row["interpolation"]) == ([8, 8], 1.0, "bicubic")
    assert row["rope"]["rotate"] == 2
    assert row["versions"].keys() == {"spiralrope", "torch", "torchvision", "timm", "python"}


def test_what_is_measured_is_known_and_shown(source, rows_of, capfd):
    run = settled(EvalOptions(sources=(str(source),), every=True))
    assert not evaluate.measured_rows(run)
    rows_of(source, ema=True)
    assert not evaluate.measured_rows(run)
    rows = rows_of(source, every=True)["rows"]
    assert evaluate.measured_rows(run) == rows
    assert capfd.readouterr().out == ""
    print_evaluation(evaluate.measured_rows(run))
    assert "best, EMA" in capfd.readouterr().out
    in_bf16 = replace(run, machine=replace(FP32, precision="bf16"))
    assert not evaluate.measured_rows(in_bf16)
    rotated = settled(EvalOptions(sources=(str(source),), every=True, rope={"theta": 5.0}))
    assert not evaluate.measured_rows(rotated)


def test_a_damaged_eval_json_is_set_aside(source, rows_of):
    (source / "eval.json").write_text('{"rows": [')
    rows_of(source)
    assert (source / "eval.damaged").read_text() == '{"rows": ['
    assert len(json.loads((source / "eval.json").read_text())["rows"]) == 1


def test_a_folder_that_cannot_be_written_is_a_note(source, runs, capfd):
    run = settled(EvalOptions(sources=(str(source),), out=str(runs / "later")))
    (runs / "later").write_text("")
    evaluate.work(run)
    result = capfd.readouterr()
    assert "was not written" in result.err
    assert "last, raw" in result.out


def test_a_published_file_is_measured_on_grey_images(runs, rows_of):
    file = shutil.copy(GOLDEN, runs)
    result = rows_of(file, every=True)
    assert result["decoded"] == 2 * 360
    assert [row["weights"] for row in result["rows"]] == ["raw", "EMA", "raw", "EMA"]
    assert {row["count"] for row in result["rows"]} == {360}
    assert len({row["loss"] for row in result["rows"]}) == 4
    assert (runs / "eval.json").is_file()


def test_several_image_sizes_are_drawn(source, rows_of):
    sizes = ((8, 8), (12, 12))
    interpolated = rows_of(source, image_sizes=sizes)["rows"]
    assert (source / "eval-sizes.png").stat().st_size > 1000
    extrapolated = rows_of(source, image_sizes=sizes, rope={"scaling": "extrapolate"})["rows"]
    assert interpolated[0]["loss"] == extrapolated[0]["loss"]
    assert interpolated[1]["loss"] != extrapolated[1]["loss"]
    expected = by_hand(source)
    assert interpolated[0]["acc1"] == expected.acc1


def test_csv_is_one_line_per_row(source, capfd):
    options = EvalOptions(sources=(str(source),), crop_ratios=(0.875, 1.0), csv=True)
    evaluate.work(settled(options))
    lines = list(csv.DictReader(io.StringIO(capfd.readouterr().out)))
    assert [line["crop_ratio"] for line in lines] == ["0.875", "1.0"]
    assert {(line["count"], line["image_size"], line["rope_rotate"]) for line in lines} == {
        ("360", "8x8", "2")
    }
