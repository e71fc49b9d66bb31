"""Jobs of SLURM, by submitit: its local executor, and stand-ins for the programs of SLURM."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path

import pytest
import slurm_stand_ins
from comparing import relative_distance, same_tensors
from safetensors.torch import load_file
from slurm_stand_ins import options_of, wait_for
from submitit.core.utils import DelayedSubmission
from typer.testing import CliRunner

from spiralrope_cli import main as cli
from spiralrope_cli.core.config.slurm import read_allocation
from spiralrope_cli.core.runtime.slurm import MOST_REQUEUES, SlurmTask, enqueue, without

TINY = (
    *("--arch", "deit-32x1x1", "--batch-size", "32", "--warmup-epochs", "0"),
    *("--precision", "fp32", "--device", "cpu", "--log-every", "2"),
)
CPU = "partition=cpu,time=1h"


@pytest.fixture
def call(runs):
    """Runs a command in this process; returns what it printed on stdout, and on stderr."""

    def invoke(*words, expect=0):
        result = CliRunner().invoke(cli.app, words, prog_name="spiralrope")
        code = getattr(result.exception, "exit_code", result.exit_code)
        assert code == expect, f"{result.output}{result.exception!r}"
        return result.stdout, str(result.exception) if result.exception else result.stderr

    return invoke


@pytest.fixture
def cluster(runs, monkeypatch):
    """Folder of what the stand-ins know; nothing of a job is left after the test."""
    state = slurm_stand_ins.install(runs / "bin")
    monkeypatch.setenv("PATH", f"{runs / 'bin'}:{os.environ['PATH']}")
    yield state
    for begun in state.glob("*.tasks"):
        for pid in begun.read_text().split():
            try:
                os.killpg(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue


@pytest.fixture
def held(cluster):
    """The same, with jobs that wait in the queue."""
    (cluster / "hold").touch()
    return cluster


def words_of(logs, job_id):
    return DelayedSubmission.load(logs / f"{job_id}_submitted.pkl").function.words


def weights(run, step):
    return load_file(run / "checkpoints" / f"{step:07d}" / "model.safetensors")


def begun(log):
    """Whether a command has logged its second step."""
    return log.exists() and "step 2/" in log.read_text()


# --- Checks, before anything is submitted
def test_without_slurm_or_submitit_it_says_what_is_missing(runs, call, monkeypatch):
    monkeypatch.setenv("PATH", str(runs))
    _, said = call("pretrain", "--slurm", CPU, expect=2)
    assert said.splitlines() == [
        "--slurm needs SLURM, and there is no sbatch on this machine",
        "run it on a login node of the cluster",
    ]
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n: None if n == "submitit" else found(n))
    _, said = call("pretrain", "--slurm", CPU, expect=2)
    assert said.splitlines()[0] == "--slurm needs submitit"
    assert "spiralrope[slurm]" in said


def test_the_plan_is_refused_before_it_is_submitted(held, call):
    _, said = call("pretrain", "--slurm", f"{CPU},gpus-per-node=3", "--batch-size=32", expect=2)
    assert "--batch-size 32 does not split into 3 process(es)" in said
    _, said = call("pretrain", "--slurm", CPU, "--nnodes", "2", expect=2)
    assert said.splitlines() == ["--nnodes and --slurm exclude each other", "use --slurm nodes=N"]
    assert not list(held.glob("*.sh"))


def test_a_refusal_of_sbatch_is_one_line(held, call, capfd):
    _, said = call("pretrain", *TINY, "--slurm", "partition=nowhere,time=1h", expect=1)
    assert said == (
        "sbatch refused the job: invalid partition specified: nowhere; "
        "Batch job submission failed: Invalid partition name specified"
    )
    assert "invalid partition" not in capfd.readouterr().err


def test_tasks_of_a_launcher_submit_nothing(held, call, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    _, said = call("pretrain", "--slurm", CPU, expect=2)
    assert "--slurm submits once" in said


# --- What is submitted
def test_sbatch_is_asked_for_what_was_given(held, call, runs):
    slurm = "partition=cpu,nodes=2,time=24h,account=lab,cpus-per-task=3,exclude=a,b,exclusive"
    asked = (
        "pretrain",
        *TINY,
        "--out=run",
        "--resume=never",
        "--slurm",
        f"{slurm},signal=USR2@600",
    )
    said, _ = call(*asked)
    logs = runs / "run" / "slurm"
    assert said.splitlines() == [
        "submitted job 4711: 2 machine(s), 24 h, partition=cpu, account=lab, cpus-per-task=3, "
        "exclude=a,b, exclusive",
        "  follow  tail -F run/slurm/4711_{0..1}_log.out",
        "          squeue --job 4711",
        "  cancel  scancel 4711",
    ]
    script = (held / "4711.sh").read_text()
    given = options_of(script)
    assert given.pop("job-name").startswith("pretrain-run-")
    assert given == {
        **{"partition": "cpu", "nodes": "2", "ntasks-per-node": "1", "time": "1440"},
        **{"account": "lab", "cpus-per-task": "3", "exclude": "a,b", "exclusive": ""},
        **{"requeue": "", "open-mode": "append", "signal": "USR2@600", "wckey": "submitit"},
        "output": f"{logs}/%j_0_log.out",
    }
    assert f"srun --unbuffered --output {logs}/%j_%t_log.out --cpus-per-task=3 " in script
    # A requeued job resumes, so it has no --resume never.
    assert words_of(logs, 4711) == ("pretrain", "--nproc", "1", *TINY, "--out=run")
    # Not twice, until it has ended.
    said, _ = call(*asked)
    assert said.splitlines()[0] == "job 4711 of this command is PENDING already"
    (held / "4711.json").unlink()
    assert "submitted job 4712" in call(*asked)[0]


def test_a_stored_config_submits_nothing(held, call, runs):
    call("pretrain", *TINY, "--max-steps=1", "--out=run")
    assert "slurm" not in (runs / "run" / "config.yaml").read_text()
    said, _ = call("pretrain", *TINY, "--max-steps=1", "--out=run", "--slurm", CPU)
    assert said.startswith("finished: nothing to submit")
    assert not list(held.glob("*.sh"))


EVERY = {
    "pretrain": TINY,
    "finetune": ("{run}", "--max-steps=2", "--batch-size=16", "--warmup-epochs=0"),
    "eval": ("{run}", "--all"),
    "dit-train": ("--arch=dit-32x1x1-2", "--max-steps=2", "--batch-size=16", "--warmup-epochs=0"),
    "dit-encode": ("--data={images}", "--image-size=32", "--vae={vae}"),
    "dit-sample": ("{dit}", "--num-samples=4", "--num-sampling-steps=2"),
    "fid": ("{images}/train", "{images}/val", "--weights={inception}", "--kid-subset-size=4"),
    "run deit": TINY,
    "run dit": ("--arch=dit-32x1x1-2", "--max-steps=2", "--batch-size=16", "--warmup-epochs=0"),
}


@pytest.fixture
def things(request):
    """What the commands are called with."""
    names = ("trained_once", "drawn_once", "image_folder", "tiny_vae", "inception_weights")
    found = map(request.getfixturevalue, names)
    return dict(zip(("run", "dit", "images", "vae", "inception"), found, strict=True))


@pytest.mark.parametrize("command", EVERY)
def test_every_command_that_computes_can_be_submitted(command, held, call, runs, things):
    words = [word.format_map(things) for word in EVERY[command]]
    slurm = ("--slurm", "time=24h,nodes=2,gpus-per-node=2,cpus-per-task=8")
    before = sorted(runs.rglob("*"))
    said, planned = call(*command.split(), *words, *slurm, "--dry-run")
    device = [] if "--device" in words else ["--device", "cuda"]
    shown = " ".join([*command.split(), "--nproc", "2", *device, *words])
    assert "would submit 1 job(s): 2 machine(s) with 2 GPU(s) each, 24 h" in said
    assert f"  $ spiralrope {shown}" in said
    assert planned  # the plan, or at least what is read
    assert sorted(runs.rglob("*")) == before


def test_the_newest_run_is_that_of_the_submission(held, call, runs, trained_once):
    (runs / "runs").mkdir()
    (runs / "runs" / "one").symlink_to(trained_once)
    said, _ = call("eval", "--ema", "--slurm", CPU, "--dry-run")
    assert "  $ spiralrope eval runs/one --nproc 1 --ema" in said


def test_options_are_taken_out_of_a_command_line_with_their_values():
    words = ["--lr", "1", "--slurm", "time=1h", "--seeds=0,1", "--out", "x", "--", "--name"]
    assert list(without(words, ("--slurm", "--seeds", "--out"))) == ["--lr", "1", "--", "--name"]


# --- Points of a sweep
def test_the_points_of_a_sweep_are_an_array_and_the_same_command_ends_with_the_table(
    held, call, runs
):
    command = ("run", "deit", *TINY, "--max-steps=2", "--no-finetune", "--out=grid")
    command += ("--sweep", "rotate=none,2", "--seeds", "3")
    said, _ = call(*command, "--slurm", f"{CPU},array=%1")
    assert "tail -F grid/slurm/4711_{0..1}_0_log.out" in said
    assert options_of((held / "4711.sh").read_text())["array"] == "0-1%1"
    points = [words_of(runs / "grid" / "slurm", f"4711_{n}") for n in (0, 1)]
    for words, point in zip(points, ("--no-rope", "--rotate 2"), strict=True):
        assert " ".join(words).startswith(f"run deit {point} --seed 3 --out grid/rotate=")
        assert not {"--sweep", "--seeds", "--out=grid"}.intersection(words)
    call(*points[0])
    (held / "4711_0.json").unlink()
    (held / "4711_1.json").unlink()
    said, _ = call(*command, "--slurm", CPU)  # the other point alone
    assert words_of(runs / "grid" / "slurm", 4712) == points[1]
    call(*points[1])
    (held / "4712.json").unlink()
    assert call(*command, "--slurm", CPU)[0].startswith("finished: nothing to submit")
    steps = sorted(runs.glob("grid/*/pretrain/checkpoints/*/model.safetensors"))
    times = [path.stat().st_mtime for path in steps]
    said, _ = call(*command)
    assert "acc@1" in said
    assert [path.stat().st_mtime for path in steps] == times
    assert len(times) == 2


def test_a_point_has_the_options_that_fit_it(held, call):
    sweep = ("run", "deit", *TINY, "--max-steps=2", "--rotate", "4", "--out=grid")
    sweep += ("--sweep", "rope_kind=spiral,mixed", "--sweep=finetune_lr=1e-3", "--seeds=1")
    said, _ = call(*sweep, "--slurm", CPU, "--dry-run")
    _, spiral, mixed = (" ".join(line.split()) for line in said.splitlines())
    start = "$ spiralrope run deit --rope-kind"
    assert spiral.startswith(f"{start} spiral --finetune-lr 0.001 --rotate 4 --seed 1 --out grid/")
    assert mixed.startswith(f"{start} mixed --finetune-lr 0.001 --seed 1 --out grid/")
    assert "--rotate" not in mixed
    sweep = ("run", "dit", "--sweep=rotate=none,2", "--seeds=1", "--cfg-scale=2", "--out=grid")
    said, _ = call(*sweep, "--slurm", CPU, "--dry-run")
    _, none, two = (" ".join(line.split()) for line in said.splitlines())
    assert none.startswith("$ spiralrope run dit --no-rope --seed 1 --out grid/rotate=none-seed1")
    assert two.startswith("$ spiralrope run dit --rotate 2 --seed 1 --out grid/rotate=2-seed1")
    assert none.endswith("--cfg-scale=2")


# --- In the job
def test_a_job_ends_with_the_code_of_its_command(runs, monkeypatch, capfd):
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setattr("signal.signal", lambda *_: None)  # of this process
    with pytest.raises(SystemExit) as left:
        SlurmTask(("pretrain", "--arch", "deit-x"))()
    assert left.value.code == 2
    out, said = capfd.readouterr()
    assert out == "$ spiralrope pretrain --arch deit-x\n"
    assert "error: " in said


def test_a_preempted_job_is_requeued_and_ends_with_the_weights_of_an_undisturbed_run(call, runs):
    steps = 240
    command = ("pretrain", *TINY, "--max-steps", str(steps), "--nproc", "1")
    call(*command, "--out", "whole")
    logs = runs / "slurm"
    task = SlurmTask((*command, "--out", "run"))
    [job] = enqueue([task], logs, "job", read_allocation(CPU), MOST_REQUEUES, cluster="local")
    log = job.paths.stdout
    children = Path(f"/proc/{job.job_id}/task/{job.job_id}/children")
    wait_for(lambda: begun(log))
    pid = int(children.read_text())
    # As a preemption: SIGTERM, at which the command saves, then the signal of submitit.
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: "the same command resumes" in log.read_text())
    assert f"step {steps}/{steps}" not in log.read_text()
    wait_for(lambda: not Path(f"/proc/{pid}/task/{pid}/children").read_text())
    assert not job.done()
    os.kill(pid, signal.SIGUSR2)
    wait_for(job.done)
    text = log.read_text()
    assert text.count("$ spiralrope pretrain") == 2
    assert "resumed at step" in text
    assert same_tensors(weights(runs / "run", steps), weights(runs / "whole", steps))


def test_two_machines_leave_before_their_time_is_up_and_finish_after_the_requeue(
    cluster, call, runs
):
    steps = 80
    command = ("pretrain", *TINY, "--max-steps", str(steps))
    call(*command, "--out", "whole")
    call(*command, "--out", "run", "--slurm", f"{CPU},nodes=2")
    logs = [runs / "run" / "slurm" / f"4711_{task}_log.out" for task in (0, 1)]
    wait_for(lambda: any(map(begun, logs)))
    slurm_stand_ins.scancel(cluster, "4711", "--signal=USR2")
    wait_for((cluster / "4711.ended-0").exists)
    first, second = (log.read_text() for log in logs)
    assert "Requeued job 4711" in first
    assert "2 process(es)" in first + second
    assert "resumed at step" in first + second
    assert "Traceback" not in first + second
    whole, run = (weights(runs / name, steps) for name in ("whole", "run"))
    assert relative_distance(run, whole) < 1e-5
