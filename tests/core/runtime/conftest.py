"""Workers with little to do, and a run of one."""

from __future__ import annotations

import importlib
import sys

import pytest

from spiralrope_cli.core.resolve import resolve

HELPERS = """
import json, os, signal, sys, tempfile, time
from pathlib import Path
import torch

def die(run):
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"):  # as to all processes of a command
        os.kill(os.getppid(), getattr(signal, name))
    os.kill(os.getpid(), signal.SIGKILL)

def tell(run):
    print("worker", os.environ["RANK"], file=sys.stderr)
    told = {"environment": dict(os.environ), "threads": torch.get_num_threads()}
    told |= {"folder": tempfile.gettempdir(), "parent": os.getppid()}
    told["blocked"] = [*signal.pthread_sigmask(signal.SIG_BLOCK, [])]
    Path("told.json").write_text(json.dumps(told))

def sleep(run):
    Path("pids.part").write_text(f"{os.getpid()} {os.getppid()}")
    os.rename("pids.part", "pids")
    time.sleep(600)

def kill_server(run):
    Path("pid").write_text(str(os.getpid()))
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)

if __name__ == "__main__":
    import helpers
    from spiralrope_cli.core.resolve import resolve
    from spiralrope_cli.core.runtime import launch
    one = {"nproc": 1, "device": "cpu", "max_restarts": 1}
    launch.launch(helpers.sleep, resolve("pretrain", one).run)
"""


@pytest.fixture
def helpers(runs, monkeypatch):
    """What workers do, in a module that they can import."""
    (runs / "helpers.py").write_text(HELPERS)
    monkeypatch.syspath_prepend(runs)
    monkeypatch.delitem(sys.modules, "helpers", raising=False)
    return importlib.import_module("helpers")


@pytest.fixture
def one():
    return resolve("pretrain", {"nproc": 1, "device": "cpu", "max_restarts": 1}).run
