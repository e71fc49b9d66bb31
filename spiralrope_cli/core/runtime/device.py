"""Device and precision of a run, settings for speed, and versions."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from spiralrope_cli import __version__
from spiralrope_cli.core.config.dit_runs import TrainingRun
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.runtime.launch import joined_world_size
from spiralrope_cli.core.runtime.run_folder import precision_so_far

DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
"""Value of `--precision` -> dtype of autocast."""
PRECISION_WORDS = {"bf16": "bfloat16", "tf32": "tf32", "fp32": "float32"}
"""Value of `--precision` -> the word for it in files."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8  # of malloc.h

PACKAGE = "spiralrope"
CHECKOUT = Path(__file__).parents[3]
GIT_SECONDS = 5

RATE_SIDE = {"cpu": 1024, "cuda": 8192}
RATE_SECONDS = 0.3


def pick_device(machine: MachineConfig) -> torch.device:
    """The device of this process; GPUs by local rank. Raises if there is no such device."""
    kind = machine.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch finds no GPU", "use --device cpu")
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if torch.cuda.device_count() == 1 and joined_world_size() is not None:
            local_rank = 0  # the scheduler gave each task one visible GPU
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"--nproc asks for more processes than the {torch.cuda.device_count()} GPU(s) here"
            )
        return torch.device("cuda", local_rank)
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("--device mps: torch finds no MPS device", "use --device cpu")
    return torch.device(kind)


def pick_precision(setting: str, device: torch.device) -> tuple[str, str]:
    """What `--precision` is on a device, one of `DTYPES`, and why."""
    if setting == "tf32" and not has_tf32(device):
        return "fp32", f"this {'GPU' if device.type == 'cuda' else device.type.upper()} has no TF32"
    if setting != "auto":
        return setting, f"--precision {setting}"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU supports bf16"
        return "fp32", "this GPU has no bf16"
    if device.type == "cpu":
        for name, there in (
            ("AMX", torch.cpu._is_amx_tile_supported),
            ("AVX512-BF16", torch.cpu._is_avx512_bf16_supported),
        ):
            if there():
                return "bf16", f"this CPU has {name}"
        return "fp32", "this CPU has no bf16 instructions"
    return "fp32", f"bf16 is not tested on {device.type}"


def settle_precision(run: TrainingRun, step: int) -> tuple[str, list[str]]:
    """What --precision is: as given; else that of the run so far, or the best of this machine."""
    given, device = run.machine.precision, pick_device(run.machine)
    best, why = pick_precision("auto", device)
    before, notes = precision_so_far(run) if step else ("", [])
    wanted = before if before and given == "auto" else given
    precision, reason = pick_precision(wanted, device)
    emulated = precision == "bf16" != best
    if wanted != given and (precision != before or emulated):
        raise ConfigError(
            f"{run.out} was trained in {before}, but {why if emulated else reason}",
            f"--precision {best} resumes in {best}",
        )
    if precision != wanted != "auto":
        notes.append(f"--precision {wanted} is {precision} here: {reason}")
    elif emulated:
        notes.append(f"{why}: they are emulated, which is slow; --precision {best} is faster")
    if before not in ("", precision):
        notes.append(f"trained in {before} up to step {step}, in {precision} from there")
    return precision, notes


def check_shard(machine: MachineConfig, num_processes: int) -> list[str]:
    """A note if --shard has nothing to split; raises if this torch cannot split on this device."""
    if not machine.shard:
        return []
    if num_processes == 1:
        return ["--shard has no effect: there is one process"]
    # Gloo of torch 2.7 adds up where FSDP asks for the mean, in silence; that of 2.11 does not.
    if pick_device(machine).type == "cpu" and Version(torch.__version__).release < (2, 11):
        raise ConfigError(
            f"--shard on a CPU needs torch 2.11 or newer, this is {torch.__version__}",
            "leave it out, or use GPUs",
        )
    return []


def planned_precision(machine: MachineConfig, *, dry_run: bool) -> str:
    """What --precision will be; empty in a dry run for a device that this machine lacks."""
    try:
        return pick_precision(machine.precision, pick_device(machine))[0]
    except ConfigError:
        if not dry_run:
            raise
        return ""


def has_tf32(device: torch.device) -> bool:
    """Whether matrix products of a device can use TF32: NVIDIA GPUs, from Ampere on."""
    on_nvidia = device.type == "cuda" and torch.version.cuda is not None
    return on_nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


def prepare_device(device: torch.device, precision: str) -> None:
    """Settings of the process; call it before the first tensor."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        allow_tf32(precision != "fp32")  # with bf16 for what stays in fp32
        torch.backends.cudnn.benchmark = True
    elif device.type == "cpu":
        keep_freed_memory()


def allow_tf32(allowed: bool) -> None:
    """Turns TF32 on or off, for matrix products and convolutions (on by default for the latter)."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def keep_freed_memory() -> None:
    """Lets glibc keep freed memory for the next step.

    By default it returns the activations of each step to the system, and the next step has a page
    fault for each page: several percent of a train step on a CPU. One arena for all threads, so
    that a thread can reuse what another has freed.
    """
    if libc := _glibc():
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 25)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TOP_PAD, 1 << 26)
        libc.mallopt(_M_ARENA_MAX, 1)


def return_freed_memory() -> None:
    """Returns freed memory to the system, after the last step."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """Autocast for forward passes; does nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of square matmuls, the best of a few: an upper limit for a train step."""
    # Not torch.utils.benchmark: with a CUDA toolkit and no GPU, importing it logs a warning.
    side = RATE_SIDE.get(device.type, 2048)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best, begun = float("inf"), time.perf_counter()
    a @ b  # warm-up
    while best == float("inf") or time.perf_counter() - begun < RATE_SECONDS:
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# --- Versions and machine, for the records of a run


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the packages that can change metrics."""
    used = {name: version(name) for name in ("torch", "timm", "torchvision")}
    return {"spiralrope": __version__, **used, "python": platform.python_version()}


def version_of(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def dependencies() -> Iterator[tuple[Requirement, str | None, bool]]:
    """(requirement, installed version or None, whether optional) of each dependency.

    Optional ones only if installed; those of the extra `dev` never.
    """
    try:
        lines = requires(PACKAGE) or []
    except PackageNotFoundError:
        lines = []  # a checkout that is not installed
    for line in lines:
        wanted = Requirement(line)
        optional = wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})
        if wanted.marker is not None and wanted.marker.evaluate({"extra": "dev"}) and optional:
            continue
        installed = version_of(wanted.name)
        if installed is not None or not optional:
            yield wanted, installed, optional


def device_name(device: torch.device) -> str:
    """The model name of the GPU or CPU."""
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
    """The commit of this checkout, with `-dirty` if there are changes; empty outside git."""
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
