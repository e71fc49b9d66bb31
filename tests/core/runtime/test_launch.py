from __future__ import annotations

import os
import subprocess
import sys

import pytest

from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.runtime import launch
from spiralrope_cli.core.runtime.launch import cores_per_process, num_loaders, usable_cores


@pytest.mark.parametrize(("processes", "cores"), [("1", 6), ("4", 1), ("9", 1)])
def test_processes_share_the_cores_where_no_one_tells_which_they_are(monkeypatch, processes, cores):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert cores_per_process() == cores


@pytest.mark.parametrize(
    ("limit", "cores"),
    [("max 100000", 6), ("200000 100000", 2), ("50000 100000", 1), ("900000 100000", 6), ("", 6)],
)
def test_a_container_may_have_fewer_cores_than_its_machine(monkeypatch, tmp_path, limit, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    monkeypatch.setattr(launch, "CPU_LIMIT", tmp_path / "cpu.max")
    assert usable_cores() == 6
    launch.CPU_LIMIT.write_text(limit)
    assert usable_cores() == cores


@pytest.mark.parametrize(
    ("usable", "processes", "device", "loaders"),
    [
        *((16, 1, "cuda", 15), (64, 1, "cuda", 16), (64, 8, "cuda", 7), (1, 1, "cuda", 1)),
        *((16, 1, "cpu", 4), (2, 1, "cpu", 2), (2, 2, "cpu", 1)),
    ],
)
def test_the_cores_are_shared_out_to_loader_workers(
    monkeypatch, usable, processes, device, loaders
):
    monkeypatch.setattr(launch, "usable_cores", lambda: usable)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert num_loaders(MachineConfig(), device) == loaders
    for number in (0, 3):
        assert num_loaders(MachineConfig(workers=number), device) == number


# As srun sets them for task 3 of 5, the first of the second machine.
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "3,2",
    "SLURM_STEP_NODELIST": "node[03-04]",
    "SLURM_JOB_ID": "7",
    "SLURM_CPUS_ON_NODE": "8",
}


@pytest.fixture
def srun(monkeypatch):
    """Sets variables of srun; what the code adds to them goes with the test."""
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "1"})
    return lambda **changes: os.environ.update({**SRUN, **changes})


@pytest.mark.parametrize(
    ("per_node", "node", "here"),
    [("3,2", "0", "3"), ("3,2", "1", "2"), ("2(x2),1", "1", "2"), ("2(x2),1", "2", "1")],
)
def test_tasks_of_srun_know_how_many_they_are_on_their_machine(srun, per_node, node, here):
    srun(SLURM_STEP_TASKS_PER_NODE=per_node, SLURM_NODEID=node)
    launch._adopt_slurm()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["3", "5", "0", here, "node03", "20217"]


def test_steps_of_srun_on_one_node_have_ports_of_their_own(srun):
    ports = set()
    for job, step in ((7, 0), (7, 1), (7, 2), (8, 0), (4_000_000_000, 0)):
        os.environ.clear()
        srun(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step), OMP_NUM_THREADS="1")
        launch._adopt_slurm()
        ports.add(int(os.environ["MASTER_PORT"]))
    assert len(ports) == 5
    assert all(20000 <= port < 40000 for port in ports)


@pytest.mark.parametrize(("usable", "cores"), [(8, 4), (4, 4), (2, 2)])
def test_cores_that_srun_bound_to_a_task_are_not_divided_again(srun, monkeypatch, usable, cores):
    srun()
    monkeypatch.setattr(launch, "usable_cores", lambda: usable)
    launch._adopt_slurm()
    assert cores_per_process() == cores
    os.environ["TORCHELASTIC_RUN_ID"] = "run"  # workers of one task, which it started itself
    assert cores_per_process() == max(1, usable // 2)


def test_tasks_of_srun_share_the_threads_too(srun, monkeypatch):
    import torch

    srun()
    del os.environ["OMP_NUM_THREADS"]
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(launch, "usable_cores", lambda: 8)
    launch._adopt_slurm()
    assert threads == [4]


LOST = """
from datetime import timedelta
from spiralrope_cli.core.runtime.launch import share_the_machine
share_the_machine()
import torch.distributed as dist
try:
    dist.TCPStore("127.0.0.1", 9, 2, False, timeout=timedelta(seconds=1))
except dist.DistError:
    print("raised")
"""


def test_an_error_in_cpp_comes_as_an_exception_alone():
    env = {name: value for name, value in os.environ.items() if name != "TORCH_CPP_LOG_LEVEL"}
    words = [sys.executable, "-c", LOST]
    done = subprocess.run(words, capture_output=True, text=True, env=env, check=True)
    assert (done.stdout, done.stderr) == ("raised\n", "")
