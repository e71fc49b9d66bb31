"""Words to rows: what `eval` understands, and what it refuses in a line or two."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from spiralrope_cli import main as cli
from spiralrope_cli.core.errors import CheckpointError, ConfigError, DataError, SpiralRopeError
from spiralrope_cli.core.jobs import evaluate

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints"


@pytest.fixture
def planned(runs, trained_once, monkeypatch):
    """Runs the command up to the launch; gives its output and the run that would be launched."""
    shutil.copytree(trained_once, runs / "runs" / "tiny")
    launched = []
    monkeypatch.setattr(evaluate, "launch", lambda job, run: launched.append(run))

    def call(*words):
        launched.clear()
        result = CliRunner().invoke(cli.app, ["eval", *map(str, words)])
        if isinstance(result.exception, SpiralRopeError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return launched[0], result.output

    return call


def ratios(run):
    return [row.protocol.crop_ratio for row in run.rows]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), [1.0]),
        (("--crop-ratio",), [0.875, 1.0]),
        (("--crop-ratio=0.9",), [0.9]),
        (("--crop-ratio", "0.9"), [0.9]),
        (("--crop-ratio", ".9", "--crop-ratio=0.8", "--crop-ratio", "9e-1"), [0.9, 0.8]),
        (("--crop-ratio", "--ema"), [0.875, 1.0]),
        (("--ema", "--crop-ratio"), [0.875, 1.0]),
        (("--crop-ratio", "runs/tiny"), [0.875, 1.0]),
        (("runs/tiny", "--crop-ratio", "0.5"), [0.5]),
        (("--crop-ratio", "--", "runs/tiny"), [0.875, 1.0]),
    ],
)
def test_crop_ratio_takes_a_value_or_none(planned, words, expected):
    run, _ = planned(*words)
    assert ratios(run) == expected
    assert {row.source for row in run.rows} == {"runs/tiny"}
    assert {row.ema for row in run.rows} == {"--ema" in words}


def test_without_a_source_the_newest_run_is_taken_and_said(planned):
    run, said = planned()
    assert "newest run: runs/tiny" in said
    (row,) = run.rows
    assert (row.checkpoint, row.step, row.weights) == ("last", 8, "raw")
    assert Path(row.file).name == "model.safetensors"
    assert Path(row.folder) == Path("runs/tiny").resolve()


def test_best_and_ema_choose_the_file(planned):
    run, _ = planned("--best", "--ema")
    (row,) = run.rows
    assert (row.checkpoint, row.step, row.weights) == ("best", 4, "EMA")
    assert Path(row.file).parts[-2:] == ("0000004", "ema.safetensors")


@pytest.mark.parametrize("way", [".", "link", "copy", "inside"])
def test_a_checkpoint_is_whole_by_whatever_path(planned, monkeypatch, way):
    place = Path("runs/tiny/checkpoints/0000008").resolve()
    inside = place.parent / "backup"
    if way == ".":
        monkeypatch.chdir(place)
    elif way == "link":
        Path("link").symlink_to(place)
    else:
        shutil.copytree(place, {"copy": Path("copy"), "inside": inside}[way])
    try:
        run, said = planned(str(inside) if way == "inside" else way, "--ema", "--data", "digits")
    finally:
        shutil.rmtree(inside, ignore_errors=True)
    (row,) = run.rows
    assert (row.weights, row.step) == ("EMA", 8 if way in (".", "link") else None)
    assert "raw weights alone" not in said


def test_all_gives_eight_rows_in_order(planned):
    run, said = planned("--all")
    assert [(row.checkpoint, row.protocol.crop_ratio, row.weights) for row in run.rows] == [
        (checkpoint, ratio, weights)
        for checkpoint in ("best", "last")
        for ratio in (0.875, 1.0)
        for weights in ("raw", "EMA")
    ]
    assert "without effect" not in said


def test_flags_beside_all_are_named_in_one_line(planned):
    run, said = planned("--all", "--ema", "--best", "--crop-ratio", "0.9")
    assert len(run.rows) == 8
    assert (
        "note: --ema, --best, --crop-ratio without effect: --all includes all of these rows" in said
    )


def test_a_published_file_has_four_rows_and_says_so(planned):
    file = GOLDEN / "deit_tiny_checkpoint.pth"
    run, said = planned(file, "--all")
    assert [(row.checkpoint, row.protocol.crop_ratio, row.weights) for row in run.rows] == [
        ("", ratio, weights) for ratio in (0.875, 1.0) for weights in ("raw", "EMA")
    ]
    assert "is a single checkpoint" in said
    assert Path(run.rows[0].folder) == GOLDEN
    _, said = planned(file, "--best")
    assert "--best without effect" in said


def test_a_file_with_one_set_of_weights_has_two_rows_and_says_so(planned):
    file = Path("runs/tiny/checkpoints/0000008/ema.safetensors")
    run, said = planned(file, "--all")
    assert ratios(run) == [0.875, 1.0]
    assert {row.weights for row in run.rows} == {"EMA"}
    assert "holds one set of weights" in said


def test_raw_weights_are_never_called_averaged(planned):
    run, said = planned("runs/tiny/checkpoints/0000008/model.safetensors", "--ema")
    assert [row.weights for row in run.rows] == ["raw"]
    assert "holds only raw weights" in said


def test_a_run_without_a_best_checkpoint_has_its_last(planned):
    Path("runs/tiny/checkpoints/best.json").unlink()
    run, said = planned("--all")
    assert {row.checkpoint for row in run.rows} == {"last"}
    assert "has no best checkpoint yet" in said


def test_other_image_sizes_keep_the_trained_grid(planned):
    run, _ = planned("--image-size", 8, "--image-size", "12x8", "--scaling", "extrapolate")
    own, other = run.rows
    assert own.model.pretrain_grid is None
    assert other.model.image_size == (12, 8)
    assert other.model.pretrain_grid == (4, 4)
    assert {row.rope.scaling for row in run.rows} == {"extrapolate"}


def test_published_weights_are_interpolated_at_other_sizes_unless_told(planned):
    file = GOLDEN / "deit_tiny_checkpoint.pth"
    run, _ = planned(file, "--image-size", 64, "--image-size", 96)
    assert [row.rope.scaling for row in run.rows] == ["extrapolate", "interpolate"]
    run, _ = planned(file, "--image-size", 96, "--scaling", "extrapolate")
    assert [row.rope.scaling for row in run.rows] == ["extrapolate"]


def test_data_is_the_option_then_the_runs_own_then_the_environment(planned, monkeypatch):
    monkeypatch.setenv("SPIRALROPE_DATA", "fashion-mnist")
    file = GOLDEN / "deit_tiny_checkpoint.pth"

    def data(*words):
        return planned(*words)[0].rows[0].protocol.data

    assert data() == "digits"
    assert data(file, "--data", "digits") == "digits"
    with pytest.raises(ConfigError, match="other classes than those of fashion-mnist"):
        data("--data", "fashion-mnist", "--image-size", 28)
    assert data(file) == "fashion-mnist"
    monkeypatch.delenv("SPIRALROPE_DATA")
    run, said = planned(file)
    assert run.rows[0].protocol.mean == (0.3054,) * 3
    assert "no --data and no $SPIRALROPE_DATA: using digits" in said


def test_rope_options_win_with_a_warning(planned):
    run, said = planned("--rotate", 1)
    assert run.rows[0].rope.rotate == 1
    assert "--rotate 1 contradicts runs/tiny" in said


def test_options_that_cannot_act_are_named(planned):
    _, said = planned("--workers", 2, "--skip-bad", "--max-freq", 3)
    for name in ("--workers", "--skip-bad", "--max-freq"):
        assert f"{name} has no effect" in said


def test_machine_options_arrive(planned):
    run, _ = planned("--nproc", 2, "--device", "cpu", "--precision", "fp32", "--compile", "--json")
    machine = run.machine
    assert (machine.nproc, machine.device, machine.precision) == (2, "cpu", "fp32")
    assert machine.compile == "on"
    assert run.output == "json"


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (("--crop-ratio", "1.5"), ConfigError, "--crop-ratio is 1.5; it must be in (0, 1]"),
        (("--crop-ratio", "-0.5"), ConfigError, "--crop-ratio is -0.5"),
        (("--crop-ratio", "0.9x"), ConfigError, "0.9x is not a file, a run folder"),
        (("--image-size", "7"), ConfigError, "--image-size 7 is not a multiple"),
        (("--json", "--csv"), ConfigError, "--json and --csv exclude each other"),
        (
            ("--data", "nowhere"),
            DataError,
            "--data nowhere is neither a folder nor a built-in name",
        ),
        (("runs/none",), CheckpointError, "runs/none does not exist"),
        (("deit-bb",), ConfigError, "deit-bb is not a file, a run folder or a published name"),
        (("--scaling", "x"), ConfigError, "--scaling is x"),
        (("--nproc", "-1"), ConfigError, "--nproc is -1"),
        ((GOLDEN / "dit_tiny_0000007.pt",), CheckpointError, "a DiT, not a classifier"),
        ((GOLDEN / "dit_tiny_raw.pth",), ConfigError, "does not contain its RoPE options"),
    ],
)
def test_what_cannot_be_is_refused_before_any_worker(planned, words, error, message):
    with pytest.raises(error) as caught:
        planned(*words)
    assert message in caught.value.message
    assert len(str(caught.value).splitlines()) <= 2


def test_other_classes_than_the_data_sets_are_refused(planned, image_folder):
    with pytest.raises(ConfigError, match="has 10 classes"):
        planned("--data", image_folder)


def test_no_run_at_all_is_refused(runs):
    with pytest.raises(CheckpointError, match="SOURCE is missing"):
        CliRunner().invoke(cli.app, ["eval"], catch_exceptions=False)


@pytest.mark.parametrize("word", ["--image-size=big", "--crop-ratio=x", "--rotate=x"])
def test_values_of_the_wrong_kind_are_named_by_their_option(planned, word):
    option, _, value = word.partition("=")
    with pytest.raises(ConfigError, match=f"^{option} is {value}; it must be ") as caught:
        planned(word)
    assert caught.value.exit_code == 2


def test_a_folder_of_validation_images_alone_is_enough(planned, runs):
    for number in range(10):
        folder = runs / "photos" / "val" / str(number)
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "0.png")
    run, _ = planned("--data", "photos")
    assert run.rows[0].protocol.num_val == 10
    (runs / "photos" / "val").rename(runs / "photos" / "train")
    with pytest.raises(DataError, match="photos has no val/"):
        planned("--data", "photos")
