"""What tests of workers share: which processes a command has started, and when a run is stopped."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def server_of(launcher):
    """The process from which the workers of a process are forked; None if there is none."""
    for child in children_of(launcher):
        if b"multiprocessing.forkserver" in Path(f"/proc/{child}/cmdline").read_bytes():
            return child
    return None


def workers_of(launcher):
    server = server_of(launcher)
    return children_of(server) if server else []


def stop_at(call):
    """A `StopRequest.agreed` that answers SIGTERM to this call, from 1, and to no other."""
    calls = itertools.count(1)
    return lambda self, device, ask_all: signal.SIGTERM if next(calls) == call else 0


def without_notes(said):
    """The lines, without what torch 2.6 is not able to do."""
    return [line for line in said.splitlines() if not line.startswith("note: torch ")]
