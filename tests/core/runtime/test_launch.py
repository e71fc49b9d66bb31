from __future__ import annotations

import os

import pytest

from spiralrope_cli.core.runtime.launch import cores_per_process


@pytest.mark.parametrize(("processes", "cores"), [("1", 6), ("4", 1), ("9", 1)])
def test_processes_share_the_cores_where_no_one_tells_which_they_are(monkeypatch, processes, cores):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert cores_per_process() == cores
