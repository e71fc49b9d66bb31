from __future__ import annotations

import math
from pathlib import Path
from unittest.mock import Mock

import pytest

from spiralrope_cli.core.errors import SpiralRopeError
from spiralrope_cli.core.runtime import launch
from spiralrope_cli.core.runtime.launch import check_memory, free_memory


def test_what_does_not_fit_into_the_memory_is_refused(monkeypatch):
    check_memory(1, "one byte")
    told = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    4000 kB\n"}
    monkeypatch.setattr(Path, "read_text", lambda path: told.get(str(path), ""))
    check_memory(4_096_000, "as much as there is")
    with pytest.raises(SpiralRopeError) as refused:
        check_memory(4_096_001, "64 images")
    assert str(refused.value) == (
        "4.1 MB of memory are free, and about 4.1 MB are needed for 64 images\n"
        "use fewer of them, or smaller ones"
    )
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=FileNotFoundError))  # not on Linux
    check_memory(1 << 60, "anything")


GROUPS = {  # /proc/self/cgroup, the group with the limit, and its files
    "version 2, in a container": ("0::/\n", "", ("max", "current", "inactive_file")),
    "version 2, a job": ("0::/job_7/step_0\n", "job_7", ("max", "current", "inactive_file")),
    "version 1": (
        "9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n",
        "memory",
        ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"),
    ),
}


@pytest.mark.parametrize("form", GROUPS.values(), ids=GROUPS)
def test_the_limit_of_a_container_or_job_counts_too(tmp_path, monkeypatch, form):
    line, group, (limit, used, cached) = form
    (folder := tmp_path / group).mkdir(exist_ok=True)
    (tmp_path / "job_7/step_0").mkdir(parents=True, exist_ok=True)
    (tmp_path / "job_7/step_0/memory.max").write_text("max\n")
    (folder / f"memory.{limit}").write_text("5000\n")
    (folder / f"memory.{used}").write_text("4000\n")
    (folder / "memory.stat").write_text(f"anon 7\n{cached} 1500\nactive_{cached} 9\n")
    real = Path.read_text
    told = {"/proc/meminfo": "MemAvailable: 9000 kB\n", "/proc/self/cgroup": line}
    monkeypatch.setattr(Path, "read_text", lambda path: told.get(str(path)) or real(path))
    monkeypatch.setattr(launch, "CGROUPS", tmp_path)
    assert free_memory() == 2500
    (folder / f"memory.{limit}").write_text("max\n")
    assert free_memory() == 9000 * 1024
    told["/proc/meminfo"] = "none\n"
    assert free_memory() == math.inf
