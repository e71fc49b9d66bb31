"""Curves show what was logged, and what belongs to which run."""

from __future__ import annotations

import json

import pytest

from spiralrope_cli.core.errors import DataError
from spiralrope_cli.core.plots.curves import curves_figure, save_figure
from spiralrope_cli.core.runtime.progress import VALIDATED


@pytest.fixture
def logged(tmp_path):
    """Writes the metrics of a run; gives its folder."""

    def write(name, *, dit=False, steps=(2, 4, 6)):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        lines = []
        for step in steps:
            values = {"lr": 0.1 / step, "loss": 1 / step, "images_per_s": 90.0}
            values.update({"vb": 0.5 / step} if dit else {})
            lines.append({"step": step, "epoch": step / 2, **values})
            if not dit:
                measured = dict.fromkeys(VALIDATED, 0.0)
                measured |= {"acc1": 10.0 * step, "ema_acc1": 9.0 * step, "val_loss": 2 / step}
                lines.append({**measured, "step": step, "epoch": step / 2})
        content = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(content + '{"step": 8, "lo')
        return folder

    return write


def titles(figure):
    return [axis.get_title(loc="left") for axis in figure.axes]


def heights(axis):
    return [list(line.get_ydata()) for line in axis.lines]


def test_a_classifier_has_loss_accuracy_rate_and_speed(logged):
    figure = curves_figure([logged("a")])
    assert titles(figure) == ["Loss", "Validation acc@1 (%)", "Learning rate", "Images per second"]
    loss, accuracy, *_ = figure.axes
    assert heights(loss) == [[0.5, 0.25, 1 / 6], [1, 0.5, 1 / 3]]
    assert heights(accuracy) == [[20, 40, 60], [18, 36, 54]]
    assert list(loss.lines[0].get_xdata()) == [2, 4, 6]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["training", "validation"]


def test_one_log_point_stands_on_a_scale_from_zero(logged):
    for axis in curves_figure([logged("a", steps=(4,))]).axes:
        assert axis.get_xlim()[0] == axis.get_ylim()[0] == 0
        assert all(line.get_ydata()[0] < axis.get_ylim()[1] / 1.05 for line in axis.lines)
    assert curves_figure([logged("b")]).axes[2].get_ylim()[0] != 0


def test_a_diffusion_transformer_has_its_bound_and_nothing_empty(logged):
    figure = curves_figure([logged("a", dit=True)])
    assert titles(figure)[1].startswith("Variational bound")
    assert len(figure.axes) == 4
    assert all(axis.lines for axis in figure.axes)


def test_several_runs_differ_by_more_than_colour(logged):
    figure = curves_figure([logged("a"), logged("b", dit=True)], over="epoch")
    assert len(figure.axes) == 5
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    looks = {(line.get_color(), line.get_marker()) for line in figure.axes[-1].lines}
    assert len({color for color, _ in looks}) == len({marker for _, marker in looks}) == 2
    assert list(figure.axes[-1].lines[0].get_xdata()) == [1, 2, 3]


def test_equal_names_are_told_apart_by_their_folders(logged):
    figure = curves_figure([logged("one/a"), logged("two/a")])
    first, second = (text.get_text() for text in figure.legends[0].get_texts())
    assert first.endswith("one/a")
    assert second.endswith("two/a")


def test_a_single_point_is_seen(logged):
    figure = curves_figure([logged("a", steps=(2,))])
    assert all(line.get_marker() == "o" for axis in figure.axes for line in axis.lines)


def test_a_folder_of_samples_is_called_that(tmp_path):
    for name in ("samples.json", "samples.npz"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="has no metrics") as caught:
        curves_figure([tmp_path])
    assert caught.value.hint == "it is a folder of samples: fid and plot samples take it"


def test_a_run_without_metrics_is_told(tmp_path):
    with pytest.raises(DataError, match="has no metrics"):
        curves_figure([tmp_path])


def test_files_are_whole_or_absent(logged, tmp_path):
    figure = curves_figure([logged("a")])
    save_figure(figure, tmp_path / "new" / "a.SVG")
    assert (tmp_path / "new" / "a.SVG").read_bytes().startswith(b"<?xml")
    with pytest.raises(DataError, match="cannot be written"):
        save_figure(figure, tmp_path / "new" / "a.SVG" / "b.png")
