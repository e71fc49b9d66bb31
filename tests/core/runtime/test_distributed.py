from __future__ import annotations

import signal

from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.runtime.distributed import open_context


def test_a_signal_after_the_last_step_has_its_word(tmp_path, capsys):
    with open_context(MachineConfig(device="cpu", precision="fp32"), tmp_path):
        signal.raise_signal(signal.SIGINT)
    assert capsys.readouterr().err == "SIGINT came after the last step\n"
