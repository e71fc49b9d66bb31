"""What a dry run finds of published weights and VAEs: that which is here, and no download."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_server import HubServer

from spiralrope_cli.core.errors import CheckpointError, ConfigError
from spiralrope_cli.core.hub.catalog import WEIGHTS_REPO, find_row
from spiralrope_cli.core.hub.source import (
    VAE_CONFIG,
    VAE_WEIGHTS,
    best_step,
    find_source,
    find_vae,
    local_vae,
)
from spiralrope_cli.core.weights import fetch_source


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server that has a VAE and DiT-S/2, and an empty cache."""
    server = HubServer()
    config = b'{"_class_name": "AutoencoderKL", "block_out_channels": [1, 1, 1, 1]}'
    server.repos[find_row("vae-ema").repo] = {VAE_CONFIG: config, VAE_WEIGHTS: b"weights"}
    server.repos[WEIGHTS_REPO] = {find_row("dit-s2").file: b"weights"}
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, "huggingface_hub.file_download"):  # the latter's before version 1
        monkeypatch.setattr(f"{module}.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "hub"))
    yield server
    server.close()


def test_a_vae_is_taken_where_it_is_here(hub):
    assert local_vae("ema") is None
    assert not hub.asked
    assert find_vae("ema").weights.read_bytes() == b"weights"
    asked = len(hub.asked)
    assert local_vae("ema") == find_vae("ema")
    assert len(hub.asked) == asked


def test_a_folder_that_holds_no_vae_is_told_without_a_download(tmp_path):
    with pytest.raises(ConfigError, match="--vae nowhere is neither ema nor mse nor a folder"):
        local_vae("nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        local_vae(str(tmp_path))


def test_weights_are_taken_where_they_are_here(hub):
    source = find_source("dit-s2")
    with pytest.raises(
        CheckpointError, match="the weights of dit-s2 are not downloaded"
    ) as refused:
        fetch_source(source, download=False)
    assert refused.value.hint == "spiralrope fetch dit-s2 downloads them"
    assert refused.value.exit_code == 1
    assert len(str(refused.value).splitlines()) == 2
    assert not hub.asked
    fetched = fetch_source(source)
    assert fetched.place is not None
    assert fetched.place.read_bytes() == b"weights"
    asked = len(hub.asked)
    assert fetch_source(source, download=False) == fetched
    assert len(hub.asked) == asked


@pytest.mark.parametrize("download", [False, True])
def test_what_is_no_network_is_told_before_that(hub, download):
    with pytest.raises(CheckpointError, match="is not a DeiT or DiT"):
        fetch_source(find_source("vae-ema"), download=download)
    assert not hub.asked


def test_a_file_needs_no_download(tmp_path):
    (tmp_path / "weights.pth").touch()
    source = find_source(str(tmp_path / "weights.pth"))
    assert fetch_source(source, download=False) is source
    assert source.place == Path(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    "content", ["[" * 20_000, "", "[]", "5", '{"step": 1e999}', '{"step": NaN}', '{"step": "x"}']
)
def test_a_damaged_pointer_to_the_best_checkpoint_is_one_line(tmp_path, content):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.json").write_text(content)
    with pytest.raises(CheckpointError, match="has no best checkpoint"):
        best_step(tmp_path)
