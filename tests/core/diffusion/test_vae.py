from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from spiralrope_cli.core.config.dit_runs import LATENT_SCALE
from spiralrope_cli.core.diffusion.vae import load_vae, sample_posterior
from spiralrope_cli.core.errors import CheckpointError, ConfigError
from spiralrope_cli.core.hub.catalog import DIFFUSERS_FILE as VAE_WEIGHTS
from spiralrope_cli.core.hub.catalog import HUB_CONFIG as VAE_CONFIG
from spiralrope_cli.core.hub.source import find_vae

CPU = torch.device("cpu")
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture
def copy(tiny_vae, tmp_path):
    """A copy of the VAE's folder, to be damaged."""
    return shutil.copytree(tiny_vae, tmp_path / "copy")


@pytest.fixture
def images():
    return torch.rand(3, 3, 24, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def change_config(folder, **values):
    path = folder / VAE_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_the_posterior_is_that_of_diffusers(tiny_vae, images):
    vae, peer = load_vae(tiny_vae, CPU), AutoencoderKL.from_pretrained(tiny_vae)
    mean, std = vae.encode(images)
    with torch.no_grad():
        posterior = peer.encode(images).latent_dist
    assert mean.shape == std.shape == (3, 4, 3, 4)
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(std, posterior.std)
    noise = torch.randn_like(mean)
    expected = (posterior.mean + posterior.std * noise) * LATENT_SCALE
    torch.testing.assert_close(sample_posterior(mean, std, noise), expected)


def test_decoding_undoes_the_scale(tiny_vae, images):
    vae, peer = load_vae(tiny_vae, CPU), AutoencoderKL.from_pretrained(tiny_vae)
    latents = torch.randn(2, 4, 3, 4)
    with torch.no_grad():
        expected = peer.decode(latents / LATENT_SCALE).sample
    torch.testing.assert_close(vae.decode(latents), expected)
    assert expected.shape == (2, 3, 24, 32)


def test_bf16_gives_float32_near_the_exact_posterior(tiny_vae, images):
    exact = load_vae(tiny_vae, CPU).encode(images)
    rough = load_vae(tiny_vae, CPU, torch.bfloat16).encode(images)
    for one, other in zip(rough, exact, strict=True):
        assert one.dtype == torch.float32
        assert 0 < (one - other).abs().max() < 0.1


def test_the_vae_is_frozen(tiny_vae, images):
    vae = load_vae(tiny_vae, CPU)
    assert not vae.model.training
    assert not any(weight.requires_grad for weight in vae.model.parameters())
    mean, std = vae.encode(images.requires_grad_())
    assert not mean.requires_grad
    assert not std.requires_grad


def test_the_published_names_of_its_attention_load(copy, tiny_vae, images):
    # The files of sd-vae-ft-* are older than the names that diffusers uses now.
    old = {}
    for name, weight in load_file(copy / VAE_WEIGHTS).items():
        if "attentions" in name:
            for new_name, old_name in OLD_NAMES.items():
                name = name.replace(new_name, old_name)
        old[name] = weight.clone()
    assert any("proj_attn" in name for name in old)
    save_file(old, copy / VAE_WEIGHTS, {"format": "pt"})
    ours, new = load_vae(copy, CPU).encode(images), load_vae(tiny_vae, CPU).encode(images)
    assert torch.equal(ours[0], new[0])


def test_loading_prints_nothing(tiny_vae, capfd):
    load_vae(tiny_vae, CPU)
    assert capfd.readouterr() == ("", "")


def test_its_identity_is_that_of_its_weights(copy, tiny_vae):
    assert find_vae(str(copy)).sha256() == find_vae(str(tiny_vae)).sha256()
    with (copy / VAE_WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert find_vae(str(copy)).sha256() != find_vae(str(tiny_vae)).sha256()


def test_a_scale_in_the_config_is_the_scale(copy):
    change_config(copy, scaling_factor=0.5)
    assert find_vae(str(copy)).scale == load_vae(copy, CPU).scale == 0.5


@pytest.mark.parametrize("name", [VAE_CONFIG, VAE_WEIGHTS])
def test_a_folder_without_its_files_is_refused(copy, name):
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        find_vae(str(copy))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"latent_channels": 16}, "16 latent and 3 output"),
        ({"in_channels": 1, "out_channels": 1}, "1 input, 4 latent and 1 output"),
        ({"block_out_channels": [8, 8]}, "downsamples by 2"),
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny, not an AutoencoderKL"),
    ],
)
def test_a_vae_that_dit_cannot_take_is_refused(copy, values, words):
    change_config(copy, **values)
    with pytest.raises(CheckpointError, match=words):
        find_vae(str(copy))


def test_what_is_no_vae_is_refused(copy, tmp_path):
    with pytest.raises(ConfigError, match="neither ema nor mse nor a folder"):
        find_vae(str(tmp_path / "nowhere"))
    (copy / VAE_CONFIG).write_text("[1]")
    with pytest.raises(CheckpointError, match="not the config of a VAE"):
        find_vae(str(copy))


def test_damaged_weights_are_told_in_one_line(copy):
    whole = (copy / VAE_WEIGHTS).read_bytes()
    (copy / VAE_WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="weights are damaged") as told:
        load_vae(copy, CPU)
    assert "\n" not in told.value.message


def test_weights_that_lack_some_are_refused(copy):
    weights = load_file(copy / VAE_WEIGHTS)
    del weights["encoder.conv_in.weight"]
    save_file(weights, copy / VAE_WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights are missing.*encoder\.conv_in\.weight"):
        load_vae(copy, CPU)
