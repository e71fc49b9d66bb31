"""Starts the fork server of `multiprocessing`, from which the workers on a CPU are forked.

To import torch takes seconds. The server does it once for all workers, those of a restart and of
the next stage of `run` too.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import tempfile
from multiprocessing import forkserver
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import torch

from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.runtime.launch import on_gpu

PRELOADED = ("torch._dynamo", "timm", "spiralrope_cli.core.runtime.elastic")
"""Imports of the fork server; they start no threads but those of OpenBLAS, which survives forks."""
READ_AT_IMPORT = ("HF_", "TIMM_", "TORCH_", "WANDB_")
"""Variables of which the preloaded modules keep the value."""
SERVER_KILLED = 255
"""Exit code that `multiprocessing` reports of all workers whose fork server was killed."""


def start_method(machine: MachineConfig) -> str:
    """`forkserver` where that is safe, with the fork server running; else `spawn`."""
    # A fork must not inherit CUDA, which an import may initialise, and macOS lets no process fork
    # that has loaded its frameworks.
    if on_gpu(machine) or sys.platform != "linux":
        return "spawn"
    try:
        read = _start_server()
    except OSError:  # $TMPDIR is too long for the path of a socket
        return "spawn"
    return "forkserver" if read == _read_at_import() else "spawn"


@functools.cache
def _start_server() -> dict[str, str]:
    """Starts the fork server of this process; gives the variables that its imports have read."""
    multiprocessing.set_forkserver_preload([*PRELOADED])
    here = os.getcwd()
    os.chdir(Path(__file__).parents[3])  # the server imports from its working folder first
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(here)
    return _read_at_import()


def forget_server() -> None:
    """After the fork server was killed: the next start is that of another one."""
    _start_server.cache_clear()


def _read_at_import() -> dict[str, str]:
    return {name: text for name, text in os.environ.items() if name.startswith(READ_AT_IMPORT)}


class Surroundings:
    """Environment, stdout and stderr of the launcher: what unpickles it in a worker takes them.

    Without it a worker would have those that the launcher had when it started the fork server.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _surround, (dict(os.environ), DupFd(1), DupFd(2))


def _surround(environment: dict[str, str], *streams: Any) -> None:
    before, now = (each.get("OMP_NUM_THREADS") for each in (os.environ, environment))
    if now and now != before:  # torch has read it
        torch.set_num_threads(int(now))
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # it may be another one
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream.detach(), number)
    sys.excepthook = _say_unless_given_up


def _say_unless_given_up(kind: type[BaseException], *error: Any) -> None:
    """Says why a worker cannot start, unless its launcher has removed the semaphores for it."""
    if kind is not FileNotFoundError:
        sys.__excepthook__(kind, *error)
