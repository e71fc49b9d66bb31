from __future__ import annotations

import pytest

from spiralrope_cli.core.config.diffusion import GuidanceConfig, spaced_timesteps
from spiralrope_cli.core.errors import ConfigError


@pytest.mark.parametrize("steps", [2, 3, 7, 250, 999, 1000, "334,333,333", "1,1"])
def test_chains_have_the_asked_length_and_rise(steps):
    chosen = spaced_timesteps(steps)
    assert len(chosen) == sum(int(part) for part in str(steps).split(","))
    assert chosen == sorted(set(chosen))
    assert chosen[0] == 0
    assert chosen[-1] <= 999


def test_one_section_reaches_from_first_to_last():
    assert all(spaced_timesteps(steps)[-1] == 999 for steps in range(2, 1001))


@pytest.mark.parametrize(
    "steps",
    ["0", "1", "1001", "-5", "2.5", "", "x", "10,", "600,10", "ddim", "ddim3000", "ddim300"],
)
def test_chains_that_do_not_exist_are_refused(steps):
    with pytest.raises(ConfigError, match="--steps"):
        spaced_timesteps(steps)


def test_guidance_acts_inside_its_interval_alone():
    guidance = GuidanceConfig(cfg_scale=1.5, cfg_interval=(100, 500))
    acts = [t for t in (0, 99, 100, 499, 500, 999) if guidance.acts_at(t)]
    assert acts == [100, 499]
    assert all(GuidanceConfig(cfg_scale=1.5).acts_at(t) for t in (0, 999))
    assert not any(GuidanceConfig().acts_at(t) for t in (0, 500, 999))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("cfg_scale", 0.9),
        ("cfg_scale", float("nan")),
        ("cfg_scale", float("inf")),
        ("cfg_channels", "4"),
        ("cfg_interval", (500, 100)),
        ("cfg_interval", (0, 1001)),
        ("cfg_interval", (-1, 10)),
        ("cfg_interval", (5, 5)),
    ],
)
def test_guidance_that_cannot_be_is_refused(option, value):
    with pytest.raises(ConfigError, match="--" + option.replace("_", "-")):
        GuidanceConfig(**{option: value})
