"""Several machines: two launchers with a process each, on loopback or in network namespaces."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from comparing import relative_distance, same_tensors
from PIL import Image
from safetensors.torch import load_file
from workers import children_of, workers_of

from spiralrope_cli import main
from spiralrope_cli.core.errors import ConfigError, LaunchError, SpiralRopeError
from spiralrope_cli.core.resolve import resolve
from spiralrope_cli.core.runtime import machines, run_folder
from spiralrope_cli.core.runtime.machines import Machines
from spiralrope_cli.core.runtime.progress import read_metrics

SILENT_SECONDS = 6
CODE = f"""
from spiralrope_cli import main
main.share_the_machine()  # before torch loads
from spiralrope_cli.core.runtime import machines
machines.SILENT_SECONDS = {SILENT_SECONDS}
main.main()
"""
JOBS = """
import json, sys
from spiralrope_cli import main
main.share_the_machine()
for words in json.loads(sys.argv[1]):
    main.app(words, standalone_mode=False)
"""
STEPS = 132
TRAIN = (
    *("pretrain", "--arch", "deit-32x2x2", "--max-steps", STEPS, "--save-every", 1),
    *("--batch-size", 32, "--micro-batch-size", 16, "--warmup-epochs", 0, "--log-every", 11),
    *("--validate-every", 1000, "--precision", "fp32", "--device", "cpu"),
)


@pytest.fixture
def start(started):
    """Starts the command, in a network namespace if one is given; it is ended with the test."""

    def call(*words, namespace=(), launcher=(sys.executable, "-c", CODE), **variables):
        program = [*namespace, *launcher]
        return started(*words, program=program, **{"OMP_NUM_THREADS": "1", **variables})

    return call


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run of two processes."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    main.app([*map(str, TRAIN), "--nproc", "2", "--out", str(out)], standalone_mode=False)
    return out


def same_run(one: Path, other: Path) -> bool:
    last = [folder / "checkpoints" / f"{STEPS:07d}" for folder in (one, other)]
    losses = [[line.get("loss") for line in read_metrics(folder)] for folder in (one, other)]
    return losses[0] == losses[1] and all(
        same_tensors(*(load_file(folder / f"{kind}.safetensors") for folder in last))
        for kind in ("model", "ema")
    )


def wait_for(condition, *children):
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        for child in children:
            assert child.poll() is None, child.communicate()
        time.sleep(0.01)


def environment_of(pid):
    return Path(f"/proc/{pid}/environ").read_bytes()


def ended(child):
    said = child.communicate(timeout=300)[0]
    assert "Traceback" not in said
    assert not re.search(r"^\[?[WE]\d{4}", said, re.MULTILINE), said
    return child.returncode, said


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(port=None, host="127.0.0.1"):
    return ("--nproc", 1, "--nnodes", 2, "--rdzv-endpoint", f"{host}:{port or free_port()}")


def test_a_killed_worker_is_replaced(start, undisturbed, tmp_path):
    run = start(*TRAIN, "--nproc", 2, "--max-restarts", 1, "--out", "run")
    wait_for(lambda: run_folder.steps_on_disk(tmp_path / "run"), run)
    os.kill(workers_of(run.pid)[1], signal.SIGKILL)
    code, said = ended(run)
    assert code == 0, said
    assert said.count("worker 1 was killed by SIGKILL; restart 1 of 1") == 1
    assert said.count("resumed at step") == 1
    assert same_run(tmp_path / "run", undisturbed)


def test_a_worker_of_eval_that_is_killed_while_it_reads_is_replaced(
    start, tmp_path, monkeypatch, digit_pictures, trained_once
):
    for number, picture in enumerate(digit_pictures[:20]):
        (folder := tmp_path / "photos/val" / str(number % 10)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{number}.png")
    words = ("eval", trained_once, "--data", "photos", "--nproc", 1, "--workers", 0)
    words = (*words, "--device", "cpu", "--precision", "fp32", "--out")
    monkeypatch.chdir(tmp_path)
    main.app([*map(str, words), "undisturbed"], standalone_mode=False)

    last = tmp_path / "photos/val/9/19.png"
    content = last.read_bytes()
    last.unlink()
    os.mkfifo(last)  # whoever reads it waits
    run = start(*words, "run", "--max-restarts", 1)
    writers = []

    def is_read():
        with contextlib.suppress(OSError):  # there is no reader
            writers.append(os.open(last, os.O_WRONLY | os.O_NONBLOCK))
        return writers

    wait_for(is_read, run)
    last.unlink()
    last.write_bytes(content)
    os.kill(workers_of(run.pid)[0], signal.SIGKILL)
    code, said = ended(run)
    os.close(writers[0])
    assert code == 0, said
    assert said.count("worker 0 was killed by SIGKILL; restart 1 of 1") == 1
    [before], [now] = (
        json.loads((tmp_path / out / "eval.json").read_text())["rows"]
        for out in ("undisturbed", "run")
    )
    assert all(now[name] == before[name] for name in ("acc1", "acc5", "loss", "count"))
    assert now["count"] == 20


@pytest.fixture
def two(monkeypatch):
    """Calls a function of (machines) on two machines, which are threads; gives both results."""
    monkeypatch.setattr(machines, "PULSE_SECONDS", 0.1)
    monkeypatch.setattr(machines, "SILENT_SECONDS", 3)
    monkeypatch.setattr(machines, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(machines.multiprocessing, "active_children", list)
    # It would stay in the environment, and later tests have other interfaces.
    monkeypatch.setattr(machines, "_interface", lambda address: "")
    endpoint = f"127.0.0.1:{free_port()}"

    def one(work, this):
        try:
            return work(this)
        except SpiralRopeError as error:
            return error
        finally:
            this._close()

    def call(*works):
        both = [Machines(endpoint, 2) for _ in works]
        with ThreadPoolExecutor() as pool:
            return list(pool.map(one, works, both))

    return call


def together_with(**options):
    base = {
        "arch": "deit-32x2x2",
        "nproc": 1,
        "nnodes": 2,
        "rdzv_endpoint": "h:1",
        "data": "digits",
    }
    run = resolve("pretrain", base | options).run

    def work(this):
        with this.together(run):
            time.sleep(0.3)
            return this.rank, this.exchange(this.rank * 10), this.names

    return work


def test_machines_meet_and_tell_each_other(two):
    found = sorted(two(together_with(), together_with(out="elsewhere/run", workers=3)))
    assert [(rank, values) for rank, values, _ in found] == [(0, [0, 10]), (1, [0, 10])]
    assert found[0][2] == [f"machine {socket.gethostname()} (127.0.0.1)"] * 2


def test_machines_with_other_options_are_refused_on_both(two):
    for error in two(together_with(seed=1), together_with(nproc=2)):
        assert isinstance(error, ConfigError)
        assert re.search(r"runs another command: .*--seed was", error.message)
        assert re.search(r"--nproc was \d, now \d", error.message)


def test_a_machine_that_is_gone_is_lost_to_the_other(two):
    def leave(this):
        with this.together(run):
            this._close()

    run = resolve("pretrain", {"arch": "deit-32x2x2", "nproc": 1}).run
    for error in filter(None, two(leave, together_with())):
        assert isinstance(error, LaunchError)
        assert "the connection to machine" in error.message


def test_the_workers_of_a_machine_end_if_another_one_has_failed(two):
    def fail(this):
        with this.together(run):
            return this.exchange("failed", failed=True), this.ended_workers

    def go_on(this):
        with this.together(run):
            while not this.ended_workers:
                time.sleep(0.01)
            return this.exchange(None), True

    run = resolve("pretrain", {"arch": "deit-32x2x2", "nproc": 1}).run
    (said, _), (heard, ended) = two(fail, go_on)
    assert ended
    assert sorted(map(str, said)) == sorted(map(str, heard)) == ["None", "failed"]


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("no.such.host.invalid:29500", "no.such.host.invalid is unknown"),
        ("192.0.2.1:29500", "does not answer: a test tried"),
    ],
)
def test_an_endpoint_that_is_not_to_be_had(monkeypatch, endpoint, message):
    monkeypatch.setattr(machines, "JOIN_SECONDS", 0)
    with pytest.raises(LaunchError, match=message):
        Machines(endpoint, 2)


@pytest.fixture
def cluster():
    """Two network namespaces with an address each: their commands, and what cuts their link."""
    ip, number = shutil.which("ip"), os.getpid()
    if ip is None:
        pytest.skip("network namespaces need the command ip")
    names = [f"spiral{number}{side}" for side in "ab"]
    links = [f"sr{number}{side}" for side in "ab"]

    def call(*words, check=True):
        return subprocess.run([ip, *words], capture_output=True, text=True, check=check)

    try:
        for name in names:
            if (made := call("netns", "add", name, check=False)).returncode:
                pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")
        # Each end of the cable is in one of them.
        ends = ("netns", names[0], "type", "veth", "peer", "name", links[1], "netns", names[1])
        call("link", "add", links[0], *ends)
        for place, (name, link) in enumerate(zip(names, links, strict=True), start=1):
            call("-n", name, "addr", "add", f"10.77.0.{place}/24", "dev", link)
            call("-n", name, "link", "set", "lo", "up")
            call("-n", name, "link", "set", link, "up")
        second = ("-n", names[1], "link", "set", links[1])
        commands = [(ip, "netns", "exec", name) for name in names]
        yield commands, partial(call, *second, "down"), partial(call, *second, "up")
    finally:
        for name in names:
            call("netns", "del", name, check=False)


def test_two_machines_replace_a_worker_and_resume_after_a_lost_link(
    cluster, start, undisturbed, tmp_path
):
    hosts, cut, mend = cluster
    words = (*TRAIN, *together(29500, "10.77.0.1"), "--max-restarts", 1, "--out", "run")
    both = [start(*words, namespace=host) for host in hosts]
    wait_for(lambda: 44 in run_folder.steps_on_disk(tmp_path / "run"), *both)
    os.kill(workers_of(both[1].pid)[0], signal.SIGKILL)
    wait_for(lambda: 88 in run_folder.steps_on_disk(tmp_path / "run"), *both)
    cut()
    begun = time.monotonic()
    for number, run in enumerate(both):
        code, said = ended(run)
        assert code == 1, said
        assert len(re.findall(r"worker \d was killed by SIGKILL; restart 1 of 1", said)) == 1
        assert said.count("error:") == 1
        assert re.search(
            rf"error: the connection to machine \S+ \(10.77.0.{2 - number}\) was", said
        )
        assert "the same command on all machines goes on" in said
    assert time.monotonic() - begun < SILENT_SECONDS + 60
    mend()
    for run in [start(*words, namespace=host) for host in hosts]:
        code, said = ended(run)
        assert code == 0, said
    assert same_run(tmp_path / "run", undisturbed)


def test_torchrun_starts_the_processes_and_replaces_one(start, undisturbed, tmp_path):
    code = "import runpy; runpy.run_module('torch.distributed.run', run_name='__main__')"
    launcher = (sys.executable, "-c", code)
    words = ("--standalone", "--nproc-per-node", 2, "--max-restarts", 1, "-m", "--")
    run = start(*words, "spiralrope_cli", *TRAIN, "--out", "run", launcher=launcher)
    wait_for(lambda: run_folder.steps_on_disk(tmp_path / "run"), run)
    [second] = [pid for pid in children_of(run.pid) if b"RANK=1\0" in environment_of(pid)]
    os.kill(second, signal.SIGKILL)
    code, said = run.wait(300), run.stdout.read()
    assert code == 0, said
    assert said.count("resumed at step") == 1
    assert same_run(tmp_path / "run", undisturbed)


def test_tasks_of_srun_join(start, undisturbed, tmp_path):
    shared = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_CPUS_ON_NODE": "2",
        "SLURM_NODEID": "0",
    }
    tasks = [
        start(*TRAIN, "--out", "run", SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), **shared)
        for rank in range(2)
    ]
    for task in tasks:
        code, said = ended(task)
        assert code == 0, said
    assert same_run(tmp_path / "run", undisturbed)


def test_every_job_on_two_machines_gives_what_one_process_does(
    start,
    tmp_path,
    monkeypatch,
    capfd,
    tiny_vae,
    inception_weights,
    digit_pictures,
    trained_once,
    drawn_once,
):
    noise = np.random.default_rng(0)
    for number in range(20):  # two shards of latents
        (folder := tmp_path / "photos" / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
        picture = noise.integers(0, 256, (32, 32, 3)).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{number}.png")
    np.savez(tmp_path / "a.npz", digit_pictures[:6])
    np.savez(tmp_path / "b.npz", digit_pictures[20:25])

    def jobs(out, *machine):
        same = (*machine, "--device", "cpu", "--precision", "fp32")
        fast = ("--batch-size", 4, "--workers", 0)
        training = ("--arch", "dit-64x2x2-1", "--max-steps", 3, "--warmup-epochs", 0)
        sampling = ("--num-samples", 5, "--num-sampling-steps", 4, "--batch-size", 2)
        commands = [
            ("dit-encode", "--data", "photos", "--vae", tiny_vae, "--image-size", 32, *fast),
            ("dit-train", "--latents", f"{out}/dit-encode", *training, *fast),
            ("dit-sample", drawn_once, *sampling),
            ("eval", trained_once, "--data", "digits"),
            ("fid", "a.npz", "b.npz", "--weights", inception_weights, "--select", "fid", *fast),
        ]
        lines = [[*each, *same, "--out", f"{out}/{each[0]}"] for each in commands]
        lines[-1][-2:] = ["--json"]
        return json.dumps([list(map(str, line)) for line in lines])

    monkeypatch.setenv("SPIRALROPE_CACHE", "cache")
    monkeypatch.chdir(tmp_path)
    launcher = (sys.executable, "-c", JOBS)
    both = [start(jobs("two", *together(port)), launcher=launcher) for port in [free_port()] * 2]
    for words in json.loads(jobs("one", "--nproc", 1)):
        main.app(words, standalone_mode=False)
    printed = [capfd.readouterr().out]
    for each in both:
        code, said = ended(each)
        assert code == 0, said
        printed.append(said)
    scores = [json.loads(said[said.index("\n{\n") :]) for said in printed if "\n{\n" in said]
    one, two = tmp_path / "one", tmp_path / "two"
    shards = sorted(path.name for path in (one / "dit-encode").glob("*.safetensors"))
    assert len(shards) == 2
    for name in shards:
        pair = [load_file(each / "dit-encode" / name) for each in (one, two)]
        assert relative_distance(*pair) < 1e-6
    trained = [
        load_file(each / "dit-train/checkpoints/0000003/ema.safetensors") for each in (one, two)
    ]
    assert relative_distance(*trained) < 1e-5
    drawn = [np.load(each / "dit-sample/samples.npz")["arr_0"].astype(int) for each in (one, two)]
    assert abs(drawn[0] - drawn[1]).max() <= 1
    rows = [json.loads((each / "eval/eval.json").read_text())["rows"] for each in (one, two)]
    for before, now in zip(*rows, strict=True):
        assert (now["acc1"], now["count"]) == (before["acc1"], before["count"])
        assert now["loss"] == pytest.approx(before["loss"], rel=1e-6)
        assert now["processes"] == 2
    assert scores[1]["fid"] == pytest.approx(scores[0]["fid"], rel=1e-6)
