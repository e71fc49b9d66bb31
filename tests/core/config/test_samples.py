"""Which VAE and image size a network draws with."""

from __future__ import annotations

import pytest

from spiralrope_cli.core.config.samples import (
    GuidanceConfig,
    resolve_image_size,
    resolve_vae,
    space_timesteps,
)
from spiralrope_cli.core.errors import ConfigError


@pytest.mark.parametrize("steps", [2, 3, 7, 250, 999, 1000, "334,333,333", "1,1"])
def test_chains_have_the_asked_length_and_rise(steps):
    chosen = space_timesteps(steps)
    assert len(chosen) == sum(int(part) for part in str(steps).split(","))
    assert chosen == sorted(set(chosen))
    assert chosen[0] == 0
    assert chosen[-1] <= 999


def test_one_section_reaches_from_first_to_last():
    assert all(space_timesteps(steps)[-1] == 999 for steps in range(2, 1001))


@pytest.mark.parametrize(
    "steps",
    ["0", "1", "1001", "-5", "2.5", "", "x", "10,", "600,10", "ddim", "ddim3000", "ddim300"],
)
def test_chains_that_do_not_exist_are_refused(steps):
    with pytest.raises(ConfigError, match="--num-sampling-steps"):
        space_timesteps(steps)


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


@pytest.mark.parametrize(
    ("channels", "trained", "given", "expected"),
    [
        (4, None, None, "mse"),
        (4, "ema", None, "mse"),
        (4, "ema", "ema", "ema"),
        (1, None, None, "none"),
        (3, "none", None, "none"),
    ],
)
def test_the_vae_is_the_one_given_or_goes_with_the_training(channels, trained, given, expected):
    assert resolve_vae("it", channels, trained=trained, given=given) == expected


@pytest.mark.parametrize(
    ("channels", "trained", "given", "told"),
    [
        (4, "gone", None, "it was trained with the VAE gone, which does not exist here"),
        (4, None, "none", "it generates 4 channels; only a VAE decodes these"),
        (2, None, None, "it generates 2 channels"),
        (3, None, "mse", "it generates pixels .3 channel"),
    ],
)
def test_a_vae_that_cannot_decode_is_refused(channels, trained, given, told):
    with pytest.raises(ConfigError, match=told):
        resolve_vae("it", channels, trained=trained, given=given)


def test_the_image_size_is_the_one_given_or_as_trained():
    trained = {"trained": (4, 6), "rope": True}
    assert resolve_image_size("dit-s2", "none", given=None, **trained) == (4, 6)
    assert resolve_image_size("dit-s2", "mse", given=None, **trained) == (32, 48)
    assert resolve_image_size("dit-s2", "mse", given=(64, 64), **trained) == (64, 64)
    with pytest.raises(
        ConfigError, match="8x8: these weights have no RoPE, so they generate 4x6 only"
    ):
        resolve_image_size("dit-s2", "none", trained=(4, 6), given=(8, 8), rope=False)
