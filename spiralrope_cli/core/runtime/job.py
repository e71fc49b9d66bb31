"""Opens and closes a job in one worker: device, group, folder, signals, report."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.runtime import device as devices
from spiralrope_cli.core.runtime import distributed
from spiralrope_cli.core.runtime.console import say
from spiralrope_cli.core.runtime.run_folder import hold_folder

REPEAT_SECONDS = 2.0
"""One Ctrl-C reaches a worker twice, from the terminal and from the launcher."""


@dataclass
class StopRequest:
    """Remembers a SIGINT or SIGTERM until the loop comes to a good place to stop."""

    signal_number: int = 0
    since: float = 0.0
    _old: dict[int, object] = field(default_factory=dict)

    def listen(self) -> None:
        """Takes the two signals over."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._on_signal)

    def restore(self) -> None:
        """Gives them back."""
        for number, old in self._old.items():
            signal.signal(number, old)  # type: ignore[arg-type]
        self._old.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signal_number:
            self.signal_number, self.since = number, now
        elif now - self.since > REPEAT_SECONDS:
            # Asked again, and meant: leave at once, without a checkpoint.
            os._exit(128 + number)

    def agreed(self, device: torch.device, ask_all: bool) -> int:
        """The signal that all processes stop for, 0 to go on.

        Args:
            device: where the group communicates.
            ask_all: whether every process is at this point now; alone, no one asks.
        """
        if distributed.world_size() == 1:
            return self.signal_number
        if not ask_all:
            return 0
        return int(distributed.largest(torch.tensor(self.signal_number, device=device)).item())


@dataclass(frozen=True)
class Job:
    """One worker's surroundings."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    precision_reason: str
    stop: StopRequest

    @property
    def is_first(self) -> bool:
        """Whether this worker writes and speaks."""
        return self.rank == 0


@contextlib.contextmanager
def open_job(machine: MachineConfig, folder: Path | None) -> Iterator[Job]:
    """Prepares this process for a run in a folder that nobody else may use meanwhile.

    Without a folder there is nothing to save before it stops, so a signal ends it at once.

    Raises:
        CheckpointError: another run holds the folder, or it cannot be written.
        ConfigError: no such device.
    """
    device = devices.pick_device(machine)
    devices.prepare(device)
    dtype, reason = devices.pick_precision(machine.precision, device)
    stop = StopRequest()
    distributed.start(device)
    with contextlib.ExitStack() as leave:
        if folder and distributed.rank() == 0:
            leave.enter_context(hold_folder(folder))
        distributed.barrier()
        if folder:
            stop.listen()
            leave.callback(stop.restore)
        else:
            for number in (signal.SIGINT, signal.SIGTERM):
                leave.callback(_restore, number, signal.signal(number, _leave))
        try:
            yield Job(distributed.rank(), distributed.world_size(), device, dtype, reason, stop)
        except SystemExit:
            distributed.stop()  # everybody leaves at the same step
            raise
    # Not after an error: the others would fail on the closed connection before it is told.
    distributed.stop()


def _leave(number: int, frame: FrameType | None) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # the repetition would break into the clean-up
    if distributed.rank() == 0:
        say(f"ended by {signal.Signals(number).name}")
    raise SystemExit(128 + number)


def _restore(number: int, old: Any) -> None:
    if signal.getsignal(number) == _leave:
        signal.signal(number, old)
