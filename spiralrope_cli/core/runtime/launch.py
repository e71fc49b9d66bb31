"""Starts the worker processes of a job, or joins those of a launcher; raises one error for all.

The module imports no torch, so that usage errors are fast.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.errors import ConfigError, LaunchError, SpiralRopeError, system_error
from spiralrope_cli.core.runtime.progress import say
from spiralrope_cli.core.storage import write_whole

SHUTDOWN_SECONDS = 600
"""How long workers may take to write a checkpoint after a signal."""

MENDABLE, BUG, LOST = range(3)
"""Kinds of errors of workers: a cause comes before its consequences."""
LOST_SECONDS = 5
"""Before a worker leaves that has lost the connection to another one."""

ERROR_FOLDER_VARIABLE = "SPIRALROPE_ERROR_FOLDER"


MOST_LOADERS, MOST_LOADERS_ON_CPU = 16, 4
"""Loader workers that `--workers auto` starts at most; on a CPU the cores also train."""
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")


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
    elif (num_workers := num_local_workers(run.machine)) * run.machine.nnodes > 1:
        _launch_elastic(num_workers, work, run, *more)
        return
    _call(work, run, *more)


def _call(work: Callable[..., None], run: Any, *more: Any) -> None:
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
    job_number = int(env.get("SLURM_JOB_ID", "0"))
    env.setdefault("MASTER_PORT", str(20000 + job_number % 20000))


def _launch_elastic(num_workers: int, work: Callable[..., None], run: Any, *more: Any) -> None:
    import inspect
    import logging

    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    from torch.version import __version__ as torch_version

    # Each logger has a level of its own, so silencing the parent has no effect.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    machine = run.machine
    # Unless the user has set it. The default of torchrun is one thread per worker.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // num_workers)))
    endpoint = machine.rdzv_endpoint or "localhost:0"
    patience: dict[str, Any] = {"shutdown_timeout": SHUTDOWN_SECONDS}
    if not patience.keys() <= inspect.signature(LaunchConfig).parameters.keys():
        patience = {}
        say_notes(
            [f"torch {torch_version} kills workers 30 s after a signal, even while they save"]
        )
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
            **patience,
            logs_specs=DefaultLogsSpecs(log_dir=folder),  # by default a folder that stays
        )
        try:
            with _sigint_blocked():
                elastic_launch(settings, _worker_main)(work, run, *more)
        except SignalException as stopped:
            say(f"ended by {signal.Signals(stopped.sigval).name}")
            sys.exit(128 + stopped.sigval)
        except RendezvousError as error:
            raise LaunchError(
                f"--rdzv-endpoint {endpoint} cannot be reached: {str(error).splitlines()[0]}",
                "all machines need the same endpoint, on the first of them, with a free port",
            ) from error
        except ChildFailedError as failed:
            _raise_first(Path(folder), failed)
        finally:
            del os.environ[ERROR_FOLDER_VARIABLE]  # the next stage of `run` may be one process


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """New processes inherit it, so that a Ctrl-C waits until they are started.

    This process gets it by a thread. Python's handler then runs in the main thread, as always.
    """

    def receive() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        ended.wait()

    from multiprocessing import resource_tracker

    ended = threading.Event()
    resource_tracker.ensure_running()  # when it starts, it unblocks the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    threading.Thread(target=receive, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _worker_main(work: Callable[..., None], *arguments: Any) -> None:
    """The main function of a worker; it writes its error into a file for the parent.

    torch's `record` does this too, but without hint and exit code, and it prints a traceback for
    errors that are no bugs.
    """
    # Before a run listens, and after it, nothing has to be saved.
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        _call(work, *arguments)
        return
    except SpiralRopeError as error:
        lost = isinstance(error, LaunchError)
        _leave_error(error, LOST if lost else MENDABLE)
        code = error.exit_code
        if lost:  # let the launcher first see which worker was killed
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(LOST_SECONDS)
    except (KeyboardInterrupt, SystemExit):
        raise
    except Exception:  # noqa: BLE001 - the parent shows the traceback of a bug, once
        import traceback

        failed = f"worker {os.environ.get('RANK')} failed"
        _leave_error(LaunchError(failed, traceback.format_exc()), BUG)
        code = 1
    leave_at_once(code)


def leave_at_once(code: int) -> NoReturn:
    """Exits a worker after an error, without the shutdown of the interpreter.

    The process group is still open; its threads sometimes abort a shutdown with a core dump.
    """
    gc.collect()  # closes what the error refers to, such as queues to data loader workers
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _leave_error(error: SpiralRopeError, kind: int) -> None:
    path = Path(os.environ[ERROR_FOLDER_VARIABLE]) / f"{os.environ.get('RANK', '0')}.json"
    report = {
        "time": time.time(),
        "message": error.message,
        "hint": error.hint,
        "exit_code": error.exit_code,
        "kind": kind,
    }
    with contextlib.suppress(OSError):
        write_whole(path, json.dumps(report))  # the parent may end this process at any moment


def _raise_first(folder: Path, failed: Any) -> None:
    """Raises the first error of a worker; what may be its consequence comes last."""
    reports = sorted(
        (json.loads(path.read_text()) for path in folder.glob("*.json")),
        key=lambda each: (each["kind"], each["time"]),
    )
    rank, failure = failed.get_first_failure()
    code = failure.exitcode
    if reports and not (code < 0 and reports[0]["kind"] != MENDABLE):
        error = SpiralRopeError(reports[0]["message"], reports[0]["hint"])
        error.exit_code = reports[0]["exit_code"]
        raise error from None
    if code in (130, 143):
        sys.exit(code)
    if code < 0:
        why = signal.Signals(-code).name
        out_of_memory = "often the system ran out of memory: try a smaller --micro-batch-size"
        hint = out_of_memory if why == "SIGKILL" else ""
        raise LaunchError(f"worker {rank} was killed by {why}", hint) from None
    raise LaunchError(f"worker {rank} ended with exit code {code}") from None
