"""Starts a job's worker processes or joins those of a launcher, and raises one error if they fail.

At module level this imports the standard library only, so that usage errors stay fast.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, Protocol

from spiralrope_cli.core.atomic import write_whole
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.errors import (
    ConfigError,
    LaunchError,
    SpiralRopeError,
    dead_loader,
    refused_path,
)
from spiralrope_cli.core.runtime.progress import say

SHUTDOWN_SECONDS = 600
"""How long workers may take to write a checkpoint after a signal."""

ERROR_FOLDER_VARIABLE = "SPIRALROPE_ERROR_FOLDER"


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS does not tell which cores a process may use.


def cores_per_process() -> int:
    """Cores of this process, where several on this machine share them."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def share_the_machine() -> None:
    """Lets OpenMP threads spin for microseconds before they sleep; called before torch is loaded.

    By default they spin for milliseconds. If another process wants the core, each of the thousands
    of waits in a train step then lasts a time slice of the system. On an idle machine short spins
    cost nothing.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def joined_world_size() -> int | None:
    """Number of processes if torchrun or srun started this one, else None."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    # srun alone sets the step's number of tasks; a batch script without it has only the job's.
    num_tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    return num_tasks if num_tasks > 1 and "SLURM_PROCID" in os.environ else None


def check_not_joined() -> None:
    """Refuses to run under a launcher, for `run`: each of its stages forms a group of its own."""
    if (joined_world_size() or 1) > 1:
        raise ConfigError(
            "run starts the processes of each stage itself, and cannot join those of a launcher",
            "use --nproc, --nnodes and --rdzv-endpoint in place of torchrun or srun's tasks; the "
            "single commands do join",
        )


def is_first_process() -> bool:
    """Whether this process prints for all that a launcher started."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    return rank == "0" or joined_world_size() is None


def say_notes(notes: Iterable[str]) -> None:
    """What the user should know before a job starts, from the process that speaks for all."""
    for note in notes if is_first_process() else ():
        say(f"note: {note}")


def num_local_workers(machine: MachineConfig) -> int:
    """`--nproc`, or one per GPU, or one."""
    if machine.nproc:
        return machine.nproc
    if machine.device == "cpu":
        return 1
    import torch  # only to count GPUs, if no number was given

    return max(torch.cuda.device_count(), 1)


def world_size(machine: MachineConfig) -> int:
    """Processes of the run, over all machines."""
    return joined_world_size() or num_local_workers(machine) * machine.nnodes


class Launched(Protocol):
    """The config of a run: its machine, and the folder that it writes to."""

    @property
    def machine(self) -> MachineConfig: ...  # noqa: D102

    @property
    def out(self) -> str: ...  # noqa: D102


def launch(job: str, run: Launched) -> None:
    """Calls a job, `module:function`, as function(run) in every worker.

    Raises:
        SpiralRopeError: what a worker raised, once.
        LaunchError: a worker died without an error.
    """
    machine = run.machine
    if joined_world_size() is not None:
        _adopt_slurm()
        _call(job, run)
        return
    num_workers = num_local_workers(machine)
    if num_workers * machine.nnodes == 1:
        _call(job, run)
        return
    _launch_elastic(job, run, num_workers)


def _call(job: str, run: Launched) -> None:
    module, name = job.split(":")
    try:
        getattr(importlib.import_module(module), name)(run)
    except OSError as error:
        if refused := refused_path(error, run.out):
            raise refused from error
        raise
    except RuntimeError as error:
        if died := dead_loader(error):
            raise died from error
        raise


def _adopt_slurm() -> None:
    """Sets the variables of torch.distributed from those of srun."""
    if "RANK" in os.environ:
        return
    env = os.environ
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    # "node[03-07,9],other" begins with node03, where task 0 runs.
    first = re.match(r"([^,\[]+)(?:\[(\w+))?", env.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    env.setdefault("MASTER_ADDR", "".join(part or "" for part in first.groups()) if first else "")
    job_number = int(env.get("SLURM_JOB_ID", "0"))
    env.setdefault("MASTER_PORT", str(20000 + job_number % 20000))


def _launch_elastic(job: str, run: Launched, num_workers: int) -> None:
    import logging

    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Silenced one by one: each has a level of its own, so that of the parent has no effect.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    machine = run.machine
    # Unless the user set a number; torchrun would give each worker one thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // num_workers)))
    endpoint = machine.rdzv_endpoint or "localhost:0"
    with tempfile.TemporaryDirectory(prefix="spiralrope-") as folder:
        os.environ[ERROR_FOLDER_VARIABLE] = folder
        settings = LaunchConfig(
            min_nodes=machine.nnodes,
            max_nodes=machine.nnodes,
            nproc_per_node=num_workers,
            run_id=Path(run.out).name,
            rdzv_backend="c10d",
            rdzv_endpoint=endpoint,
            max_restarts=0,
            monitor_interval=0.1,
            shutdown_timeout=SHUTDOWN_SECONDS,
            logs_specs=DefaultLogsSpecs(log_dir=folder),  # by default a folder that stays
        )
        try:
            elastic_launch(settings, _work)(job, run)
        except SignalException as stopped:
            sys.exit(128 + stopped.sigval)
        except RendezvousError as error:
            raise LaunchError(
                f"--rdzv-endpoint {endpoint} cannot be reached: {str(error).splitlines()[0]}",
                "all machines need the same endpoint, on the first of them, with a free port",
            ) from error
        except ChildFailedError as failed:
            _raise_first(Path(folder), failed)


def _work(job: str, run: Launched) -> None:
    """The main function of a worker process; writes its error into a file for the parent.

    torch's own `record` does the same, but its file has no hint and no exit code, and it prints a
    traceback for errors that are not bugs.
    """
    try:
        _call(job, run)
        return
    except SpiralRopeError as error:
        _leave_error(error)
        code = error.exit_code
    except (KeyboardInterrupt, SystemExit):
        raise
    except Exception:  # noqa: BLE001 - the parent shows the traceback of a bug, once
        import traceback

        _leave_error(LaunchError(f"worker {os.environ.get('RANK')} failed", traceback.format_exc()))
        code = 1
    leave_at_once(code)


def leave_at_once(code: int) -> NoReturn:
    """Ends a worker after an error, without the interpreter's shutdown.

    The process group is still open, and its threads sometimes abort a shutdown with a core dump.
    """
    gc.collect()  # closes what the error still refers to, such as queues to loader processes
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _leave_error(error: SpiralRopeError) -> None:
    path = Path(os.environ[ERROR_FOLDER_VARIABLE]) / f"{os.environ.get('RANK', '0')}.json"
    report = {
        "time": time.time(),
        "message": error.message,
        "hint": error.hint,
        "exit_code": error.exit_code,
        "is_bug": isinstance(error, LaunchError),
    }
    with contextlib.suppress(OSError):
        write_whole(path, json.dumps(report))  # the parent may end this process at any moment


def _raise_first(folder: Path, failed: Any) -> None:
    """Raises the first worker's error, before any bug that it may have caused in the others."""
    reports = sorted(
        (json.loads(path.read_text()) for path in folder.glob("*.json")),
        key=lambda each: (each["is_bug"], each["time"]),
    )
    if reports:
        error = SpiralRopeError(reports[0]["message"], reports[0]["hint"])
        error.exit_code = reports[0]["exit_code"]
        raise error from None
    rank, failure = failed.get_first_failure()
    code = failure.exitcode
    if code in (130, 143):
        sys.exit(code)
    if code < 0:
        why = signal.Signals(-code).name
        out_of_memory = "often the system ran out of memory: try a smaller --micro-batch-size"
        hint = out_of_memory if why == "SIGKILL" else ""
        raise LaunchError(f"worker {rank} was killed by {why}", hint) from None
    raise LaunchError(f"worker {rank} left with exit code {code}") from None
