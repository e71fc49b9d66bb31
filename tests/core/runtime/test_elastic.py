from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from workers import without_notes

from spiralrope_cli.core.config.recipes import with_micro_batch
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.errors import SpiralRopeError
from spiralrope_cli.core.resolve import resolve
from spiralrope_cli.core.runtime import elastic, launch
from spiralrope_cli.core.runtime.elastic import (
    BUG,
    KILLED,
    LOST,
    MENDABLE,
    STOPPED,
    _signals_blocked,
)
from spiralrope_cli.core.runtime.launch import ERROR_FOLDER_VARIABLE
from spiralrope_cli.core.runtime.run_folder import write_config


@pytest.fixture
def failed(tmp_path):
    """What the launcher raises: worker 1 ended first, with this code; reports of the others."""

    def make(exitcode, **reports):
        for name, (message, kind) in reports.items():
            report = {"message": message, "hint": "", "exit_code": 1, "kind": kind, "time": 1}
            (tmp_path / f"{name}.json").write_text(json.dumps(report))
        first = SimpleNamespace(exitcode=exitcode)
        return tmp_path, SimpleNamespace(get_first_failure=lambda: (1, first))

    return make


CLOSED = "the connection to another process was lost"


@pytest.mark.parametrize(
    ("exitcode", "reports", "kind", "message"),
    [
        (-9, {}, KILLED, "worker 1 was killed by SIGKILL"),
        (-11, {"0": (CLOSED, LOST)}, KILLED, "worker 1 was killed by SIGSEGV"),
        (-9, {"0": ("image a.png cannot be read", MENDABLE)}, MENDABLE, "image a.png cannot be"),
        (1, {"0": (CLOSED, LOST), "1": ("worker 1 failed", BUG)}, BUG, "worker 1 failed"),
        (1, {"1": (CLOSED, LOST)}, LOST, CLOSED),
        (3, {}, KILLED, "worker 1 ended with exit code 3"),
        (255, {}, KILLED, "the fork server of the workers was killed"),
        (143, {"0": (CLOSED, LOST)}, STOPPED, ""),
    ],
)
def test_who_was_killed_comes_before_what_the_others_lost(failed, exitcode, reports, kind, message):
    found = elastic._first_failure(*failed(exitcode, **reports))
    assert found.kind == kind
    assert found.message.startswith(message)


def test_an_aborted_worker_may_have_waited_for_another_one(failed):
    assert "NCCL ends a process that waited" in elastic._first_failure(*failed(-6)).hint
    killed = elastic._first_failure(*failed(-9))
    assert "memory" in killed.hint
    assert elastic._first_failure(*failed(-11)).hint == ""


def test_a_worker_that_lost_another_one_leaves_after_it(monkeypatch, tmp_path):
    def lose(run):
        raise RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:4711")

    waited, left = [], []
    monkeypatch.setenv(ERROR_FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(elastic.time, "sleep", waited.append)
    monkeypatch.setattr(elastic.signal, "signal", lambda *handler: None)
    monkeypatch.setattr(elastic.signal, "pthread_sigmask", lambda *mask: None)
    monkeypatch.setattr(elastic, "leave_at_once", left.append)
    elastic._worker_main(None, lose, SimpleNamespace(out="runs/one"))
    [report] = [json.loads(path.read_text()) for path in tmp_path.iterdir()]
    assert (report["message"], report["kind"]) == (CLOSED, LOST)
    assert (waited, left) == ([elastic.LOST_SECONDS], [1])


@dataclass(frozen=True)
class Run:
    out: str
    machine: MachineConfig


def test_a_worker_that_is_killed_each_time_ends_after_the_last_restart(helpers, one, capfd):
    with pytest.raises(SpiralRopeError) as raised:
        launch.launch(helpers.die, one)
    assert raised.value.message == "worker 0 was killed by SIGKILL, after 1 restart(s)"
    assert "ran out of memory" in raised.value.hint
    assert without_notes(capfd.readouterr().err) == [
        "worker 0 was killed by SIGKILL; restart 1 of 1"
    ]


@pytest.mark.parametrize(
    ("kinds", "attempts"),
    [
        ([KILLED, None], 2),
        ([LOST, BUG, KILLED, None], 3),  # --max-restarts 2
        ([MENDABLE, None], 1),
        ([KILLED, STOPPED], 2),
    ],
)
def test_what_the_user_has_to_mend_is_not_tried_again(monkeypatch, capsys, kinds, attempts):
    tried, coming = [], iter(kinds)

    def attempt(machines, run_id, num_workers, work, run):
        tried.append(run.machine.resume)
        kind = next(coming)
        return None if kind is None else elastic.Failure(kind, "failed", "Traceback\nKeyError: 3")

    monkeypatch.setattr(elastic, "_attempt", attempt)
    machine = MachineConfig(nproc=1, max_restarts=2, resume="never")
    try:
        launch.launch(print, Run("out", machine))
        ended = None
    except (SpiralRopeError, SystemExit) as error:
        ended = error
    assert len(tried) == attempts
    assert tried == ["never", *["auto"] * (attempts - 1)]
    assert (ended is None) == (kinds[attempts - 1] is None)
    assert capsys.readouterr().err.count("; restart ") == attempts - 1


@pytest.mark.parametrize(("saved", "size"), [(True, 4), (False, None)])
def test_a_restarted_run_keeps_the_micro_batch_that_was_found(tmp_path, monkeypatch, saved, size):
    tried = []

    def attempt(machines, run_id, num_workers, work, run):
        tried.append(run.optim.micro_batch_size)
        write_config(with_micro_batch(run, 4))  # as a worker that has found it
        if saved:
            (tmp_path / "checkpoints" / "0000002").mkdir(parents=True, exist_ok=True)
        return elastic.Failure(KILLED, "failed") if len(tried) == 1 else None

    monkeypatch.setattr(elastic, "_attempt", attempt)
    given = {"batch_size": 16, "nproc": 1, "device": "cpu", "max_restarts": 1}
    launch.launch(print, resolve("pretrain", {**given, "out": str(tmp_path)}).run)
    assert tried == [None, size]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_new_processes_wait_with_a_signal_and_this_one_does_not(number):
    before = signal.signal(number, signal.default_int_handler)  # jobs in a shell ignore Ctrl-C

    def interrupt():
        os.kill(os.getpid(), number)
        for _ in range(100):
            time.sleep(0.1)

    code = f"import signal; print({number} in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    with _signals_blocked():
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    assert said.stdout == "True\n"
    assert number not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    signal.signal(number, before)
