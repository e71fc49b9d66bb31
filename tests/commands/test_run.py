"""Whole pipelines by one command: stages in order, each once, and what stops them."""

from __future__ import annotations

import json
import re
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from spiralrope_cli import main as cli
from spiralrope_cli.core.config.models import RopeConfig
from spiralrope_cli.core.config.pipelines import DEIT_SCRIPT, DIT_SCRIPT
from spiralrope_cli.core.config.sweeps import SWEPT
from spiralrope_cli.core.errors import DataError, SpiralRopeError
from spiralrope_cli.core.hub.source import find_source
from spiralrope_cli.core.jobs import pipeline as pipelines
from spiralrope_cli.core.jobs import sample, train
from spiralrope_cli.core.jobs.pipeline import settle_deit
from spiralrope_cli.core.jobs.sweep import acting, settle_sweep, spread
from spiralrope_cli.core.load import starting_point
from spiralrope_cli.core.models.factory import create_model
from spiralrope_cli.core.report import page
from spiralrope_cli.core.resolve import resolve
from spiralrope_cli.core.runtime.distributed import StopRequest
from spiralrope_cli.core.runtime.progress import read_metrics
from spiralrope_cli.core.runtime.seeds import seed_everything
from spiralrope_cli.core.training import classification

FAST = ("--precision", "fp32", "--nproc", "1", "--log-every", "2")
SMALL = ("--arch", "deit-32x2x2", "--max-steps", "4", *FAST)
DEIT = (*SMALL, "--finetune-max-steps", "2")
DIT = (
    *(
        "--arch",
        "dit-32x2x2-2",
        "--max-steps",
        "4",
        "--num-samples",
        "5",
        "--num-sampling-steps",
        "4",
    ),
    *FAST,
)


@pytest.fixture
def run(runs):
    """Runs the command here; gives stdout and stderr, or the error."""

    def call(*words, expect=0):
        result = CliRunner().invoke(cli.app, ["run", *map(str, words)])
        if isinstance(result.exception, SpiralRopeError):
            assert result.exception.exit_code == expect, result.exception
            return "", str(result.exception)
        assert result.exit_code == expect, result.output + repr(result.exception)
        return result.stdout, result.stderr

    return call


@pytest.fixture
def launched(monkeypatch):
    """The jobs that stages launch, in order."""
    jobs, plain = [], train.launch

    def noted(work, *given):
        jobs.append(work.__module__.split(".")[-1])
        plain(work, *given)

    for module in (train, sample, pipelines):
        monkeypatch.setattr(module, "launch", noted)
    return jobs


def trainings(pipeline):
    return [stage.config.run for stage in pipeline.stages[:-1]]


def rows(folder):
    return json.loads((Path(folder) / "eval.json").read_text())["rows"]


def marks(folder):
    return list(json.loads((Path(folder) / "pipeline.json").read_text())["stages"])


def test_deit_runs_every_stage_once(run, launched):
    folder = Path("runs/run-deit-deit-32x2x2-digits-r2")
    said, _ = run("deit", *DEIT)
    assert launched == ["train", "train", "evaluate"]
    assert marks(folder) == ["pretrain", "finetune", "eval"]
    assert len(rows(folder / "finetune")) == 8
    assert "0.875" in said
    before = (folder / "pipeline.json").read_bytes()
    again, printed = run("deit", *DEIT)
    assert len(launched) == 3
    assert [line for line in said.splitlines() if "best, EMA" in line][-2:] == [
        line for line in again.splitlines() if "best, EMA" in line
    ]
    assert "pretrain is finished: 4 steps" in printed
    assert (folder / "pipeline.json").read_bytes() == before

    _, printed = run("deit", *DEIT, "--seed", "1", expect=1)
    assert "pretrain holds a run with other options: --seed was 0, now 1" in printed
    run("deit", *SMALL, "--eval-only", "--no-finetune")
    assert launched[3:] == ["evaluate"]
    assert len(rows(folder / "pretrain")) == 8
    # Figures count for the very weights that they were measured of.
    measured = json.loads((folder / "pretrain" / "eval.json").read_text())
    for row in measured["rows"]:
        row["sha256"] = "of others"
    (folder / "pretrain" / "eval.json").write_text(json.dumps(measured))
    run("deit", *SMALL, "--eval-only", "--no-finetune")
    assert launched[4:] == ["evaluate"]
    _, printed = run("deit", *DEIT, "--finetune-lr", 0.5, expect=1)
    assert "finetune holds a run with other options: --finetune-lr was" in printed
    assert printed.startswith("finetune: ")
    run("deit", "--out", folder, "--eval-only")
    _, printed = run("deit", "--out", folder, "--eval-only", "--rotate", 4, expect=1)
    assert "--rotate was 2, now 4" in printed


def test_what_finetuning_starts_from_is_what_pretraining_left(run):
    run("deit", *DEIT, "--rotate", 4, "--out", "here", "--drop-path", 0.1)
    given = {"arch": "deit-32x2x2", "rotate": 4, "max_steps": 4, "drop_path": 0.1, "seed": 3}
    own = {"finetune_lr": 3e-3, "finetune_max_steps": 2, "precision": "fp32", "out": "there"}
    first, second = trainings(settle_deit({**given, **own}))
    assert (first.command, first.out, first.optim.max_steps) == ("pretrain", "there/pretrain", 4)
    assert (second.command, second.source) == ("finetune", "there/pretrain")
    assert (second.optim.lr, second.optim.max_steps, second.seed) == (3e-3, 2, 3)
    # The plan knows before what reading the weights would tell afterwards.
    start, _ = starting_point(find_source("here/pretrain"), {})
    single = {"lr": 3e-3, "max_steps": 2, "precision": "fp32", "seed": 3, "out": second.out}
    read = resolve("finetune", single, start=start).run
    assert replace(read, source=second.source) == second


def test_a_stage_that_stops_or_fails_ends_the_command_with_its_code(run, launched, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            StopRequest,
            "agreed",
            lambda self, device, ask_all: signal.SIGTERM if ask_all else 0,
        )
        run("deit", *DEIT, "--out", "here", expect=143)
    assert launched == ["train"]
    assert not Path("here/finetune").exists()
    run("deit", *DEIT, "--out", "here", "--skip-training")
    assert launched == ["train", "train", "evaluate"]
    _, printed = run("deit", *DEIT, "--out", "here", expect=1)
    assert "was trained from other weights: here/pretrain is not finished" in printed

    def broken(*words):
        raise DataError("the disk is on fire")

    monkeypatch.setattr(classification, "validate", broken)
    _, printed = run("deit", *DEIT, "--out", "there", expect=1)
    assert printed == "the disk is on fire"
    assert launched[3:] == ["train"]
    assert not Path("there/pipeline.json").exists()


@pytest.mark.parametrize(
    ("words", "code", "printed"),
    [
        (["--eval-only"], 1, "run-deit-deit-ti-digits-r2/finetune holds no checkpoint"),
        (["--skip-training"], 1, "run-deit-deit-ti-digits-r2/pretrain holds no checkpoint"),
        (["--skip-training", "--eval-only"], 2, "exclude each other"),
        (["--skip-training", "--no-finetune"], 2, "leave nothing to train"),
        (["--name", "x", "--out", "y"], 2, "--name x and --out y both name the run folder"),
        (["--no-finetune", "--finetune-lr", 1], 2, "--finetune-lr has no effect"),
        (
            ["--finetune-epochs", 1, "--finetune-warmup-epochs", 1],
            2,
            "finetune: --finetune-warmup-epochs 1 is as long",
        ),
        (["--sweep", "rotate=1,2", "--name", "x", "--out", "y"], 2, "--name x and --out y both"),
        (["--sweep", "rotate"], 2, "is not NAME=V,V"),
        (["--sweep", "seed=1,2"], 2, "seed cannot be swept"),
        (
            ["--sweep", "rotate=1,x"],
            2,
            "x must be a whole number, 0 or more; it is half the number of directions",
        ),
        (["--sweep", "lr=1,x"], 2, "x must be a number, 0 or more"),
        (["--sweep", "same_theta=1"], 2, "1 must be true or false"),
        (["--sweep", "rotate=1,1"], 2, "has a value twice"),
        (["--sweep", "rotate=1", "--sweep", "rotate=2"], 2, "--sweep rotate is given twice"),
        (["--sweep", "rotate=none", "--sweep", "rope=true"], 2, "mean the same"),
        (["--sweep", "rotate=1,2", "--rotate", 2], 2, "--rotate is given twice, also in --sweep"),
        (
            ["--sweep", "rotate=none,2", "--rotate", 2],
            2,
            "--rotate is given twice, also in --sweep",
        ),
        (
            ["--sweep", "steps=1,2", "--max-steps", 2],
            2,
            "--max-steps is given twice, also in --sweep",
        ),
        (["--sweep", "steps=1", "--sweep", "max-steps=2"], 2, "--sweep max_steps is given twice"),
        (["--sweep", "rope=true,false", "--no-rope"], 2, "--rope is given twice, also in --sweep"),
        (["--sweep", "rope-kind=none,axial", "--sweep", "rope=true"], 2, "mean the same"),
        (["--sweep", "rotate=mixed,2", "--sweep", "rope-kind=axial"], 2, "mean the same"),
        (["--sweep", "rotate=2,4", "--rope-kind", "axial"], 2, "rotate=2: --rotate 2 does not fit"),
        (["--sweep", "rotate=1,5", "--same-theta"], 2, "rotate=5: --rotate 5 with --same-theta"),
        (["--seeds", "1;2"], 2, "--seeds is 1;2; it must be a list of numbers, such as 0,1,2"),
        (["--seeds", "1,2", "--seed", 1], 2, "exclude each other"),
        (["--from-legacy", "4", "--lr", 1], 2, "--from-legacy allows no other options"),
        (["--from-legacy", "4", "--eval-only"], 2, "--from-legacy allows no other options"),
        (["--from-legacy", "4", "--no-finetune"], 2, "--from-legacy allows no other options"),
        (["--from-legacy", "4", "--sweep", "lr=1,2"], 2, "--from-legacy allows no other options"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(run, launched, words, code, printed):
    assert printed in run("deit", *words, expect=code)[1]
    assert not launched


@pytest.mark.parametrize(
    ("words", "code", "printed"),
    [
        (["--name", "x", "--out", "y"], 2, "--name x and --out y both name the run folder"),
        (
            ["--num-sampling-steps", 1],
            2,
            "--num-sampling-steps 1: it must be 2 to 1000",
        ),
        (["--num-sampling-steps", "ddim300"], 2, "use --num-sampling-steps 300"),
        (["--sampling-seed", -1], 2, "--sampling-seed is -1"),
        (["--sampler", "dpm++", "--num-sampling-steps", 1000], 2, "dpm++ takes at most 999"),
        (["--sampler", "euler"], 2, "--sampler is euler"),
        (["--cfg-scale", 0], 2, "--cfg-scale is 0"),
        (["--num-samples", 0], 2, "--num-samples is 0"),
        (["--max-steps", -1], 2, "--max-steps is -1"),
        (["--rotate", -1], 2, "--rotate is -1"),
        (["--arch", "dit-x"], 2, "--arch dit-x"),
        (["--reference", "gone.npz"], 1, "REFERENCE gone.npz does not exist"),
        (["--fid-every", 5], 2, "--fid-every 5 needs --reference"),
        (["--sweep", "drop_path=0,1"], 2, "drop_path cannot be swept"),
        (["--sweep", "rotate=none,2", "--rotate", 2], 2, "--rotate is given twice, also in"),
        (["--sweep", "rotate=1,x"], 2, "x must be a whole number, 0 or more"),
        (["--sweep", "arch=dit-s2,dit-q2"], 2, "arch=dit-q2: --arch dit-q2 is unknown"),
        (["--seeds", "1,1"], 2, "--seeds 1,1 has a number twice"),
        (["--seeds", "1,2", "--seed", 1], 2, "exclude each other"),
    ],
)
def test_what_a_dit_cannot_be_is_refused_before_it_trains(run, launched, words, code, printed):
    assert printed in run("dit", *words, expect=code)[1]
    assert not launched


def test_the_processes_of_a_launcher_are_not_joined(run, launched, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for kind in ("deit", "dit"):
        assert "use --nproc" in run(kind, expect=2)[1]
    assert not launched


def test_a_dry_run_plans_all_stages_and_writes_nothing(run, runs):
    _, printed = run("deit", *DEIT, "--dry-run")
    assert [line for line in printed.splitlines() if line.startswith("[")] == [
        "[1/3] pretrain",
        "[2/3] finetune",
        "[3/3] eval",
    ]
    _, printed = run("dit", *DIT, "--dry-run")
    assert "5 images from the EMA weights" in printed
    assert "fid is skipped: there is no --reference" in printed
    _, printed = run("deit", *DEIT, "--sweep", "rotate=0,1", "--dry-run")
    assert "note: rotate=0 and rotate=1 are both plain axial RoPE" in printed
    assert "== 2/2: rotate=1, seed 0" in printed
    assert not list(runs.iterdir())


def test_the_folder_of_another_pipeline_is_refused(run, runs, launched):
    (runs / "there").mkdir()
    (runs / "there" / "pipeline.json").write_text('{"command": "run deit"}')
    said = run("dit", *DIT, "--out", "there", expect=1)[1]
    assert "--out there is the folder of spiralrope run deit" in said
    run("deit", *DEIT, "--out", "there", "--dry-run")
    assert not launched


def test_a_sweep_by_an_old_spelling_goes_on_in_its_folders():
    sweep = settle_sweep("deit", {"sweep": ("finetune-steps=20,30",), "arch": "deit-32x2x2"})
    assert sweep.notes == ("--sweep finetune_steps is now finetune_max_steps",)
    assert Path(sweep.runs[1].pipeline.folder).name == "finetune_steps=30-seed0"
    assert sweep.runs[1].pipeline.stages[1].config.run.total_steps == 30


def test_a_sweep_runs_the_grid_and_sums_it_up(run, launched):
    axes = ("--sweep", "rotate=none,2", "--sweep", "same_theta=true,false", "--seeds", "0,3")
    words = ("deit", *SMALL, "--no-finetune", *axes, "--keep-last", 1)
    said, printed = run(*words)
    # Without RoPE same_theta changes nothing.
    assert "rotate=none same_theta=false is the same as rotate=none same_theta=true" in printed
    assert launched == ["train", "evaluate"] * 6
    folder = Path("runs/sweep-deit-deit-32x2x2-digits")
    found = json.loads((folder / "sweep.json").read_text())["rows"]
    assert len(found) == 3 * 8
    last = [
        r for r in found if (r["checkpoint"], r["weights"], r["crop_ratio"]) == ("last", "raw", 1)
    ]
    assert [each["point"] for each in last] == [
        {"rotate": "none", "same_theta": "true"},
        {"rotate": "2", "same_theta": "true"},
        {"rotate": "2", "same_theta": "false"},
    ]
    assert all(each["seeds"] == [0, 3] and each["usual_crop"] for each in last)
    one = folder / "rotate=2-same_theta=true-seed3" / "pretrain"
    values = [r for r in rows(one) if (r["checkpoint"], r["weights"]) == ("last", "raw")]
    assert last[1]["acc1"]["values"][1] == values[-1]["acc1"]
    assert f"{last[1]['acc1']['mean']:.2f} ± {last[1]['acc1']['std']:.2f}" in said
    again, _ = run(*words)
    assert len(launched) == 12
    assert said.endswith(again)
    assert again.count(" ± ") == 1 + 3 * 3


def test_points_share_all_but_what_is_swept(runs):
    grid = {"sweep": ("rotate=none,1,4",), "seeds": (0, 3)}
    sweep = settle_sweep("deit", {"arch": "deit-32x1x1", "epochs": 9, **grid})
    assert len(sweep.runs) == 6
    for seed in (0, 3):
        mine = [trainings(each.pipeline) for each in sweep.runs if each.seed == seed]
        same = [
            [replace(run, out="", source="", rope=RopeConfig()) for run in runs] for runs in mine
        ]
        assert same[0] == same[1] == same[2]
        assert {run.seed for run in same[0]} == {seed}
        weights = []
        for first, _ in mine:
            seed_everything(first.seed, "init")
            model = create_model(first.arch, rope=first.rope, **asdict(first.model))
            weights.append(model.state_dict())
        assert all(weights[0].keys() == each.keys() for each in weights)
        assert all(torch.equal(weights[0][name], each[name]) for each in weights for name in each)


def test_kinds_are_swept_with_rotate_or_on_their_own(runs):
    for words, rotate in (
        (("rotate=none,axial,mixed,4",), {}),
        (("rope-kind=none,axial,mixed,spiral",), {"rotate": 4}),
    ):
        sweep = settle_sweep("deit", {"arch": "deit-32x1x1", "sweep": words, **rotate})
        ropes = [trainings(each.pipeline)[0].rope for each in sweep.runs]
        assert [rope.name for rope in ropes] == ["no RoPE", "axial", "mixed", "rotate 4"]
        weights = []
        for rope in ropes:
            seed_everything(0, "init")
            weights.append(create_model("deit-32x1x1", rope=rope).state_dict())
        assert all(
            torch.equal(weights[0][name], each[name]) for each in weights for name in weights[0]
        )
    sweep = settle_sweep("deit", {"arch": "deit-32x1x1", "sweep": ("rotate=0,axial",)})
    assert sweep.notes == ("rotate=axial is the same as rotate=0, and runs once",)


def test_spread_is_the_sample_deviation():
    assert spread([1.0, 3.0]) == {"mean": 2.0, "std": 2**0.5, "values": [1.0, 3.0]}
    assert spread([1.0])["std"] is None


def test_every_rope_option_can_be_swept():
    fields = set(RopeConfig.__dataclass_fields__) - {"enabled"} | {"rope"}
    assert fields | {"lr", "arch", "drop_path"} <= SWEPT["deit"].keys()
    assert fields | {"lr", "arch"} <= SWEPT["dit"].keys()


def test_options_that_cannot_act_make_no_other_network():
    plain = RopeConfig(rotate=1)
    assert acting(replace(plain, same_theta=True, projection="exact")) == plain
    assert acting(replace(plain, enabled=False, rotate=4)) == RopeConfig(enabled=False)
    assert acting(RopeConfig(same_theta=True)) == RopeConfig(same_theta=True)


def test_dit_runs_every_stage_once(run, launched):
    _, printed = run("dit", *DIT)
    folder = Path("runs/run-dit-dit-32x2x2-2-digits-r0")
    assert launched == ["train", "sample"]
    assert marks(folder) == ["dit-train", "dit-sample"]
    assert (folder / "dit-sample" / "samples.npz").is_file()
    assert "fid is skipped: there is no --reference" in printed
    _, printed = run("dit", *DIT)
    assert "dit-sample is finished: 5 images" in printed
    assert len(launched) == 2
    _, printed = run("dit", *DIT, "--num-samples", 6, expect=1)
    assert "holds other samples: num was 5, now 6" in printed
    _, printed = run("dit", *DIT, "--reference", "gone.npz", expect=1)
    assert "gone.npz" in printed


def test_dit_measures_where_reference_and_weights_are(
    run, launched, inception_weights, image_folder
):
    reference = ("--reference", image_folder / "val")
    _, printed = run("dit", *DIT, *reference)
    assert "fid is skipped: the Inception weights are not downloaded" in printed
    with_weights = (*reference, "--weights", inception_weights)
    said, _ = run("dit", *DIT, *with_weights)
    assert launched == ["train", "sample", "score"]
    folder = Path("runs/run-dit-dit-32x2x2-2-digits-r0")
    result = json.loads((folder / "fid.json").read_text())
    assert f"{result['fid']:.4f}" in said
    again, _ = run("dit", *DIT, *with_weights)
    assert f"{result['fid']:.4f}" in again
    assert len(launched) == 3
    (folder / "fid.json").write_text("{")
    run("dit", *DIT, *with_weights)
    assert launched[3:] == ["score"]
    assert json.loads((folder / "fid.json").read_text())["fid"] == result["fid"]
    replaced = shutil.copytree(image_folder / "val", Path("reference"))
    shutil.copytree(replaced / "dark", replaced / "once-more")
    replacing = ("--reference", replaced, "--weights", inception_weights)
    run("dit", *DIT, *replacing)
    shutil.rmtree(replaced / "once-more")
    run("dit", *DIT, *replacing)
    assert launched[4:] == ["score"] * 2
    assert json.loads((folder / "fid.json").read_text())["fid"] == result["fid"]
    other = Path("other.pth")
    torch.save(torch.load(inception_weights), other)
    run("dit", *DIT, *reference, "--weights", other)
    assert launched[6:] == ["score"]
    assert json.loads((folder / "fid.json").read_text())["protocol"]["weights"] == str(other)
    _, printed = run("dit", *DIT, "--num-samples", 3, expect=1)
    assert "num was" in printed
    assert "remove runs/run-dit-dit-32x2x2-2-digits-r0/dit-sample to sample again" in printed


def test_a_sweep_of_a_dit_has_pairs_of_seeds_and_a_table(
    run, launched, inception_weights, digit_pictures, monkeypatch
):
    np.savez("real.npz", arr_0=digit_pictures[:4])
    score = ("--reference", "real.npz", "--weights", inception_weights)
    words = ("dit", *DIT, "--num-samples", 3, *score, "--sweep", "rotate=2", "--seeds", "0,3")
    first = settle_sweep("dit", {"arch": "dit-32x2x2-2", "sweep": ("rotate=none,0,axial,2",)})
    assert first.notes == ("rotate=axial is the same as rotate=0, and runs once",)
    trained = [
        replace(each.pipeline.stages[0].config.run, out="", rope=RopeConfig())
        for each in first.runs
    ]
    assert trained[0] == trained[1] == trained[2], "all but RoPE is the same, also what is drawn"
    assert len({str(each.pipeline.stages[1].config["seed"]) for each in first.runs}) == 1
    # Pages of single stages take most of the time.
    monkeypatch.setattr(train, "report", lambda out: (out / "curves.png").touch())
    plain = page.leave_report
    of_sweep = lambda folder: plain(folder) if folder.name.startswith("sweep") else None  # noqa: E731
    monkeypatch.setattr(page, "leave_report", of_sweep)
    said, _ = run(*words)
    assert launched == ["train", "sample", "score"] * 2
    folder = Path("runs/sweep-dit-dit-32x2x2-2-digits")
    found = json.loads((folder / "sweep.json").read_text())["rows"]
    assert [each["point"] for each in found] == [{"rotate": "2"}]
    for each in found:
        assert (each["seeds"], each["images"]) == ([0, 3], 3)
        of_point = [folder / f"rotate={each['point']['rotate']}-seed{seed}" for seed in (0, 3)]
        scores = [json.loads((one / "fid.json").read_text())["fid"] for one in of_point]
        losses = [read_metrics(one / "dit-train")[-1]["loss"] for one in of_point]
        assert each["fid"] == spread(scores)
        assert each["training_loss"] == spread(losses)
        assert f"{each['fid']['mean']:.2f} ± {each['fid']['std']:.2f}" in said
        assert "kid" not in each, "which 3 images do not have"
    assert f"{found[0]['fid']['mean']:.2f} ±" in (folder / "report.html").read_text()
    shutil.rmtree(folder / "rotate=2-seed3" / "dit-sample")
    (folder / "rotate=2-seed3" / "fid.json").unlink()
    again, _ = run(*words)
    assert launched[6:] == ["sample", "score"]
    assert said.endswith(again[again.index("3 images each") :])


def test_a_dry_run_of_a_dit_fetches_nothing(run, monkeypatch, image_folder, tiny_vae):
    here = {"vae-ema": tiny_vae, "vae-mse": tiny_vae}
    monkeypatch.setattr(
        "spiralrope_cli.core.hub.download.local_path", lambda row: here.get(row.name)
    )
    monkeypatch.setattr(
        "spiralrope_cli.core.hub.download.fetch_published", lambda row: pytest.fail("fetched")
    )
    small = (
        "--arch",
        "dit-32x2x2-2",
        "--max-steps",
        2,
        "--batch-size",
        4,
        "--num-samples",
        2,
        *FAST,
    )
    words = (*small, "--data", image_folder, "--vae", "ema", "--image-size", 32, "--workers", 0)
    run("dit", *words, "--num-sampling-steps", 2)
    shutil.rmtree(next(Path("runs").glob("*/dit-sample")))
    here.clear()
    _, printed = run("dit", *words, "--num-sampling-steps", 2, "--dry-run")
    assert "dit-train is finished" in printed
    assert "VAE mse (to be downloaded)" in printed
    shutil.rmtree("runs")
    _, printed = run("dit", *words, "--num-sampling-steps", 2, "--dry-run")
    assert "from the EMA weights" in printed


def test_an_interrupted_sampling_goes_on(run, launched, monkeypatch):
    with monkeypatch.context() as patch:
        plain = sample.Sampler.__call__

        def drawn(self, indices, each_step):
            images = plain(self, indices, each_step)
            self.ctx.stop.signal_number = signal.SIGINT
            return images

        patch.setattr(sample.Sampler, "__call__", drawn)
        run("dit", *DIT, expect=130)
    folder = Path("runs/run-dit-dit-32x2x2-2-digits-r0")
    assert marks(folder) == ["dit-train"]
    run("dit", *DIT)
    assert launched == ["train", "sample", "sample"]


LEGACY = [
    ("deit", "", ""),
    ("deit", "4 - - - - 8", "--rotate 4 --nproc 8"),
    ("deit", "bash run_all.sh - - - - - - True", "--eval-only"),
    ("deit", "- - - - - - False True", "--skip-training"),
    ("deit", "- - - - - - True True", "--eval-only"),
    (
        "deit",
        "4 0.1 1.0 0.01 True 2",
        "--rotate 4 --truncate-percentage 0.1 --max-freq-lang 1.0 --min-freq-lang 0.01 "
        "--same-theta --nproc 2",
    ),
    ("dit", "False", "--no-rope"),
    ("dit", "True 2", "--rope --rotate 2"),
    ("dit", "- 4", "--rotate 4"),
    ("dit", "- - - - - - - - - 123", "--seed 123"),
    (
        "dit",
        "- 2 100 pixel 20 - - - False 1 DiT-XL/2",
        "--rotate 2 --theta 100 --freqs-for pixel --max-freq 20 --no-same-theta --seed 1 "
        "--arch dit-xl2",
    ),
]


@pytest.mark.parametrize(("kind", "line", "options"), LEGACY)
def test_an_old_line_becomes_a_command(run, kind, line, options):
    said, printed = run(kind, "--from-legacy", line)
    assert said.strip() == f"spiralrope run {kind} {options}".strip()
    unsaid = "1.0" not in line and line != "False" and "pixel" not in line
    assert ("scripts passed 0.5 or 1.0" in printed) == unsaid


@pytest.mark.parametrize(
    ("kind", "line", "printed"),
    [
        ("deit", "four", "word 1, ROTATE, is four; it must be a whole number"),
        ("deit", "- - - - 1", "word 5, SAME_THETA, is 1; it must be True or False"),
        ("deit", "- 2", "word 2, TRUNCATE_PERCENTAGE, is 2.0; it must be in [0, 1)"),
        ("deit", "- - - - - - - - -", "has 9 words; the script took at most 8"),
        ("deit", "'", "is not a valid shell line"),
        ("deit", "4 - 1.5 2.0", "--min-freq-lang is 2.0"),
        ("deit", "4 - - - - -8", "word 6, NPROC_PER_NODE, is -8; it must be a whole number, 1 or"),
        ("dit", "- - - - - - - - - -3", "word 10, SEED, is -3; it must be a whole number, 0 or"),
        ("dit", "- - - sound", "word 4, FREQS_FOR, is sound; it must be lang or pixel"),
        ("dit", "- - - - - - - - - - DiT-Z/2", "word 11, MODEL, DiT-Z/2 is unknown"),
    ],
)
def test_a_wrong_word_is_named_with_its_place(run, kind, line, printed):
    assert printed in run(kind, "--from-legacy", line, expect=2)[1]


def test_the_words_are_those_of_the_old_documents():
    assert [word.name for word in DEIT_SCRIPT] == [
        *("ROTATE", "TRUNCATE_PERCENTAGE", "MAX_FREQ_LANG", "MIN_FREQ_LANG", "SAME_THETA"),
        *("NPROC_PER_NODE", "EVAL_ONLY", "SKIP_TRAINING"),
    ]
    assert [word.name for word in DIT_SCRIPT] == [
        *("USE_ROPE", "ROTATE", "THETA", "FREQS_FOR", "MAX_FREQ", "TRUNCATE_PERCENTAGE"),
        *("MAX_FREQ_LANG", "MIN_FREQ_LANG", "SAME_THETA", "SEED", "MODEL"),
    ]


def test_the_page_for_movers_shows_what_the_command_prints(run):
    page = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text()
    lines = re.findall(
        r"^\| `(bash run_all\.sh[^`.]*)` \| `(spiralrope run (\w+)[^`.]*)` \|$", page, re.M
    )
    assert len(lines) == 9
    for line, command, kind in lines:
        assert run(kind, "--from-legacy", line)[0].strip() == command
    for kind, words in (("DeiT", DEIT_SCRIPT), ("DiT", DIT_SCRIPT)):
        section = page.split(f"## {kind}:")[1].split("\n## ")[0]
        table = re.findall(r"^\| (\d+) \| `(\w+)` \| (\S+) \| `(--[a-z-]+)`", section, re.M)
        assert [tuple(row) for row in table] == [
            (str(place), word.name, word.default, word.option)
            for place, word in enumerate(words, 1)
        ]
