"""A worker process: process group, collectives, signals, lock of the run folder."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.runtime import device as devices
from spiralrope_cli.core.runtime.launch import ERROR_FOLDER_VARIABLE, usable_cores
from spiralrope_cli.core.runtime.progress import say
from spiralrope_cli.core.runtime.run_folder import hold_folder, write_json
from spiralrope_cli.core.storage import ENVIRONMENT_FILE

_T = TypeVar("_T")

GPU_TIMEOUT, CPU_TIMEOUT = timedelta(minutes=10), timedelta(minutes=30)
"""Of collectives: all wait while one process writes a checkpoint, or samples a grid of images."""
PATIENCE = timedelta(hours=6)
"""While one process downloads or unpacks a data set."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_store: dist.Store | None = None
"""Of the process group."""
_ended: list[dist.ProcessGroup | None] = []
"""Kept until the process ends: old versions of torch (2.6 does) join the threads of a gloo group
with the GIL held when it is freed, and a thread that frees a tensor waits for the GIL."""
_turns = itertools.count()

REPEAT_SECONDS = 2.0
"""A worker gets one Ctrl-C twice: from the terminal and from the launcher."""


# --- The process group


def get_rank() -> int:
    """Rank of this process; 0 without a group."""
    return int(os.environ.get("RANK", "0"))


def get_world_size() -> int:
    """Number of processes in the group; 1 without a group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> tuple[int, int]:
    """Rank of this process on its machine, and the number of processes there."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def start(device: torch.device) -> None:
    """Joins the process group of the launcher: NCCL for GPUs, else gloo."""
    global _store
    if get_world_size() > 1 and not dist.is_initialized():
        on_gpu = device.type == "cuda"
        timeout = GPU_TIMEOUT if on_gpu else CPU_TIMEOUT
        # A time-out ends the process; the record of all collectives is for those who debug NCCL.
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        _store = dist.PrefixStore(_attempt(), store)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            timeout=timeout,
            store=_store,
            rank=rank,
            world_size=world_size,
            device_id=device if on_gpu else None,
        )


def _attempt() -> str:
    """Own keys: a restart, or the next stage of `run`, may find the store of the one before."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    # On several machines torchrun does not count restarts on all of them.
    alone = os.environ.get("GROUP_WORLD_SIZE") == "1"
    return f"{run_id}.{os.environ['TORCHELASTIC_RESTART_COUNT']}" if alone else run_id


def stop() -> None:
    if dist.is_initialized():
        _ended.append(dist.group.WORLD)
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """The first process runs the block, then the first of each other machine, then the rest.

    For example a download into a cache, which machines share or not.
    """
    if _store is None:
        yield
        return
    place = 0 if get_rank() == 0 else 1 if local_rank()[0] == 0 else 2
    places, turn = all_gather_object(place), next(_turns)

    def wait_for(least: int) -> None:
        if keys := [f"turn/{turn}/{r}" for r, each in enumerate(places) if each < least]:
            _store.wait(keys, PATIENCE)

    wait_for(place)
    yield
    _store.set(f"turn/{turn}/{get_rank()}", "")
    wait_for(3)


def all_reduce(value: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Sum over all processes, or their minimum or maximum, in place."""
    if dist.is_initialized():
        dist.all_reduce(value, op)
    return value


def all_gather_object(value: _T) -> list[_T]:
    """The values of all processes, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_rows(rows: Tensor) -> Tensor | None:
    """Rows [n, ...] of all processes, by rank, on the first process; None on the others."""
    if not dist.is_initialized():
        return rows
    counts = all_gather_object(len(rows))
    # gather needs the same shape on all processes.
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts] if get_rank() == 0 else None
    dist.gather(padded, parts)
    if parts is None:
        return None
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


# --- A worker


def after_nohup() -> bool:
    """Whether this process goes on when its terminal closes."""
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@dataclass
class StopRequest:
    """Remembers a signal until the loop can stop; a second one ends the process.

    With `at_once` the first one ends it, because there is nothing to save.
    """

    signal_number: int = 0
    since: float = 0.0
    at_once: bool = False
    _old: dict[int, Any] = field(default_factory=dict)

    def listen(self) -> None:
        for number in SIGNALS:
            if number != signal.SIGHUP or not after_nohup():
                self._old[number] = signal.signal(number, self._on_signal)

    def restore(self) -> None:
        for number, old in self._old.items():
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, old)
        self._old.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.at_once:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_IGN)  # a second one would interrupt the clean-up
            if get_rank() == 0 and ERROR_FOLDER_VARIABLE not in os.environ:
                say(f"ended by {signal.Signals(number).name}")
            raise SystemExit(128 + number)
        if not self.signal_number:
            self.signal_number, self.since = number, now
        elif now - self.since > REPEAT_SECONDS:
            os._exit(128 + number)  # without a checkpoint

    def agreed(self, device: torch.device, ask_all: bool) -> int:
        """The signal for which all processes stop; 0: continue.

        With `ask_all` this is a collective, so all processes must pass the same value.
        """
        if get_world_size() == 1:
            return self.signal_number
        if not ask_all:
            return 0
        number = torch.tensor(self.signal_number, device=device)
        return int(all_reduce(number, dist.ReduceOp.MAX).item())


@dataclass(frozen=True)
class DistContext:
    """Rank, device and precision of this process."""

    rank: int
    world_size: int
    device: torch.device
    precision: str
    precision_reason: str
    stop: StopRequest

    @property
    def dtype(self) -> torch.dtype:
        return devices.DTYPES[self.precision]

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Prints a line, once for all processes."""
        if self.is_first:
            say(text)


@contextlib.contextmanager
def open_context(machine: MachineConfig, folder: Path | None) -> Iterator[DistContext]:
    """Prepares this process for a run, and locks the run folder.

    Without a folder there is nothing to save, so a signal ends the process at once.
    """
    device = devices.pick_device(machine)
    precision, reason = devices.pick_precision(machine.precision, device)
    devices.prepare_device(device, precision)
    request = StopRequest(at_once=folder is None)
    start(device)
    with contextlib.ExitStack() as stack:
        if folder and get_rank() == 0:
            stack.enter_context(hold_folder(folder))
        barrier()
        request.listen()
        stack.callback(request.restore)
        try:
            if len(found := set(all_gather_object(precision))) > 1:
                raise ConfigError(
                    f"the machines differ in --precision {machine.precision}: {sorted(found)}",
                    "give one that all of them have",
                )
            ctx = DistContext(get_rank(), get_world_size(), device, precision, reason, request)
            if machine.precision not in ("auto", precision):
                ctx.say(f"note: --precision {machine.precision} is {precision} here: {reason}")
            yield ctx
            if request.signal_number:  # else a pipeline would go on, or a launcher would wait
                ctx.say(f"{signal.Signals(request.signal_number).name} came after the last step")
                raise SystemExit(128 + request.signal_number)
        except SystemExit:
            stop()  # all processes exit at the same step
            raise
    # Not after an error: the others would fail on the closed connection before it is printed.
    stop()


def write_environment(folder: Path, ctx: DistContext) -> None:
    """Writes `environment.json` of the last command that ran in a folder."""
    environment = {
        "device": ctx.device.type,
        "device_name": devices.device_name(ctx.device),
        "precision": devices.PRECISION_WORDS[ctx.precision],
        "precision_reason": ctx.precision_reason,
        "tf32": ctx.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest",
        "processes": ctx.world_size,
        "threads": torch.get_num_threads(),
        "cores": usable_cores(),
        "system": platform.platform(),
        "commit": devices.commit(),
        "versions": devices.versions(),
    }
    write_json(folder / ENVIRONMENT_FILE, environment)
