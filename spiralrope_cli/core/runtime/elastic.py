"""Starts the workers of this machine by torch's elastic launcher, restarts them, raises one error.

Torch's own restarts would repeat errors that no restart can mend, and would not say why.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from spiralrope_cli.core.config.dit_runs import TrainingRun
from spiralrope_cli.core.config.recipes import with_micro_batch
from spiralrope_cli.core.errors import LaunchError, SpiralRopeError
from spiralrope_cli.core.runtime.distributed import after_nohup
from spiralrope_cli.core.runtime.fork_server import (
    SERVER_KILLED,
    Surroundings,
    forget_server,
    start_method,
)
from spiralrope_cli.core.runtime.launch import (
    ERROR_FOLDER_VARIABLE,
    call_work,
    leave_at_once,
    say_notes,
    usable_cores,
)
from spiralrope_cli.core.runtime.machines import Machines, machines_of
from spiralrope_cli.core.runtime.progress import say
from spiralrope_cli.core.runtime.run_folder import micro_batch_so_far
from spiralrope_cli.core.storage import write_whole

HANDLED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Those that the elastic launcher handles."""

SHUTDOWN_SECONDS = 600
"""How long workers may take to write a checkpoint after a signal."""

MENDABLE, KILLED, BUG, STOPPED, LOST = range(5)
"""Kinds of failures: a cause comes before its consequences."""
RESTARTED = (KILLED, BUG, LOST)
"""Not what the user has to mend, and no signal to stop."""
HINTS = {
    "SIGKILL": "often the system ran out of memory: try a smaller --micro-batch-size",
    "SIGABRT": "on GPUs NCCL ends a process that waited in vain for another: it hangs or died",
}
LOST_SECONDS = 5
"""Before a worker leaves that has lost the connection to another one."""


@dataclass(frozen=True)
class Failure:
    """Why workers ended."""

    kind: int
    message: str
    hint: str = ""
    exit_code: int = 1
    time: float = field(default_factory=time.time)

    @property
    def line(self) -> str:
        """The message; of a bug also the last line of its traceback."""
        return f"{self.message}: {self.hint.splitlines()[-1]}" if self.kind == BUG else self.message


def start_workers(num_workers: int, work: Callable[..., None], run: Any, *more: Any) -> None:
    """Calls `work(run, *more)` in every worker; starts all again up to `--max-restarts` times."""
    # Each logger has a level of its own, so silencing the parent has no effect.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    # Unless the user has set it. The default of torchrun is one thread per worker.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // num_workers)))
    machines = machines_of(run.machine)
    most = run.machine.max_restarts
    for restarts in itertools.count():
        if machines is None:
            failure = _attempt(
                None, f"{Path(run.out).name}.{restarts}", num_workers, work, run, *more
            )
        else:
            with machines.together(run) as run_id:
                failure = _attempt(machines, run_id, num_workers, work, run, *more)
                failure = _first_of_all(machines, failure)
        if failure is None:
            return
        if failure.kind not in RESTARTED or restarts == most:
            _end(failure, restarts)
        say(f"{failure.line}; restart {restarts + 1} of {most}")
        # `--resume never` was for the start.
        run = replace(run, machine=replace(run.machine, resume="auto"))
        if isinstance(run, TrainingRun) and run.optim.micro_batch_size is None:
            found = micro_batch_so_far(run, num_workers * run.machine.nnodes)
            run = with_micro_batch(run, found)


def _end(failure: Failure, restarts: int) -> NoReturn:
    if failure.kind == STOPPED:
        if failure.message:
            say(failure.message)
        sys.exit(failure.exit_code)
    again = f", after {restarts} restart(s)" if restarts else ""
    error = SpiralRopeError(failure.message + again, failure.hint)
    error.exit_code = failure.exit_code
    raise error


def _attempt(
    machines: Machines | None,
    run_id: str,
    num_workers: int,
    work: Callable[..., None],
    run: Any,
    *more: Any,
) -> Failure | None:
    """Runs the workers of this machine once; returns why they ended, or None."""
    handled = [each.name for each in HANDLED_SIGNALS if each != signal.SIGHUP or not after_nohup()]
    newer: dict[str, Any] = {
        "shutdown_timeout": SHUTDOWN_SECONDS,
        "signals_to_handle": ",".join(handled),
    }
    known = inspect.signature(LaunchConfig).parameters
    newer = {name: value for name, value in newer.items() if name in known}
    if "shutdown_timeout" not in newer:
        say_notes(
            [f"torch {torch.__version__} kills workers 30 s after a signal, even while they save"]
        )
    meeting: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    if machines is not None:
        meeting = {"rdzv_backend": "static", "rdzv_endpoint": machines.endpoint}
        meeting["rdzv_configs"] = {"rank": machines.rank}
    with tempfile.TemporaryDirectory(prefix="spiralrope-") as folder:
        os.environ[ERROR_FOLDER_VARIABLE] = folder
        try:
            with _signals_blocked(), _signals_kept():
                settings = LaunchConfig(
                    min_nodes=run.machine.nnodes,
                    max_nodes=run.machine.nnodes,
                    nproc_per_node=num_workers,
                    run_id=run_id,
                    **meeting,
                    max_restarts=0,
                    monitor_interval=0.1,
                    **newer,
                    start_method=start_method(run.machine),
                    logs_specs=DefaultLogsSpecs(log_dir=folder),  # by default a folder that stays
                )
                elastic_launch(settings, _worker_main)(Surroundings(), work, run, *more)
            return None
        except SignalException as stopped:
            name = signal.Signals(stopped.sigval).name
            return Failure(STOPPED, f"ended by {name}", exit_code=128 + stopped.sigval)
        except ChildFailedError as failed:
            return _first_failure(Path(folder), failed)
        except (ConnectionError, EOFError):  # while workers were started
            return _server_killed()
        finally:
            del os.environ[ERROR_FOLDER_VARIABLE]  # the next stage of `run` may be one process


def _first_of_all(machines: Machines, own: Failure | None) -> Failure | None:
    """The first failure of all machines; each waits until the workers of the others have ended."""
    if own and machines.ended_workers:
        own = replace(own, kind=LOST)
    found = machines.exchange(asdict(own) if own else None, failed=own is not None)
    failures = {rank: Failure(**each) for rank, each in enumerate(found) if each}
    if not failures:
        return None
    rank, first = min(failures.items(), key=lambda each: (each[1].kind, each[1].time))
    if rank == machines.rank or (first.kind == STOPPED and own and own.kind == STOPPED):
        return own
    return replace(first, message=f"{machines.names[rank]}: {first.message or 'it was ended'}")


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Puts back the handlers that the elastic launcher replaces."""
    handlers = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """New processes inherit it: workers wait with a signal until they are started.

    The fork server waits for ever, as it has to tell how each worker ended. This process gets
    signals by a thread. Python's handler then runs in the main thread, as always.
    """

    def receive() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)
        ended.wait()

    ended = threading.Event()
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_SIGNALS)
    resource_tracker.ensure_running()  # when it starts, it unblocks those that it ignores itself
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_SIGNALS)
    threading.Thread(target=receive, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)


def _worker_main(surroundings: None, work: Callable[..., None], *arguments: Any) -> None:
    """The main function of a worker; it writes its failure into a file for the parent.

    torch's `record` does this too, but without hint and exit code, and it prints a traceback for
    errors that are no bugs.
    """
    # Before a run listens, and after it, nothing has to be saved.
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)
    threading.Thread(target=_leave_with_launcher, daemon=True).start()
    try:
        call_work(work, *arguments)
        return
    except SpiralRopeError as error:
        lost = isinstance(error, LaunchError)
        kind, code = LOST if lost else MENDABLE, error.exit_code
        _leave_failure(Failure(kind, error.message, error.hint, code))
        if lost:  # let the launcher first see which worker was killed
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(LOST_SECONDS)
    except (KeyboardInterrupt, SystemExit):
        raise
    except Exception:  # noqa: BLE001 - the parent shows the traceback of a bug, once
        import traceback

        code = 1
        failed = f"worker {os.environ.get('RANK')} failed"
        _leave_failure(Failure(BUG, failed, traceback.format_exc()))
    leave_at_once(code)


def _leave_with_launcher() -> None:
    """Ends this worker once its launcher was killed: it would keep its GPU and train on alone."""
    if launcher := multiprocessing.parent_process():
        launcher.join()
        os._exit(1)


def _leave_failure(failure: Failure) -> None:
    path = Path(os.environ[ERROR_FOLDER_VARIABLE]) / f"{os.environ.get('RANK', '0')}.json"
    with contextlib.suppress(OSError):
        # Whole: the parent may end this process at any moment.
        write_whole(path, json.dumps(asdict(failure)))


def _first_failure(folder: Path, failed: Any) -> Failure:
    """The first failure of a worker; what may be its consequence comes last."""
    failures = {
        path.stem: Failure(**json.loads(path.read_text())) for path in folder.glob("*.json")
    }
    rank, ended = failed.get_first_failure()
    code = ended.exitcode
    if code < 0:
        why = signal.Signals(-code).name
        failures[""] = Failure(KILLED, f"worker {rank} was killed by {why}", HINTS.get(why, ""))
    elif code in (129, 130, 143):
        failures[""] = Failure(STOPPED, "", exit_code=code)
    elif code == SERVER_KILLED:
        failures[""] = _server_killed()
    elif str(rank) not in failures:
        failures[""] = Failure(KILLED, f"worker {rank} ended with exit code {code}")
    return min(failures.values(), key=lambda each: (each.kind, each.time))


def _server_killed() -> Failure:
    forget_server()
    return Failure(KILLED, "the fork server of the workers was killed", HINTS["SIGKILL"])
