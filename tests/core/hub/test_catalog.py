from __future__ import annotations

import pytest

from spiralrope_cli.core.config.models import DEIT_SIZES, RopeConfig
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.hub.catalog import INCEPTION_VARIABLE, ROWS, find_row


def test_every_row_says_where_it_comes_from():
    assert len({row.name for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert bool(row.repo) != bool(row.url)
        assert row.kind in ("deit", "dit", "vae", "inception", "reference")
        assert row.what
        if row.rope is not None:
            RopeConfig(**row.rope)
        if row.kind == "deit":
            assert row.arch in DEIT_SIZES


def test_the_step_is_the_true_one_and_not_that_of_the_file_name():
    best = find_row("dit-xl2@7m")
    assert best.file_name == "0700000.pth"
    assert best.steps == 7_000_000
    assert best.rope == {"rotate": 4, "max_freq_lang": 1.5, "same_theta": False}
    assert find_row("dit-xl2@400k").steps == 400_000
    assert find_row("dit-xl2@400k").arch == best.arch == "dit-xl2"


def test_the_best_one_needs_no_suffix():
    assert find_row("dit-xl2") is find_row("dit-xl2@7m")
    assert find_row(" DiT-XL2 ") is find_row("dit-xl2@7m")


@pytest.mark.parametrize(
    ("name", "guess"),
    [("deit-x", "deit-s"), ("dit-xl2@7k", "dit-xl2@7m"), ("incepton", "inception")],
)
def test_a_wrong_name_brings_the_nearest(name, guess):
    with pytest.raises(
        ConfigError, match=f"{name} is not a published name(.|\n)*did you mean {guess}"
    ):
        find_row(name)
    with pytest.raises(ConfigError) as far:
        find_row("zzzzzzzz")
    assert "did you mean" not in str(far.value)


def test_vaes_bring_what_diffusers_reads():
    assert find_row("vae-ema").repo == "stabilityai/sd-vae-ft-ema"
    assert find_row("vae-mse").repo == "stabilityai/sd-vae-ft-mse"
    assert set(find_row("vae-mse").files) == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_a_mirror_takes_the_place_of_the_published_address(monkeypatch):
    assert find_row("inception").source_url.startswith("https://github.com/toshas/torch-fidelity/")
    monkeypatch.setenv(INCEPTION_VARIABLE, "https://mirror.example/i.pth")
    assert find_row("inception").source_url == "https://mirror.example/i.pth"
    assert "512/VIRTUAL_imagenet512.npz" in find_row("imagenet512-ref").source_url
