from __future__ import annotations

import pytest

from spiralrope_cli.core.config.resolve import read_config
from spiralrope_cli.core.errors import ConfigError


def test_a_config_of_an_earlier_version_is_read(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("optim: {steps: 7}\naugment: {max_shift: 0.5, max_rotation: 3}\n")
    assert read_config(file) == {"max_steps": 7, "translate": 0.5, "degrees": 3.0}


@pytest.mark.parametrize("optim", ["{steps: 7, max_steps: 8}", "{max_steps: 8, steps: 7}"])
def test_a_value_under_its_old_name_and_its_new_one_is_refused(tmp_path, optim):
    file = tmp_path / "config.yaml"
    file.write_text(f"optim: {optim}\n")
    with pytest.raises(ConfigError, match="'steps' and 'max_steps' are one"):
        read_config(file)
