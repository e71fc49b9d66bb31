from __future__ import annotations

import itertools
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.runtime import distributed
from spiralrope_cli.core.runtime.distributed import open_context


def test_the_first_of_each_machine_goes_before_its_others(monkeypatch):
    """Four processes on two machines; each is a thread with a store of its own."""
    order, here = [], threading.local()
    stores = HashStore()
    monkeypatch.setattr(distributed, "_store", stores)
    monkeypatch.setattr(distributed, "get_rank", lambda: here.rank)
    monkeypatch.setattr(distributed, "local_rank", lambda: (here.rank % 2, 2))
    monkeypatch.setattr(distributed, "all_gather_object", lambda place: [0, 2, 1, 2])
    monkeypatch.setattr(distributed, "_turns", itertools.repeat(0))

    def process(rank):
        here.rank = rank
        with distributed.main_process_first():
            time.sleep(0.05)
            order.append(rank)
        assert len(order) == 4  # none goes on alone

    with ThreadPoolExecutor() as pool:
        list(pool.map(process, [3, 2, 1, 0]))
    assert order[:2] == [0, 2]
    assert sorted(order[2:]) == [1, 3]


def test_a_signal_after_the_last_step_has_its_word(tmp_path, capsys):
    machine = MachineConfig(device="cpu", precision="fp32")
    with pytest.raises(SystemExit) as left, open_context(machine, tmp_path):
        signal.raise_signal(signal.SIGINT)
    assert left.value.code == 130
    assert capsys.readouterr().err == "SIGINT came after the last step\n"


def test_nohup_is_kept(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with open_context(MachineConfig(device="cpu", precision="fp32"), tmp_path) as ctx:
            signal.raise_signal(signal.SIGHUP)
            assert not ctx.stop.agreed(ctx.device, True)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
