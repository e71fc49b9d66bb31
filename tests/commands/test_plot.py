"""`spiralrope plot`: pictures where they were asked for, and one line where there can be none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from spiralrope_cli import main
from spiralrope_cli.core.errors import SpiralRopeError
from spiralrope_cli.core.jobs.plot import read_image
from spiralrope_cli.core.plots import images as plotted
from spiralrope_cli.core.plots import rope
from spiralrope_cli.core.runtime.seeds import drawn_class

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints"
DEIT, DIT = GOLDEN / "deit_tiny_checkpoint.pth", GOLDEN / "dit_tiny_0000007.pt"


@pytest.fixture
def plot(runs):
    """`spiralrope plot ...` in this process; gives the file that it printed, or what it told."""

    def call(*words, expect=0):
        done = CliRunner().invoke(main.app, ["plot", *map(str, words)])
        if expect == 0:
            assert done.exit_code == 0, done.output + repr(done.exception)
            path = Path(done.stdout.strip())
            start = {".png": b"\x89PNG", ".svg": b"<?xml"}[path.suffix]
            assert path.read_bytes().startswith(start)
            return path, done.stderr
        if isinstance(done.exception, SpiralRopeError):
            assert done.exception.exit_code == expect
            assert "\n" not in done.exception.message
            return str(done.exception)
        assert done.exit_code == expect
        return done.stderr

    return call


@pytest.fixture
def run(runs):
    """Two runs below `runs/` that have logged something; gives the path of the first."""
    for name in ("one", "two"):
        folder = runs / "runs" / name
        folder.mkdir(parents=True)
        lines = [
            {"step": n, "epoch": n / 4, "loss": 1 / n, "lr": 0.1, "images_per_s": 9} for n in (1, 2)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return runs / "runs" / "one"


@pytest.fixture
def picture(runs, digit_pictures):
    """A digit as a picture file."""
    path = runs / "digit.png"
    Image.fromarray(digit_pictures[3]).resize((32, 32), Image.Resampling.NEAREST).save(path)
    return path


@pytest.fixture
def source(trained_once, runs):
    return Path(shutil.copytree(trained_once, runs / "runs" / "tiny"))


def test_runs_by_folder_or_by_name(plot, run):
    assert plot("run", run)[0] == Path("plots/run-one.png")
    assert plot("run", "one", "two")[0] == Path("plots/run-one-and-1-more.png")
    assert plot("run", "two", "--format", "svg", "--over", "epoch")[0] == Path("plots/run-two.svg")
    assert plot("run", "two", "--out", "a/b.svg")[0] == Path("a/b.svg")


def test_curves_come_without_torch(run):
    code = (
        "import sys\nfrom spiralrope_cli.main import app\n"
        "app(['plot', 'run', 'one'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=run.parents[1])


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["run", "onee"], 1, "did you mean one?"),
        (["run", "one", "--out", "a.bmp"], 2, "--out a.bmp must end in .png or .svg"),
        (["run", "one", "--format", "pdf"], 2, "--format is pdf"),
        (["run", "one", "--out", "a.png", "--format", "svg"], 2, "--format svg contradicts"),
        (["run", "one", "--over", "time"], 2, "--over is time"),
        (["rope", "--show", "all"], 2, "--show is all"),
        (["rope", "--grid", "0"], 2, "--grid 0x0"),
        (["rope", "--pretrain-grid", "999"], 2, "--pretrain-grid 999x999"),
        (["rope", "--head-dim", "10"], 2, "head dimension 10"),
        (["rope", "--arch", "deit-x"], 2, "--arch deit-x is unknown"),
        (["rope", "--rotate", "3", "--same-theta"], 2, "--rotate 3 with --same-theta"),
        (["rope", "--theta", "0"], 2, "--theta is 0"),
        (["rope", "--rope-kind", "axial", "--rotate", "2"], 2, "--rotate 2 does not fit"),
        (["rope", "--rope-kind", "mixed", "--layer", "12"], 2, "deit-s has layers 0 to 11"),
        (["rope", "--rope-kind", "mixed", "--show", "clamp"], 2, "--show clamp: RoPE-Mixed clamps"),
        (["rope", DEIT, "--rotate", "2"], 2, "--rotate and SOURCE exclude each other"),
        (["rope", DEIT, "--no-rope"], 2, "No such option"),
        (["attention", DEIT, "gone.png"], 1, "IMAGE gone.png does not exist"),
        (["attention", DEIT, DIT], 1, "cannot be read"),
        (["attention", "gone.pth", "digit.png"], 1, "gone.pth does not exist"),
        (["attention", DIT, "digit.png"], 1, "a DiT"),
        (["attention", DEIT, "digit.png", "--layer", "2"], 2, "--layer 2: "),
        (["attention", DEIT, "digit.png", "--head", "-1"], 2, "--head is -1"),
        (["attention", DEIT, "digit.png", "--head", "9"], 2, "0 to 1"),
        (["attention", DEIT, "digit.png", "--patch", "0,4"], 2, "rows 0 to 3, columns 0 to 3"),
        (["attention", DEIT, "digit.png", "--patch", "1"], 2, "it must be ROW,COL"),
        (["attention", DEIT, "digit.png", "--image-size", "33"], 2, "33"),
        (["attention", DEIT, "digit.png", "--out", "digit.png"], 2, "is IMAGE itself"),
        (["samples", "gone"], 1, "gone is not an .npz, a folder of images or a run"),
        (["samples", "gone.npz"], 1, "SOURCE gone.npz does not exist"),
        (["samples", "runs/one", "--num-samples", "0"], 2, "--num-samples is 0"),
        (["samples", "runs/one", "--columns", "-1"], 2, "--columns is -1"),
        (["samples", "runs/one"], 1, "holds no images"),
        (["samples", "digit.png"], 1, "neither a folder of images nor an .npz"),
    ],
)
def test_bad_input_has_its_own_line(plot, run, picture, words, code, told):
    assert told in plot(*words, expect=code)


def test_damaged_lines_of_a_run_are_counted_and_the_rest_is_drawn(plot, run):
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\x00 no text\n{"step": 3}\n{"step": 4, "lo')
    _, told = plot("run", "one")
    assert "metrics.jsonl: 3 damaged line(s) are passed over" in told


def test_more_than_the_memory_holds_is_told_before_it_is_read(plot, runs, monkeypatch):
    np.savez_compressed(runs / "a.npz", np.zeros((5, 40, 40, 3), np.uint8))
    monkeypatch.setattr("spiralrope_cli.core.jobs.plot.DRAWN_BYTES", 10**12)
    monkeypatch.setattr("spiralrope_cli.core.data.images.stream_rows", None)
    assert "needed for 5 images of a.npz" in plot("samples", "a.npz", expect=1)


def test_an_empty_run_is_told(plot, run):
    (run / "metrics.jsonl").write_text("")
    assert "has no metrics" in plot("run", "one", "two", expect=1)


def test_a_pipeline_stands_for_its_samples_and_names_its_runs(plot, run, digit_pictures, picture):
    drawn = run.parent / "pipe" / "dit-sample"
    drawn.mkdir(parents=True)
    (run.parent / "pipe" / "pipeline.json").write_text("{}")
    np.savez(drawn / "samples.npz", arr_0=digit_pictures[:4])
    assert plot("samples", "pipe")[0] == Path("plots/samples-pipe.png")
    trained = run.parent / "pipe" / "dit-train"
    trained.mkdir()
    (trained / "config.yaml").write_text("command: dit-train\n")
    assert "name a run in it: runs/pipe/dit-train" in plot("run", "pipe", expect=1)
    shutil.copy(run / "metrics.jsonl", trained)
    assert plot("run", "pipe")[0] == Path("plots/run-dit-train.png")
    (trained / "metrics.jsonl").unlink()
    assert "name a run in it: runs/pipe/dit-train" in plot(
        "attention", "runs/pipe", picture, expect=1
    )


def test_options_reach_the_rope(plot, monkeypatch):
    seen = []
    draw = rope.rope_figure
    monkeypatch.setattr(rope, "rope_figure", lambda plot, _: (seen.append(plot), draw(plot))[1])
    words = ("--rotate", 1, "--rotate", 4, "--theta", 100, "--arch", "dit-xl2", "--grid", "7x28")
    CliRunner().invoke(main.app, ["plot", "rope", *map(str, words)])
    assert [(rope.rotate, rope.theta) for rope in seen[0].ropes] == [(1, 100), (4, 100)]
    assert (seen[0].head_dim, seen[0].grid, seen[0].pretrain_grid) == (72, (7, 28), (7, 28))
    CliRunner().invoke(main.app, ["plot", "rope", "--pretrain-grid", "8"])
    assert (seen[1].head_dim, seen[1].grid, seen[1].pretrain_grid) == (64, (14, 14), (8, 8))


def test_a_rope_is_drawn_and_idle_options_are_told(plot):
    path, told = plot("rope", "--rotate", 1, "--projection", "exact", "--scaling", "extrapolate")
    assert path == Path("plots/rope-r1.png")
    assert "--projection has no effect: with --rotate 1" in told
    assert "--scaling has no effect" in told
    _, told = plot("rope", "--rotate", 1, "--rotate", 2, "--projection", "exact", "--show", "clamp")
    assert told.split("\n")[0] == "rotate 2 changes queries by 36.3% against axial RoPE"
    assert "no effect" not in told


def test_the_rope_of_weights_is_drawn(plot, monkeypatch):
    seen = []
    draw = rope.rope_figure
    monkeypatch.setattr(rope, "rope_figure", lambda *given: (seen.append(given), draw(*given))[1])
    assert plot("rope", DEIT)[0] == Path("plots/rope-r2.png")
    of_file = seen[0][0]
    assert (of_file.ropes[0].rotate, of_file.head_dim, of_file.grid) == (2, 32, (4, 4))
    assert plot("rope", "--rope-kind", "axial")[0] == Path("plots/rope-axial.png")
    assert seen[1][0].ropes[0].rotate == 0
    assert plot("rope", "--rope-kind", "mixed", "--layer", 1)[0] == Path("plots/rope-mixed.png")
    assert seen[2][1].shape == (2, 6, 32)
    assert seen[2][0].panels == ("rose", "frequencies", "score"), "there is nothing to clamp"
    _, told = plot("rope", "--layer", 1, "--show", "rose")
    assert "--layer has no effect" in told


def test_attention_of_a_run_of_a_file_and_of_a_patch(plot, source, picture, monkeypatch):
    seen = []
    draw = plotted.attention_figure
    monkeypatch.setattr(
        plotted,
        "attention_figure",
        lambda shown, maps, **more: (seen.append((shown, maps, more)), draw(shown, maps, **more))[
            1
        ],
    )
    assert plot("attention", source, picture)[0] == Path("plots/attention-tiny-digit.png")
    plot("attention", source, picture, "--ema", "--layer", 0, "--layer", 1, "--patch", "1,2")
    plot("attention", DEIT, picture, "--head", 1, "--image-size", "48x32", "--out", "x.svg")
    (grey, last, told), (_, both, patch), (color, one, wide) = seen
    assert grey.shape == (8, 8)
    assert last.shape == (1, 2, 17)
    assert last.sum(-1) == pytest.approx(1, abs=1e-5)
    assert (told["layers"], told["heads"], told["patch"]) == ((1,), (0, 1), None)
    assert both.shape == (2, 2, 17)
    assert (patch["layers"], patch["patch"]) == ((0, 1), (1, 2))
    assert not np.allclose(last[0], both[1])
    assert color.shape == (48, 32, 3)
    assert wide["grid"][0] * wide["grid"][1] == one.shape[-1] - 1


def test_what_a_network_sees_is_what_eval_shows_it(source, digit_pictures):
    """A digit as a file has the same values as the data set gives."""
    from spiralrope_cli.core.data.memory import load_digits
    from spiralrope_cli.core.hub.source import find_source
    from spiralrope_cli.core.weights import read_weights

    _, val = load_digits()
    path = source / "digit.png"
    Image.fromarray(val.images[0, 0].numpy()).save(path)
    _, images = read_image(str(path), read_weights(find_source(str(source))), (8, 8))
    expected = (val.images[:1].float() / 255 - 0.3054) / 0.3760
    assert images.numpy() == pytest.approx(expected.numpy(), abs=1e-5)


def test_a_bare_state_dict_takes_rope_options(plot, picture, runs):
    import torch

    from spiralrope_cli import load_model

    torch.save(load_model(DEIT).state_dict(), runs / "bare.pth")
    assert "does not contain its RoPE options" in plot("attention", "bare.pth", picture, expect=2)
    plot("attention", "bare.pth", picture, "--rotate", 2, "--arch", "deit-64x2x2")


@pytest.fixture
def labels_of(plot, monkeypatch):
    """The labels that `plot samples` writes."""
    seen = []
    draw = plotted.samples_figure
    monkeypatch.setattr(
        plotted,
        "samples_figure",
        lambda levels, labels, *more: (seen.append((levels, labels)), draw(levels, labels, *more))[
            1
        ],
    )

    def call(*words):
        plot("samples", *words)
        return seen[-1]

    return call


def make_samples(folder, images, **facts):
    from spiralrope_cli.core.data.sample_files import SampleFiles

    folder.mkdir(parents=True)
    files = SampleFiles(folder, len(images), images.shape[2:])
    files.begin(facts)
    files.put(range(len(images)), images)
    files.finish(facts)


def test_samples_of_a_run_have_their_classes(labels_of, runs, plot):
    import torch

    images = torch.randint(0, 255, (6, 3, 8, 8), dtype=torch.uint8)
    facts = {"num_classes": 10, "seed": 3, "data": "fashion-mnist"}
    make_samples(runs / "runs" / "dealt", images, classes=[9, 1], **facts)
    make_samples(runs / "runs" / "drawn", images, classes=[], **{**facts, "data": "digits"})
    levels, labels = labels_of("dealt", "--num-samples", 5)
    assert torch.equal(levels, images[:5])
    assert labels == ["Ankle boot", "Trouser"] * 2 + ["Ankle boot"]
    assert labels_of("dealt", "--no-labels")[1] == []
    _, labels = labels_of("runs/drawn/samples.npz", "--columns", 2)
    assert labels == [str(drawn_class(3, 10, number)) for number in range(6)]
    drawn = runs / "runs" / "drawn"
    (drawn / "samples.npz").rename(drawn / "samples.npz.part")
    assert "is not finished" in plot("samples", "drawn", expect=1)
    (drawn / "samples.json").unlink()
    for name in ("config.yaml", "sources.json"):
        (drawn / name).write_text("")
    assert "is a training run" in plot("samples", "drawn", expect=1)


def test_other_peoples_files_and_folders(labels_of, plot, image_folder, runs):
    pixels = np.zeros((3, 8, 12, 3), np.uint8)
    np.savez("adm.npz", arr_0=pixels, arr_1=np.array([7, 8, 9]))
    np.savez("plain.npz", arr_0=pixels[:1])
    assert labels_of("adm.npz")[1] == ["7", "8", "9"]
    levels, labels = labels_of("plain.npz")
    assert (levels.shape, labels) == ((1, 3, 8, 12), [])
    assert labels_of(image_folder / "train", "--num-samples", 9)[1] == ["dark"] * 8 + ["light"]
    mixed = runs / "mixed"
    mixed.mkdir()
    for number, size in enumerate([(8, 8), (30, 10)]):
        Image.new("RGB", size, "black").save(mixed / f"{number}.png")
    levels, labels = labels_of(mixed)
    assert (levels.shape, labels) == ((2, 3, 8, 8), [])
    assert levels[1, :, 0].min() == 255  # the wide one lies on white
    (mixed / "2.png").write_bytes(b"no picture")
    assert "2.png cannot be read" in plot("samples", mixed, expect=1)
    np.savez("statistics.npz", mu=np.zeros(2048), sigma=np.eye(2048, dtype=np.float64))
    assert "holds statistics, but no images" in plot("samples", "statistics.npz", expect=1)
