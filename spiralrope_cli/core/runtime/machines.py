"""The machines of a run: whether all are there, which was lost, and what each has to tell.

Each machine has one launcher. The launchers share a store on the first machine, at
`--rdzv-endpoint`. Torch's rendezvous does not notice a machine that is silent, and its workers
would wait for it until the time-out of their process group.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import itertools
import json
import multiprocessing
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore

from spiralrope_cli.core.config.option import flat_values, leaves
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.errors import ConfigError, LaunchError
from spiralrope_cli.core.runtime.launch import num_local_workers
from spiralrope_cli.core.runtime.progress import say
from spiralrope_cli.core.runtime.run_folder import differences

JOIN_SECONDS = 600
"""How long a machine waits for the others at the start."""
PULSE_SECONDS = 1
SILENT_SECONDS = 30
"""After which a machine is lost."""
GRACE_SECONDS = 15
"""For workers to end by themselves after another machine has failed."""
LEAVE_SECONDS = 10
"""For the launcher to end by itself after another machine was lost."""
WAIT = 0.1
DISCARD = 9
"""A port to which nothing is sent."""


def machines_of(machine: MachineConfig) -> Machines | None:
    """All machines of a run, the same for each stage of `run`; None if there is only this one."""
    return _machines_at(machine.rdzv_endpoint, machine.nnodes) if machine.nnodes > 1 else None


class Machines:
    """All machines of a run, as one of them sees them.

    Attributes:
        rank: number of this machine; 0 has the store.
        names: host name and address of each.
        ended_workers: whether workers of this machine were killed because another one failed.
    """

    def __init__(self, endpoint: str, nnodes: int) -> None:
        self.endpoint, self.nnodes = endpoint, nnodes
        self.names: list[str] = []
        self.ended_workers = False
        self._lost: LaunchError | None = None
        self._round = itertools.count()
        self._attempt = -1
        self._open = threading.Event()  # between the start of an attempt and its end
        self._closed = threading.Event()  # this process ends
        self._heard: dict[int, tuple[bytes, float]] = {}  # rank -> last pulse, and since when
        self._failed = -1, 0.0  # the attempt in which a machine has failed, and since when
        self._broken = False
        host, _, port = endpoint.rpartition(":")
        self._store, self.rank = _join(host.strip("[]"), int(port), endpoint)
        if self.rank >= nnodes:
            raise LaunchError(
                f"--nnodes is {nnodes}, and so many machines are already at {endpoint}",
                "each run needs an endpoint of its own",
            )
        self._address = _own_address(host.strip("[]"), int(port))
        self._store.add(self._pulse_of(self.rank), 1)
        self._pulses = threading.Thread(target=self._pulse, daemon=True)
        self._pulses.start()
        threading.Thread(target=self._judge, daemon=True).start()
        # A thread that returns from the store while Python ends would abort the process.
        atexit.register(self._close)

    @contextlib.contextmanager
    def together(self, run: Any) -> Iterator[str]:
        """One attempt of all machines, from their meeting on; gives it an id."""
        self._attempt += 1
        self.ended_workers = False
        self._open.set()
        try:
            mine = {
                "address": self._address,
                "host": socket.gethostname(),
                "run": _common_options(run),
            }
            found = self.exchange(mine, first=not self.names)
            self.names = [f"machine {each['host']} ({each['address']})" for each in found]
            option_of = {name: opt.called for name, opt in leaves(type(run)).items()}
            for name, each in zip(self.names, found, strict=True):
                if other := differences(found[0]["run"], each["run"], (), option_of.__getitem__):
                    raise ConfigError(
                        f"{name} runs another command: {other}", "give all machines the same one"
                    )
            # By default gloo asks for the address of the host's name, which may be 127.0.1.1.
            peer = found[0 if self.rank else 1]["address"]
            if interface := _interface(_own_address(peer, DISCARD)):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            yield str(self._attempt)
        finally:
            self._open.clear()

    def exchange(self, value: Any, *, first: bool = False, failed: bool = False) -> list[Any]:
        """The values of all machines, by rank. Waits for them; `failed` hurries the others.

        Raises:
            LaunchError: a machine was lost, or at the first meeting did not come in time.
        """
        topic, begun, said = next(self._round), time.monotonic(), False
        keys = [f"{topic}/{rank}" for rank in range(self.nnodes)]
        if self._lost:  # the store would not answer
            raise self._lost
        try:
            self._store.set(keys[self.rank], json.dumps(value))
            if failed:
                self._store.set(f"failed/{self._attempt}", "")
            while not self._store.check(keys):
                waited = time.monotonic() - begun
                if first and not said and waited > 2:
                    say(f"waiting for {self.nnodes} machines at {self.endpoint}")
                    said = True
                if first and waited > JOIN_SECONDS:
                    there = sum(self._store.check([key]) for key in keys)
                    raise LaunchError(
                        f"{there} of {self.nnodes} machines came to {self.endpoint} within "
                        f"{JOIN_SECONDS} s",
                        "start the same command on each of them",
                    )
                self._wait()
            found = [json.loads(each) for each in self._store.multi_get(keys)]
            if self.rank:
                self._store.add(f"{topic}/read", 1)
            else:  # it leaves last, because it has the store
                while self._store.add(f"{topic}/read", 0) < self.nnodes - 1:
                    self._wait()
            return found
        except RuntimeError as error:  # of the store
            self._broken = True
            while not self._lost:
                time.sleep(WAIT)
            raise self._lost from error

    def _wait(self) -> None:
        time.sleep(WAIT)
        if self._lost:
            raise self._lost

    @staticmethod
    def _pulse_of(rank: int) -> str:
        return f"pulse/{rank}"

    def _pulse(self) -> None:
        """Tells the others that this machine is there, and listens to them.

        If the link is lost, a call of the store may never return.
        """
        store, joined = self._store, set[int]()
        try:
            while not self._closed.wait(PULSE_SECONDS):
                attempt = self._attempt
                store.add(self._pulse_of(self.rank), 1)
                for rank in set(range(self.nnodes)) - joined:
                    if store.check([self._pulse_of(rank)]):
                        joined.add(rank)
                ranks = sorted(joined)
                values = store.multi_get([self._pulse_of(rank) for rank in ranks])
                now = time.monotonic()
                for rank, value in zip(ranks, values, strict=True):
                    if self._heard.get(rank, (b"", 0.0))[0] != value:
                        self._heard[rank] = value, now
                if self._failed[0] != attempt and store.check([f"failed/{attempt}"]):
                    self._failed = attempt, now
        except RuntimeError:  # the store has ended with its machine
            self._broken = True

    def _judge(self) -> None:
        """Ends the workers of this machine if another one is lost or has failed."""
        while not self._closed.wait(PULSE_SECONDS / 2):
            if not self._open.is_set():
                continue
            now = time.monotonic()
            silent = [r for r, (_, at) in dict(self._heard).items() if now - at > SILENT_SECONDS]
            if self._broken or silent:
                # If this machine does not hear itself, the store is silent.
                lost = 0 if self._broken or self.rank in silent else silent[0]
                self._leave(lost)
            elif self._failed[0] == self._attempt and now - self._failed[1] > GRACE_SECONDS:
                self._end_workers()

    def _leave(self, lost: int) -> None:
        name = self.names[lost] if self.names else f"a machine at {self.endpoint}"
        self._lost = LaunchError(
            f"the connection to {name} was lost",
            "it was ended, or the network failed; the same command on all machines goes on",
        )
        for _ in range(int(LEAVE_SECONDS / WAIT)):
            if not self._open.is_set():
                return
            self._end_workers()
            time.sleep(WAIT)
        # The main thread waits for the store.
        say(f"error: {self._lost.message}\n  {self._lost.hint}")
        os._exit(self._lost.exit_code)

    def _end_workers(self) -> None:
        self.ended_workers = True
        for child in multiprocessing.active_children():
            child.kill()

    def _close(self) -> None:
        self._closed.set()
        self._pulses.join(2 * PULSE_SECONDS)


_machines_at = functools.cache(Machines)


def _join(host: str, port: int, endpoint: str) -> tuple[TCPStore, int]:
    """The store, and the number of this machine; the first one opens the store."""
    hint = "it is a free port of the first machine; start the same command there"
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise LaunchError(f"--rdzv-endpoint {endpoint}: {host} is unknown", hint) from error
    options: dict[str, Any] = {"wait_for_workers": False, "timeout": timedelta(seconds=60)}
    try:
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
        # The elastic launcher of this process shares it.
        return TCPStore(host, port, is_master=True, multi_tenant=True, **options), 0
    except RuntimeError:
        pass  # another launcher on this machine was faster
    except OSError as error:
        # The address of another machine; or another launcher on this one has the port.
        if error.errno not in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
            raise LaunchError(f"--rdzv-endpoint {endpoint}: {error.strerror}", hint) from error
    deadline, said = time.monotonic() + JOIN_SECONDS, False
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            store = TCPStore(host, port, is_master=False, **options)
            return store, store.add("machines", 1)
        except RuntimeError as error:
            raise LaunchError(
                f"--rdzv-endpoint {endpoint} answers, but not as spiralrope does", hint
            ) from error
        except OSError as error:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"--rdzv-endpoint {endpoint} does not answer: {error}", hint
                ) from error
        if not said:
            say(f"waiting for the first machine at {endpoint}")
            said = True
        time.sleep(PULSE_SECONDS)


def _own_address(host: str, port: int) -> str:
    """The address of this machine on the way to another one; nothing is sent."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _interface(address: str) -> str:
    """The network interface of an IPv4 address of this machine; empty if it is not found."""
    if sys.platform != "linux":
        return ""
    import fcntl

    get_address = 0x8915  # SIOCGIFADDR of netdevice(7)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no address
                found = fcntl.ioctl(probe, get_address, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return ""


def _common_options(run: Any) -> dict[str, str]:
    """Options that must be the same on all machines; paths may differ."""
    own, known = leaves(MachineConfig), leaves(type(run))
    values = {name: str(value) for name, value in flat_values(run).items() if known[name].help}
    same = {n: text for n, text in values.items() if n not in own and os.sep not in text}
    return {**same, "nproc": str(num_local_workers(run.machine))}
