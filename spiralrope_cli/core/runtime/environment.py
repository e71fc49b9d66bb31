"""What a run's figures and speed depend on beside its config: versions, machine, commit."""

from __future__ import annotations

import functools
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from spiralrope_cli.core.runtime.job import Job
from spiralrope_cli.core.runtime.run_folder import ENVIRONMENT_FILE, write_json
from spiralrope_cli.core.runtime.threads import usable_cores
from spiralrope_cli.version import __version__

PACKAGE = "spiralrope"
CHECKOUT = Path(__file__).parents[3]
GIT_SECONDS = 5


@functools.cache
def versions() -> dict[str, str]:
    """Of what figures depend on."""
    used = {name: version(name) for name in ("torch", "timm", "torchvision")}
    return {"spiralrope": __version__, **used, "python": platform.python_version()}


def version_of(package: str) -> str | None:
    """The installed version of a package, None without one."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def dependencies() -> Iterator[tuple[Requirement, str | None, bool]]:
    """What this package needs, the version that is installed, and whether it is optional.

    Optional packages only where they are installed, those of developers never.
    """
    try:
        lines = requires(PACKAGE) or []
    except PackageNotFoundError:
        lines = []  # run from a checkout that was never installed
    for line in lines:
        wanted = Requirement(line)
        optional = wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})
        if wanted.marker is not None and wanted.marker.evaluate({"extra": "dev"}) and optional:
            continue
        installed = version_of(wanted.name)
        if installed is not None or not optional:
            yield wanted, installed, optional


def device_name(device: torch.device) -> str:
    """The name that its maker gave a GPU or the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
        except OSError:
            lines = []
        named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return next(named, "") or platform.processor() or platform.machine()
    return device.type


@functools.cache
def commit() -> str:
    """The commit that this code is of, `-dirty` if it was changed since; empty outside git."""
    if not (CHECKOUT / ".git").exists():
        return ""
    words = ("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    try:
        done = subprocess.run(
            ["git", "-C", str(CHECKOUT), *words],
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def of_job(job: Job) -> dict[str, Any]:
    """Everything about where a job happens, as plain values."""
    return {
        "device": job.device.type,
        "device_name": device_name(job.device),
        "precision": str(job.dtype).removeprefix("torch."),
        "precision_reason": job.precision_reason,
        "processes": job.world_size,
        "threads": torch.get_num_threads(),
        "cores": usable_cores(),
        "system": platform.platform(),
        "commit": commit(),
        "versions": versions(),
    }


def write(folder: Path, job: Job) -> None:
    """Leaves `environment.json` in a run folder, of the last process that worked there."""
    write_json(folder / ENVIRONMENT_FILE, of_job(job))
