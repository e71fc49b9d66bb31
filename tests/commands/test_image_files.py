"""A file of any mode is the same image in every command (the table in `docs/formats.md`)."""

from __future__ import annotations

import dataclasses
import json
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from typer.testing import CliRunner

from spiralrope_cli import main as cli
from spiralrope_cli.core.config.datasets import PHOTOGRAPHS
from spiralrope_cli.core.config.fid import FidRun
from spiralrope_cli.core.config.option import build
from spiralrope_cli.core.config.recipes import PRETRAIN
from spiralrope_cli.core.config.runs import AugmentConfig
from spiralrope_cli.core.data.augment import cropped_array, eval_transform, train_transform
from spiralrope_cli.core.data.images import Unreadable, as_tensor, as_trained, decode, open_image
from spiralrope_cli.core.data.loader import ImageFiles
from spiralrope_cli.core.jobs import score
from spiralrope_cli.core.plots import images as plotted

SIDE = 16
NOISE = np.random.default_rng(0)
LEVELS = NOISE.permutation(256).astype(np.uint8).reshape(SIDE, SIDE)
COLOURS = NOISE.integers(1, 256, (SIDE, SIDE, 3), dtype=np.uint8)
PALETTE = NOISE.integers(1, 256, (256, 3), dtype=np.uint8)
OPAQUE = LEVELS % 2 == 0


def grey(levels):
    return np.repeat(levels[..., None], 3, axis=2)


def with_alpha(pixels):
    return Image.fromarray(np.dstack([pixels, OPAQUE * np.uint8(255)]))


def palette():
    image = Image.fromarray(LEVELS, "L").copy()
    image.putpalette(PALETTE.tobytes())
    return image


def animation(path):
    palette().save(path, save_all=True, append_images=[Image.new("P", (SIDE, SIDE))])


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be rotated by 90 degrees
    Image.fromarray(COLOURS).save(path, exif=exif)


def sixteen_bit_colours(path):
    path.write_bytes(b"P6 16 16 65535\n" + (COLOURS.astype(">u2") * 257).tobytes())


def twelve_bit_tiff(path):
    """Two pixels in three bytes, which Pillow cannot write."""
    first, second = np.array(LEVELS.reshape(-1, 2) * (4095 / 255) + 0.5, np.int32).T
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1)
    tags = [(256, SIDE), (257, SIDE), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1)]
    tags += [(278, SIDE), (279, packed.size)]
    header = struct.pack("<2sHI", b"II", 42, 8 + packed.size)
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    listed = struct.pack("<H", len(tags)) + rows + bytes(4)
    path.write_bytes(header + packed.astype(np.uint8).tobytes() + listed)


def sixteen_bit_pgm(path):
    path.write_bytes(b"P5 16 16 65535\n" + (LEVELS.astype(">u2") * 257).tobytes())


def saved(image, **more):
    return lambda path: image.save(path, **more)


MODES = {
    "rgb.png": (saved(Image.fromarray(COLOURS)), COLOURS),
    "grey.png": (saved(Image.fromarray(LEVELS)), grey(LEVELS)),
    "one-bit.png": (saved(Image.fromarray(LEVELS > 127)), grey(LEVELS // 128 * 255)),
    "16-bit-grey.png": (saved(Image.fromarray(LEVELS.astype("<u2") * 257)), grey(LEVELS)),
    "16-bit-grey.tif": (saved(Image.fromarray(LEVELS.astype(">u2") * 257)), grey(LEVELS)),
    "12-bit-grey.tif": (twelve_bit_tiff, grey(LEVELS)),
    "16-bit-grey.pgm": (sixteen_bit_pgm, grey(LEVELS)),
    "16-bit-rgb.ppm": (sixteen_bit_colours, COLOURS),
    "int32.tif": (saved(Image.fromarray(LEVELS.astype(np.int32) * 257)), grey(LEVELS)),
    "float.tif": (saved(Image.fromarray(LEVELS.astype(np.float32))), grey(LEVELS)),
    "grey-alpha.png": (saved(with_alpha(LEVELS)), grey(LEVELS * OPAQUE)),
    "rgb-alpha.png": (saved(with_alpha(COLOURS)), COLOURS * OPAQUE[..., None]),
    "rgb-opaque.png": (saved(Image.fromarray(COLOURS).convert("RGBA")), COLOURS),
    "rgb-alpha.webp": (
        saved(with_alpha(COLOURS), lossless=True, exact=True),
        COLOURS * OPAQUE[..., None],
    ),
    "palette.png": (saved(palette()), PALETTE[LEVELS]),
    "palette-key.png": (saved(palette(), transparency=7), PALETTE[LEVELS] * grey(LEVELS != 7)),
    "palette-alpha.png": (
        saved(palette(), transparency=bytes([255, 0] * 128)),
        PALETTE[LEVELS] * OPAQUE[..., None],
    ),
    "cmyk.tif": (saved(Image.fromarray(np.dstack([~COLOURS, 0 * LEVELS]), "CMYK")), COLOURS),
    "exif-orientation.png": (turned, COLOURS),
    "animation.gif": (animation, PALETTE[LEVELS]),
}
DIFFER = {name for name in MODES if name.startswith(("12-bit-grey", "16-bit-grey", "int32"))}
DIFFER |= {name for name in MODES if "alpha" in name or "key" in name}
"""What `fid` reads like its peers, and so not as training does."""


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # of PIL
@pytest.mark.parametrize("name", MODES)
def test_each_mode_has_its_value(tmp_path, name):
    write, expected = MODES[name]
    path = tmp_path / name
    write(path)
    augment = build(AugmentConfig, {**PRETRAIN, **PHOTOGRAPHS})
    whole = dataclasses.replace(
        augment, auto_augment="none", color_jitter=0.0, hflip=0.0, crop_scale=1.0
    )
    size = (SIDE, SIDE)
    for transform, seed, read in (
        (train_transform(size, whole), (0, 0, 0), as_tensor),
        (eval_transform(size, 1.0), None, as_trained),
        (partial(cropped_array, size=size), None, as_trained),
    ):
        array, _, bad, _ = ImageFiles([(str(path), 0)], transform, read=read)[0, seed]
        assert not bad
        np.testing.assert_array_equal(array.transpose(1, 2, 0), expected)
        array, *_ = ImageFiles([(str(path), 0)], transform, True, read=read)[0, seed]
        as_grey = np.asarray(Image.fromarray(expected).convert("L"))
        np.testing.assert_allclose(array[0], as_grey, atol=1)
    with Image.open(path) as image:  # as pytorch-fid and torch-fidelity do
        pil = np.asarray(image.convert("RGB"))
    assert np.array_equal(pil, expected) == (name not in DIFFER)
    for reading, pixels in (("as-trained", expected), ("as-pil", pil)):
        found, differs = decode(str(path), reading)
        np.testing.assert_array_equal(found, pixels)
        assert differs == (name in DIFFER)


@pytest.mark.parametrize(
    ("levels", "said"),
    [
        (LEVELS.astype(np.float32) / 255, "from 0 to 1, not from 0 to 255"),
        (LEVELS.astype(np.float32) * 2, "from 0 to 510, not from 0 to 255"),
        (np.full((4, 4), np.nan, np.float32), "from nan to nan, not from 0 to 255"),
        (LEVELS.astype(np.int32) - 1, "from -1 to 254, not from 0 to 65535"),
        (LEVELS.astype(np.int32) * 258, "from 0 to 65790, not from 0 to 65535"),
    ],
)
def test_levels_of_no_known_range_are_refused(tmp_path, levels, said):
    path = str(tmp_path / "x.tif")
    Image.fromarray(levels).save(path)
    for found in (open_image(path, as_trained), decode(path, "as-pil")):
        assert isinstance(found, Unreadable)
        assert found.reason == f"its levels are {said}; save it with 8 or 16 bits"


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Class folders of files of every mode, and the same images as 8-bit RGB."""
    roots = [tmp_path_factory.mktemp(name) for name in ("modes", "plain")]
    for number, (name, (write, expected)) in enumerate(MODES.items()):
        for split in ("train", "val"):
            folders = [root / split / "ab"[number % 2] for root in roots]
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            write(folders[0] / f"{number:02d}-{name}")
            Image.fromarray(expected).save(folders[1] / f"{number:02d}.png")
    return roots


@pytest.fixture
def outputs(runs, twins):
    """Runs a command on both folders; the path that follows `--out`, and stdout."""

    def call(*words, data=("--data", "{}")):
        found = []
        for root in twins:
            out = runs / f"{words[0]}-{root.name}"
            given = [word.format(root) for word in data]
            done = CliRunner().invoke(cli.app, [*map(str, words), *given, "--out", str(out)])
            assert done.exit_code == 0, done.output + repr(done.exception)
            found.append((out, done.stdout))
        return found

    return call


SMALL = ("--device", "cpu", "--precision", "fp32", "--image-size", SIDE, "--workers", 0)
ONE_STEP = ("--max-steps", 2, "--warmup-epochs", 0, "--batch-size", 8, "--log-every", 1)


def losses(out):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{key: line[key] for key in line if "loss" in key or "acc" in key} for line in lines]


def test_training_and_evaluation_see_the_same_images(outputs):
    first, second = outputs("pretrain", "--arch", "deit-64x2x2", *SMALL, *ONE_STEP)
    assert losses(first[0]) == losses(second[0])
    run = first[0]
    first, second = outputs("finetune", run, *SMALL, *ONE_STEP)
    assert losses(first[0]) == losses(second[0])
    first, second = (json.loads(out) for _, out in outputs("eval", run, *SMALL, "--json"))
    assert first["decoded"] == second["decoded"] == len(MODES)
    assert [row["loss"] for row in first["rows"]] == [row["loss"] for row in second["rows"]]


def test_a_dit_and_its_latents_see_the_same_images(outputs, tiny_vae):
    first, second = outputs(
        "dit-train", "--arch", "dit-64x2x2-2", "--vae", "none", *SMALL, *ONE_STEP
    )
    assert losses(first[0]) == losses(second[0])
    encoded = outputs("dit-encode", "--vae", tiny_vae, *SMALL)
    shards = [
        [load_file(path) for path in sorted(Path(out).rglob("*.safetensors"))] for out, _ in encoded
    ]
    assert shards[0]
    for one, other in zip(*shards, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in other if name != "paths")


def test_plots_show_the_same_images(runs, twins, trained_once, monkeypatch):
    shown = []
    monkeypatch.setattr(plotted, "samples_figure", lambda images, *_: shown.append(images.numpy()))
    monkeypatch.setattr(
        plotted, "attention_figure", lambda image, *_, **__: shown.append(np.asarray(image))
    )
    monkeypatch.setattr("spiralrope_cli.core.jobs.plot.report", lambda *_: None)
    grey16 = next(twins[0].rglob("*16-bit-grey.png"))
    plain = twins[1] / grey16.relative_to(twins[0]).with_name(f"{grey16.name[:2]}.png")
    for words in (
        *[("samples", root / "val", "--num-samples", len(MODES)) for root in twins],
        *[("attention", trained_once, path) for path in (grey16, plain)],
    ):
        done = CliRunner().invoke(cli.app, ["plot", *map(str, words)])
        assert done.exit_code == 0, done.output + repr(done.exception)
    np.testing.assert_array_equal(shown[0], shown[1])
    np.testing.assert_array_equal(shown[2], shown[3])


@pytest.fixture
def fid(runs, inception_weights, monkeypatch):
    monkeypatch.setenv("SPIRALROPE_CACHE", str(runs / "cache"))

    def call(*words):
        words = [
            "fid",
            *words,
            "--select",
            "fid",
            "--weights",
            inception_weights,
            "--device",
            "cpu",
        ]
        done = CliRunner().invoke(cli.app, [*map(str, words), "--json"])
        if done.exit_code:
            return str(done.exception)
        return json.loads(done.stdout) | {"stderr": done.stderr}

    return call


def test_fid_counts_what_its_peers_read_otherwise(fid, twins):
    modes, plain = (root / "val" for root in twins)
    warned = f"{len(DIFFER)} image(s) of REFERENCE with transparency or 16-bit grey are read as "
    for cached in ([], ["fid"]):
        found = fid(plain, modes)
        assert found["reference"]["from_cache"] == cached
        assert found["fid"] > 1
        assert found["protocol"]["images"] == "as-pil"
        assert found["reference"]["read_differently"] == len(DIFFER)
        assert found["samples"]["read_differently"] == 0
        assert [line for line in found["warnings"] if "16-bit" in line] == [
            warned + "other FID tools do, not as in training (--images as-trained)"
        ]
    found = fid(plain, modes, "--images", "as-trained")
    assert found["reference"]["from_cache"] == []
    assert found["fid"] == pytest.approx(0, abs=1e-3)
    assert warned + "in training, not as other FID tools do" in found["warnings"]


def test_sixteen_bits_and_the_same_in_eight_have_no_distance(fid, runs):
    for name, dtype, factor in (("eight", np.uint8, 1), ("sixteen", np.uint16, 257)):
        (runs / name).mkdir()
        for number in range(6):
            levels = np.roll(LEVELS, number * SIDE).astype(dtype) * dtype(factor)
            Image.fromarray(levels).save(runs / name / f"{number}.png")
    assert fid("sixteen", "eight")["fid"] > 10
    assert fid("sixteen", "eight", "--images", "as-trained")["fid"] == pytest.approx(0, abs=1e-3)


def test_statistics_remember_how_images_were_read(fid, twins):
    modes, plain = (root / "val" for root in twins)
    assert "fid" in fid(modes, "--save-stats", "x.npz", "--images", "as-trained")
    assert "with different protocols cannot be compared" in fid(plain, "x.npz")
    found = fid(plain, "x.npz", "--images", "as-trained")
    assert found["fid"] == pytest.approx(0, abs=1e-3)
    np.savez("y.npz", np.zeros((4, 8, 8, 3), np.uint8))
    assert "--images" not in fid("y.npz", "x.npz", "--images", "as-trained")["stderr"]
    told = fid("y.npz", "y.npz", "--images", "as-trained")["stderr"]
    assert "--images has no effect: no image file is read" in told


def test_another_reading_is_another_result(fid, twins, inception_weights):
    modes, plain = (str(root / "val") for root in twins)
    run = FidRun(
        samples=plain, reference=modes, weights=str(inception_weights), result_file="x.json"
    )
    result = fid(plain, modes)
    Path("x.json").write_text(json.dumps(result))
    assert score.earlier_result(run) == result
    assert score.earlier_result(dataclasses.replace(run, images="as-trained")) == {}


def test_one_place_opens_images():
    """Others read images by it; reports only shrink and label what this package wrote."""
    package = Path(cli.__file__).parent
    opened = [path for path in package.rglob("*.py") if "Image.open(" in path.read_text()]
    places = {path.relative_to(package / "core").as_posix() for path in opened}
    assert places == {
        "data/images.py",
        "plots/images.py",
        "report/page.py",
        "runtime/trackers.py",
    }
