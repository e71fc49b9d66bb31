from __future__ import annotations

import _multiprocessing
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
from workers import server_of, without_notes

from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.errors import SpiralRopeError
from spiralrope_cli.core.runtime import fork_server, launch


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_a_worker_has_what_its_launcher_has_now(
    helpers, one, runs, monkeypatch, capfd, start_method
):
    """The fork server was started by another test, or by the first launch."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch.launch(helpers.tell, one)
    monkeypatch.delenv("GOMP_SPINCOUNT")  # all tests have it
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("MASTER_PORT", "1")  # torch's own is another one
    monkeypatch.setenv("TMPDIR", str(runs))
    if start_method == "spawn":
        monkeypatch.setenv("HF_HOME", str(runs))  # the server keeps the one that it has read
    capfd.readouterr()
    launch.launch(helpers.tell, one)
    out, err = capfd.readouterr()
    assert (out, without_notes(err)) == ("", ["worker 0"])
    told = json.loads((runs / "told.json").read_text())
    own = {name: text for name, text in told["environment"].items() if name not in os.environ}
    assert {"RANK", "MASTER_ADDR"} <= own.keys()
    assert "GOMP_SPINCOUNT" not in own
    changed = [n for n, text in os.environ.items() if told["environment"].get(n) != text]
    assert changed == ["MASTER_PORT"]
    assert (told["threads"], told["folder"], told["blocked"]) == (2, str(runs), [])
    server = server_of(os.getpid())
    assert told["parent"] == (os.getpid() if start_method == "spawn" else server)
    assert len(os.listdir(f"/proc/{server}/task")) == 1, "with threads it must not fork"


@pytest.mark.parametrize(
    ("device", "system", "method"),
    [("cpu", "linux", "forkserver"), ("cuda", "linux", "spawn"), ("cpu", "darwin", "spawn")],
)
def test_workers_are_forked_where_that_is_safe(monkeypatch, device, system, method):
    monkeypatch.setattr(fork_server.sys, "platform", system)
    assert fork_server.start_method(MachineConfig(device=device)) == method


def test_a_worker_and_its_server_end_with_their_killed_launcher(helpers, runs):
    launcher = subprocess.Popen(
        [sys.executable, "helpers.py"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(runs), *sys.path])},
    )
    try:
        pids = wait_for(lambda: Path("pids").exists() and Path("pids").read_text().split())
    finally:
        launcher.kill()
        launcher.wait()
    worker, server = map(int, pids)
    assert launcher.pid not in (worker, server)
    wait_for(lambda: not is_running(worker) and not is_running(server))


def wait_for(found, seconds=120):
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return value


def is_running(pid):
    try:
        return not re.search(r"State:\s+Z", Path(f"/proc/{pid}/status").read_text())
    except FileNotFoundError:
        return False


def test_a_killed_fork_server_counts_as_a_killed_worker(helpers, one, runs, monkeypatch, capfd):
    """Its worker kills it; when it is started again, it is killed before it has a worker."""
    connect, starts = forkserver.connect_to_new_process, itertools.count()

    def connect_and_kill(pipes):
        if next(starts) == 0:
            monkeypatch.setattr(fork_server, "PRELOADED", ())  # the next server is not in use long
            return connect(pipes)
        server = server_of(os.getpid())
        os.kill(server, signal.SIGSTOP)
        connected = connect(pipes)
        os.kill(server, signal.SIGKILL)
        return connected

    monkeypatch.setattr(forkserver, "connect_to_new_process", connect_and_kill)
    with pytest.raises(SpiralRopeError) as raised:
        launch.launch(helpers.kill_server, one)
    killed = "the fork server of the workers was killed"
    assert without_notes(capfd.readouterr().err) == [f"{killed}; restart 1 of 1"]
    assert raised.value.message == f"{killed}, after 1 restart(s)"
    assert "ran out of memory" in raised.value.hint
    assert next(starts) == 2
    wait_for(lambda: not is_running(int((runs / "pid").read_text())))


class Failing:
    """What a worker gets by a call that fails, another one in each attempt."""

    def __init__(self, *calls):
        self.calls = iter(calls)

    def __reduce__(self):
        return next(self.calls)


def test_a_worker_that_cannot_start_says_why_unless_it_was_given_up(helpers, one, capfd):
    """The launcher removes its semaphores when it gives up, maybe before a worker opens them."""
    removed = (_multiprocessing.SemLock._rebuild, (0, 0, 1, "/removed"))
    failed = "worker 0 ended with exit code 1"
    with pytest.raises(SpiralRopeError, match=f"^{failed}, after 1 restart"):
        launch.launch(helpers.tell, one, Failing(removed, (int, ("seven",))))
    first, *traceback, last = without_notes(capfd.readouterr().err)
    assert first == f"{failed}; restart 1 of 1"
    assert traceback[0] == "Traceback (most recent call last):"
    assert last == "ValueError: invalid literal for int() with base 10: 'seven'"
