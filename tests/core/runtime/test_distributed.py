from __future__ import annotations

import signal

import pytest

from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.runtime import distributed
from spiralrope_cli.core.runtime.distributed import open_context


@pytest.mark.parametrize(("rank", "local", "before"), [(0, 0, 0), (1, 1, 2), (2, 0, 1), (3, 1, 2)])
def test_the_first_of_each_machine_goes_before_its_others(monkeypatch, rank, local, before):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local))
    waits = []
    monkeypatch.setattr(distributed, "barrier", lambda: waits.append(1))
    with distributed.main_process_first():
        assert len(waits) == before
    assert len(waits) == 2  # on all processes the same number


def test_a_signal_after_the_last_step_has_its_word(tmp_path, capsys):
    machine = MachineConfig(device="cpu", precision="fp32")
    with pytest.raises(SystemExit) as left, open_context(machine, tmp_path):
        signal.raise_signal(signal.SIGINT)
    assert left.value.code == 130
    assert capsys.readouterr().err == "SIGINT came after the last step\n"
