"""Starts the worker processes of a job, or joins those of a launcher; raises one error for all.

And what this machine, its container or its job has for them: cores, memory, disk.

The module imports no torch, so that usage errors are fast.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.errors import ConfigError, DiskError, SpiralRopeError, system_error
from spiralrope_cli.core.runtime.progress import human_size, say
from spiralrope_cli.core.storage import nearest_folder

ERROR_FOLDER_VARIABLE = "SPIRALROPE_ERROR_FOLDER"

MOST_LOADERS, MOST_LOADERS_ON_CPU = 16, 4
"""Loader workers that `--workers auto` starts at most; on a CPU the cores also train."""
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")

plan_only = ContextVar("plan_only", default=False)
"""Whether the command computes nothing, so that no data set is read for it."""


def usable_cores() -> int:
    """Number of cores that this process may use: its affinity, and the limit of its container."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # macOS has no affinity
        cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no such limit, or the word max
        quota, period = CPU_LIMIT.read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def cores_per_process() -> int:
    """Cores divided by the processes on this machine, or those that srun bound to this task."""
    cores = on_node = usable_cores()
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # else they are divided among our own workers
        on_node = max(cores, int(os.environ.get("SLURM_CPUS_ON_NODE", "1")))
    return max(1, min(cores, on_node // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def num_loaders(machine: MachineConfig, device: str) -> int:
    """Loader workers of this process on a kind of device: `--workers`, or what `auto` is."""
    if machine.workers is not None:
        return machine.workers
    cores = cores_per_process()
    if device == "cpu":
        return min(cores, MOST_LOADERS_ON_CPU)
    return max(1, min(cores - 1, MOST_LOADERS))


def share_the_machine() -> None:
    """Lets OpenMP threads spin only for microseconds before they sleep; call it before torch loads.

    By default they spin for milliseconds. If another process needs the core, each wait then lasts
    a time slice of the scheduler, and a train step has thousands of waits. On an idle machine
    short spins cost nothing.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # An error in C++ comes as an exception too; c10d and NCCL's watchdog log pages before it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")


def joined_world_size() -> int | None:
    """Number of processes if torchrun or srun started this one, else None."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    # Only srun sets the number of tasks of a step; a batch script has only that of the job.
    num_tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    return num_tasks if num_tasks > 1 and "SLURM_PROCID" in os.environ else None


def check_not_joined() -> None:
    """Raises under torchrun or srun: each stage of `run` needs its own process group."""
    if (joined_world_size() or 1) > 1:
        raise ConfigError(
            "run starts the processes of each stage itself; it cannot join those of a launcher",
            "use --nproc, --nnodes and --rdzv-endpoint instead of torchrun or tasks of srun; the "
            "single commands can join",
        )


def is_first_process() -> bool:
    """Whether this process prints for all processes of a launcher."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    return rank == "0" or joined_world_size() is None


def say_notes(notes: Iterable[str]) -> None:
    """Prints notes before a job starts, on the first process."""
    for note in notes if is_first_process() else ():
        say(f"note: {note}")


def num_local_workers(machine: MachineConfig) -> int:
    """`--nproc`; by default one per GPU, or one on a CPU."""
    if machine.nproc:
        return machine.nproc
    if machine.device == "cpu":
        return 1
    import torch  # only to count GPUs, if no number was given

    return max(torch.cuda.device_count(), 1)


def on_gpu(machine: MachineConfig) -> bool:
    """Whether a run is on GPUs; a dry run may plan for one that is not here."""
    if machine.device != "auto":
        return machine.device == "cuda"
    import torch

    return torch.cuda.is_available()


def world_size(machine: MachineConfig) -> int:
    """Number of processes over all machines."""
    return joined_world_size() or num_local_workers(machine) * machine.nnodes


def launch(work: Callable[..., None], run: Any, *more: Any) -> None:
    """Calls `work(run, *more)` in every worker; raises one error.

    Workers find the function by its module and its name. The run has a `machine` and an `out`.
    """
    if joined_world_size() is not None:
        _adopt_slurm()
        given = run.machine.nproc or run.machine.nnodes > 1 or run.machine.max_restarts
        why = "the processes were started by another launcher"
        say_notes([f"--nproc, --nnodes and --max-restarts have no effect: {why}"] if given else [])
    else:
        num_workers = num_local_workers(run.machine)
        if num_workers * run.machine.nnodes > 1 or run.machine.max_restarts:
            from spiralrope_cli.core.runtime.elastic import start_workers

            start_workers(num_workers, work, run, *more)
            return
    call_work(work, run, *more)


def call_work(work: Callable[..., None], run: Any, *more: Any) -> None:
    """Calls `work(run, *more)`; errors of the operating system become those a user can mend."""
    try:
        work(run, *more)
    except SpiralRopeError:
        raise
    except Exception as error:
        if refused := system_error(error, run.out):
            raise refused from error
        raise


def _adopt_slurm() -> None:
    """Sets the environment variables of torch.distributed from those of srun."""
    if "RANK" in os.environ:
        return
    env = os.environ
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    # Tasks of each node: 2, 2 and 1 of "2(x2),1".
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    per_node = [tasks for tasks, nodes in counts for _ in range(int(nodes or 1))]
    env["LOCAL_WORLD_SIZE"] = per_node[int(env.get("SLURM_NODEID", "0"))]
    if "OMP_NUM_THREADS" not in env:
        import torch  # it would give each task the cores of all

        torch.set_num_threads(cores_per_process())
    # The first node, where task 0 runs: node03 of "node[03-07,9],other".
    first = re.match(r"([^,\[]+)(?:\[(\w+))?", env.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    env.setdefault("MASTER_ADDR", "".join(part or "" for part in first.groups()) if first else "")
    # Steps of one job may run on one node at the same time, and so may jobs that follow each other.
    step = 31 * int(env.get("SLURM_JOB_ID", "0")) + int(env.get("SLURM_STEP_ID", "0"))
    env.setdefault("MASTER_PORT", str(20000 + step % 20000))


def leave_at_once(code: int) -> NoReturn:
    """Exits a worker after an error, without the shutdown of the interpreter.

    The process group is still open; its threads sometimes abort a shutdown with a core dump.
    """
    gc.collect()  # closes what the error refers to, such as queues to data loader workers
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# --- Memory and disk

CGROUPS = Path("/sys/fs/cgroup")
LIMIT_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Of a control group of version 2 and of version 1: limit, use, and cached files in this use."""


def check_memory(needed: int, what: str) -> None:
    """Raises if there is too little free memory, where Linux tells how much there is."""
    if needed > (free := free_memory()):
        raise SpiralRopeError(
            f"{human_size(free)} of memory are free, and about {human_size(needed)} are needed for "
            f"{what}",
            "use fewer of them, or smaller ones",
        )


def free_memory() -> float:
    """Bytes, infinite if unknown."""
    free = math.inf
    with contextlib.suppress(OSError):
        if found := re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text()):
            free = 1024 * int(found[1])
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for kind in {*controllers.split(",")} & LIMIT_FILES.keys():
                # In a container the path may be that of the host; the limit is then at the root.
                group = CGROUPS / kind / path.strip("/")
                above = (group, *group.parents)[: len(Path(path).parts)]
                free = min(free, *(_left(each, *LIMIT_FILES[kind]) for each in above))
    return free


def _left(group: Path, limit: str, used: str, cached: str) -> float:
    """Bytes below the limit of a control group; cached files are dropped when it is reached."""
    try:
        most, now = int((group / limit).read_text()), int((group / used).read_text())
        found = re.search(rf"^{cached} (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):  # none, or the word max
        return math.inf
    return max(0, most - now + (int(found[1]) if found else 0))


def check_space(*needs: tuple[Path, int], what: str, hint: str) -> None:
    """Raises if the disks have too little space for these (folder, bytes)."""
    by_disk: dict[int, tuple[Path, int]] = {}
    for folder, size in needs:
        there = nearest_folder(folder)
        disk = there.stat().st_dev
        by_disk[disk] = (there, by_disk.get(disk, (there, 0))[1] + size)
    for folder, size in by_disk.values():
        if size > (free := shutil.disk_usage(folder).free):
            raise DiskError(
                f"{folder} has {human_size(free)} free, and {human_size(size)} are needed "
                f"for {what}",
                hint,
            )
