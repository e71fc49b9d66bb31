"""What a dry run finds of published weights and VAEs: that which is here, and no download."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_server import HubServer, use_hub

from spiralrope_cli.core.errors import CheckpointError, ConfigError, FetchError
from spiralrope_cli.core.hub.catalog import WEIGHTS_REPO, find_row
from spiralrope_cli.core.hub.source import (
    DIFFUSERS_FILE,
    HUB_CONFIG,
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
    server.repos[find_row("vae-ema").repo] = {HUB_CONFIG: config, DIFFUSERS_FILE: b"weights"}
    server.repos[WEIGHTS_REPO] = {find_row("dit-s2").file: b"weights"}
    use_hub(server, monkeypatch, tmp_path, token="")
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
        fetch_source(source, download="never")
    assert refused.value.hint == "spiralrope fetch dit-s2 downloads them"
    assert refused.value.exit_code == 1
    assert len(str(refused.value).splitlines()) == 2
    assert not hub.asked
    fetched = fetch_source(source)
    assert fetched.place is not None
    assert fetched.place.read_bytes() == b"weights"
    asked = len(hub.asked)
    assert fetch_source(source, download="never") == fetched
    assert len(hub.asked) == asked


@pytest.mark.parametrize("download", ["never", "newest"])
def test_what_is_no_network_is_told_before_that(hub, download):
    with pytest.raises(CheckpointError, match="is not a DeiT or DiT"):
        fetch_source(find_source("vae-ema"), download=download)
    assert not hub.asked


def test_a_file_needs_no_download(tmp_path):
    (tmp_path / "weights.pth").touch()
    source = find_source(str(tmp_path / "weights.pth"))
    assert fetch_source(source, download="never") is source
    assert source.place == Path(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    "content", ["[" * 20_000, "", "[]", "5", '{"step": 1e999}', '{"step": NaN}', '{"step": "x"}']
)
def test_a_damaged_pointer_to_the_best_checkpoint_is_one_line(tmp_path, content):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.json").write_text(content)
    with pytest.raises(CheckpointError, match="has no best checkpoint"):
        best_step(tmp_path)


# --- hf:OWNER/NAME
@pytest.fixture
def shared(hub):
    """A repository of somebody; its files are stand-ins."""
    hub.repos["you/vit"] = {"README.md": b"# A card", "model.safetensors": b"first"}
    return hub


def upload(hub, **files):
    """Another commit of you/vit."""
    content = {"README.md": b"# A card", **{f"{n}.safetensors": b for n, b in files.items()}}
    number = len(hub.commits.setdefault("you/vit", []))
    hub.commits["you/vit"].append((f"{number}" * 40, content))
    hub.repos["you/vit"] = content


def test_weights_on_the_hub_are_the_newest_where_a_command_begins(shared):
    source = find_source("hf:you/vit")
    with pytest.raises(CheckpointError, match="hf:you/vit are not downloaded, and --dry-run"):
        fetch_source(source, download="never")
    assert not shared.asked
    first = fetch_source(source)
    assert first.place.read_bytes() == b"first"
    upload(shared, model=b"second")
    asked = len(shared.asked)
    for download in ("never", "missing"):
        assert fetch_source(source, download=download) == first, "workers read what the plan read"
    assert len(shared.asked) == asked
    assert fetch_source(source).place.read_bytes() == b"second"
    shared.close()
    assert fetch_source(source).place.read_bytes() == b"second", "what is here is taken"


def test_offline_takes_what_is_here_and_asks_nobody(shared, monkeypatch):
    first = fetch_source(find_source("hf:you/vit"))
    shared.asked.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch_source(find_source("hf:you/vit")) == first
    with pytest.raises(FetchError, match="hf:you/vit@v0 is not downloaded") as refused:
        fetch_source(find_source("hf:you/vit@v0"))
    assert refused.value.hint == "fetch it once without HF_HUB_OFFLINE"
    assert not shared.asked


def test_a_revision_and_a_file_are_taken_by_their_names(shared):
    upload(shared, model=b"second", other=b"other")
    for given, content in (
        ("hf:you/vit", b"second"),
        ("hf:you/vit/other.safetensors", b"other"),
        (f"hf:you/vit@{'0' * 40}", b"second"),
    ):
        assert fetch_source(find_source(given)).place.read_bytes() == content
    with pytest.raises(FetchError, match=r"you/vit has no revision v9 \(404\)"):
        fetch_source(find_source("hf:you/vit@v9"))
    with pytest.raises(FetchError, match=r"you/vit has no file x\.pth") as refused:
        fetch_source(find_source("hf:you/vit/x.pth"))
    assert refused.value.hint == "it has model.safetensors, other.safetensors"


def test_several_files_are_named_and_none_is_guessed(shared):
    upload(shared, a=b"a", b=b"b")
    with pytest.raises(FetchError, match="holds several files of weights") as refused:
        fetch_source(find_source("hf:you/vit"))
    assert refused.value.hint == "name one of a.safetensors, b.safetensors"


@pytest.mark.parametrize(
    ("refuse", "told"),
    [
        ((401, "RepoNotFound"), r"does not let you read you/vit \(401\)"),
        ((403, "GatedRepo"), r"no access to you/vit \(403\)"),
        ((404, "RepoNotFound"), r"has no you/vit \(404\)"),
        ((500, ""), "answered 500 for you/vit"),
    ],
)
def test_refusals_of_the_hub_are_two_lines(shared, refuse, told):
    shared.refuse["you/vit"] = refuse
    with pytest.raises(FetchError, match=told) as refused:
        fetch_source(find_source("hf:you/vit"))
    assert len(str(refused.value).splitlines()) == 2


def test_a_gated_file_says_where_its_terms_are(shared):
    shared.refuse["model.safetensors"] = (401, "GatedRepo")
    with pytest.raises(FetchError, match=r"no access to you/vit/model.safetensors") as refused:
        fetch_source(find_source("hf:you/vit"))
    assert f"accept the terms on {shared.url}/you/vit" in refused.value.hint


def test_a_vae_of_the_hub(shared):
    config = shared.repos[find_row("vae-ema").repo][HUB_CONFIG]
    shared.repos["you/pipe"] = {
        "model_index.json": b"{}",
        "transformer/diffusion_pytorch_model.safetensors": b"network",
        "vae/config.json": config,
        "vae/diffusion_pytorch_model.safetensors": b"vae",
    }
    assert local_vae("hf:you/pipe") is None
    assert find_vae("hf:you/pipe").weights.read_bytes() == b"vae"
    assert local_vae("hf:you/pipe/vae").weights.read_bytes() == b"vae"
    source = find_source("hf:you/pipe")
    with pytest.raises(CheckpointError, match="are not downloaded"):
        fetch_source(source, download="never")  # the VAE alone is
    assert fetch_source(source).place.read_bytes() == b"network"
