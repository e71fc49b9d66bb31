"""`spiralrope predict`: classes of image files, with the numbers that `eval` computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from spiralrope_cli import main
from spiralrope_cli.core.config.evals import EvalOptions
from spiralrope_cli.core.config.option import build
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.data import batches
from spiralrope_cli.core.data.image_sets import names_of
from spiralrope_cli.core.errors import DataError, SpiralRopeError
from spiralrope_cli.core.jobs import evaluate
from spiralrope_cli.core.load import load_model
from spiralrope_cli.core.plots import images as plotted

DEIT = Path(__file__).parents[1] / "golden" / "checkpoints" / "deit_tiny_checkpoint.pth"


@pytest.fixture
def predict(runs):
    """`spiralrope predict ...` in this process: the result."""

    def call(*words):
        words = [*map(str, words), "--precision", "fp32", "--workers", "0"]
        return CliRunner().invoke(main.app, ["predict", *words])

    return call


@pytest.fixture
def source(trained_once, runs):
    return Path(shutil.copytree(trained_once, runs / "runs" / "tiny"))


@pytest.fixture
def digits(runs, digit_pictures):
    """Three digits as files, one of them in a folder."""
    folder = runs / "photos"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "more/c.png")):
        Image.fromarray(digit_pictures[number]).save(folder / name)
    return folder


@pytest.mark.parametrize("words", [(), ("--image-size", "48x32", "--crop-ratio", "0.9", "--ema")])
def test_images_are_prepared_as_in_eval(predict, image_folder, monkeypatch, words):
    monkeypatch.setattr(batches, "EVAL_BATCH", 4)  # several batches
    done = predict(DEIT, image_folder / "val", "--json", *words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)

    options = {"sources": (str(DEIT),), "data": str(image_folder), "ignore_class_names": True}
    if words:
        options |= {"image_sizes": ((48, 32),), "crop_ratios": (0.9,), "ema": True}
    monkeypatch.setattr(evaluate, "classes_of", lambda *given: ((), []))  # it has ten classes
    machine = MachineConfig(workers=0)
    run, _ = evaluate.settle(build(EvalOptions, options), machine, set())
    [row] = run.rows
    cpu = torch.device("cpu")
    images = batches.ValidationImages(row.protocol, machine, cpu, 0, 1)
    seen = torch.cat([pixels for pixels, _ in images.batches()])
    network = load_model(DEIT, ema="--ema" in words)
    if words:
        from spiralrope_cli.core.hub.source import find_source
        from spiralrope_cli.core.load import at_size, build_network
        from spiralrope_cli.core.weights import read_weights

        weights = read_weights(find_source(str(DEIT)), ema=True)
        network = build_network(weights, **at_size(weights, (48, 32), {}))
    with torch.no_grad():
        expected = network(seen).softmax(1).topk(5)
    classes = [image["classes"] for image in found["images"]]
    assert [[each["number"] for each in some] for some in classes] == expected.indices.tolist()
    for some, values in zip(classes, expected.values.tolist(), strict=True):
        assert [each["probability"] for each in some] == pytest.approx(values, abs=1e-6)
    for name in ("crop_ratio", "mean", "std", "image_size"):
        said, protocol = found[name], getattr(row.protocol, name)
        assert said == (list(protocol) if isinstance(protocol, tuple) else protocol)


def test_files_folders_and_patterns_each_image_once(predict, source, digits):
    done = predict(source, digits / "b.png", digits, "photos/**/*.png", "--top-k", 1)
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == [
        f"{digits}/{n}" for n in ("b.png", "a.png", "more/c.png")
    ]
    assert all(line[1].endswith("%") and line[2] in "0123456789" for line in lines)


def test_damaged_files_are_named_and_the_others_are_predicted(predict, source, digits):
    (digits / "a.png").write_bytes(b"no image")
    done = predict(source, digits, "--json")
    assert isinstance(done.exception, DataError)
    assert (done.exception.exit_code, str(done.exception)) == (
        1,
        "1 of 3 image(s) could not be read",
    )
    assert f"image {digits}/a.png cannot be read" in done.stderr
    found = json.loads(done.stdout)["images"]
    assert sorted(each["image"] for each in found) == [
        f"{digits}/{name}" for name in ("a.png", "b.png", "more/c.png")
    ]
    [bad] = [each for each in found if "error" in each]
    assert bad["image"].endswith("a.png")
    assert all(len(each["classes"]) == 5 for each in found if each is not bad)


@pytest.mark.draws
def test_the_contact_sheet_shows_what_the_network_sees(predict, source, digits, monkeypatch):
    seen = []
    draw = plotted.samples_figure
    monkeypatch.setattr(
        plotted, "samples_figure", lambda *given: (seen.append(given), draw(*given))[1]
    )
    done = predict(source, digits, "--ema", "--best", "--out", "sheet.png")
    assert done.exit_code == 0, done.output
    [(images, labels, title)] = seen
    assert (tuple(images.shape), images.dtype) == ((3, 3, 8, 8), torch.uint8)
    assert torch.equal(images[0], torch.from_numpy(as_array(digits / "a.png")))
    first = done.stdout.split()
    assert labels[0].split()[0] == first[2]
    assert "3 image(s)" in title
    assert Path("sheet.png").read_bytes().startswith(b"\x89PNG")


def as_array(path):
    import numpy as np

    return np.array(Image.open(path)).transpose(2, 0, 1).copy()


def test_imagenets_classes_have_names_in_words():
    published = names_of("", 1000)
    assert (len(published), published[0], published[281]) == (1000, "tench", "tabby")
    assert names_of("gone", 2, ["n02123045", "n01440764"]) == ["tabby", "tench"]
    assert names_of("gone", 2, ["n02123045", "cat"]) == ["n02123045", "cat"]


@pytest.mark.parametrize(
    ("words", "told", "code"),
    [
        (["nowhere.png"], "IMAGES nowhere.png does not exist", 1),
        (["photos/*.jpg"], "IMAGES photos/*.jpg does not exist", 1),
        (["empty"], "IMAGES empty holds no images: 1 .txt", 1),
        (["photos", "--top-k", "11"], "--top-k 11: runs/tiny has 10 classes", 2),
        (["photos", "--top-k", "0"], "--top-k is 0; it must be a whole number, 1 or more", 2),
        (["photos", "--image-size", "9"], "--image-size 9 is not a multiple", 2),
        (["photos", "--out", "sheet.bmp"], "--out sheet.bmp must end in .png or .svg", 2),
        (["photos", "--out", "photos/a.png"], "--out photos/a.png is one of IMAGES", 2),
    ],
)
def test_what_cannot_work_is_told(predict, source, digits, runs, words, told, code):
    (runs / "empty").mkdir()
    (runs / "empty" / "notes.txt").write_text("")
    done = predict("runs/tiny", *words)
    assert isinstance(done.exception, SpiralRopeError), done.output
    assert told in done.exception.message
    assert done.exception.exit_code == code
    assert done.stdout == ""
