"""Pipelines that stock diffusers loads, and samples as we do."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTPipeline
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
from hub_server import pushes_a_card
from typer.testing import CliRunner

from spiralrope_cli import DiT, GaussianDiffusion, RopeConfig, load_model, main
from spiralrope_cli.core.config.samples import GuidanceConfig
from spiralrope_cli.core.diffusion.samplers import SAMPLERS, guided
from spiralrope_cli.core.errors import ConfigError

BOUND = 1e-5
"""Of pixels in [0, 1], in fp32."""


@pytest.fixture(autouse=True)
def own_modules(tmp_path, monkeypatch):
    """Where diffusers copies the code of a pipeline to."""
    place = str(tmp_path / "modules")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", place)


def saved_dit(folder, **more):
    torch.manual_seed(0)
    given = {"rope": RopeConfig(), "input_size": 8, "num_classes": 5, **more}
    model = DiT(32, 2, 2, **given)
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def export(*words):
    done = CliRunner().invoke(main.app, ["export", *map(str, words)])
    if done.exception is not None:
        raise done.exception
    return done.stdout.strip()


def load(place):
    pipeline = DiffusionPipeline.from_pretrained(
        place, trust_remote_code=True, low_cpu_mem_usage=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ours(model, vae, scale):
    """Our sampler with the noise that the pipeline draws."""
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    guidance = GuidanceConfig(cfg_scale=scale, cfg_channels="all")
    predict = guided(model, torch.tensor([1, 2]), guidance)
    with torch.no_grad():
        *_, latents = SAMPLERS["ddim"](GaussianDiffusion("ddim5"), predict, noise, None)
        decoder = AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False)
        images = decoder.decode(latents / decoder.config.scaling_factor).sample
    return (images / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize(
    "kind",
    [
        {"rope": RopeConfig(rotate=4, projection="exact"), "pretrain_grid": (2, 2)},
        {"rope": RopeConfig(enabled=False)},
        {"rope": RopeConfig(rope_kind="mixed")},
        {"qk_norm": True},
    ],
    ids=str,
)
def test_stock_diffusers_samples_what_we_sample(runs, tiny_vae, kind):
    source = saved_dit(runs / "dit", **kind)
    folder = export(source, "--layout", "diffusers", "--vae", tiny_vae)
    assert folder == "exports/dit-model-diffusers"
    pipeline = load(folder)
    assert type(pipeline) is DiTPipeline
    for scale in (1.0, 4.0):
        drawn = pipeline(
            [1, 2],
            guidance_scale=scale,
            generator=torch.Generator().manual_seed(1),
            num_inference_steps=5,
            output_type="np",
        ).images
        drawn = torch.from_numpy(drawn).permute(0, 3, 1, 2)
        expected = ours(load_model(source), tiny_vae, scale)
        assert expected.std() > 0.05
        torch.testing.assert_close(drawn, expected, rtol=0, atol=BOUND)


def test_the_folder_is_a_source_itself(runs, tiny_vae):
    source = saved_dit(runs / "dit")
    folder = export(source, "--layout", "diffusers", "--vae", tiny_vae)
    same, model = load_model(folder), load_model(source)
    assert same.init_args == model.init_args
    for name, value in model.state_dict().items():
        assert torch.equal(same.state_dict()[name], value)


@pushes_a_card
def test_a_pipeline_comes_from_the_hub(hub, runs, tiny_vae):
    words = ["--layout", "diffusers", "--vae", tiny_vae, "--push", "me/dit", "--license", "mit"]
    assert export(saved_dit(runs / "dit"), *words) == f"{hub.url}/me/dit"
    assert not (runs / "exports").exists()
    card = hub.repos["me/dit"]["README.md"].decode()
    assert "library_name: diffusers" in card
    code = card.partition("```python\n")[2].partition("```")[0]
    found = {}
    exec(code, found)
    assert found["image"].size == (64, 64)
    assert load_model("hf:me/dit").num_classes == 5


def test_a_network_of_pixels_is_refused(runs, drawn_once, tiny_vae):
    with pytest.raises(ConfigError, match="it generates pixels"):
        export(drawn_once, "--layout", "diffusers", "--vae", tiny_vae)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"input_size": (4, 8)}, "its latents are 4x8"),
        ({"num_classes": 1001}, "it has 1001 classes"),
    ],
)
def test_what_a_pipeline_cannot_do_is_refused(runs, tiny_vae, more, told):
    source = saved_dit(runs / "dit", **more)
    with pytest.raises(ConfigError, match=f"DiTPipeline cannot sample from .*{told}"):
        export(source, "--layout", "diffusers", "--vae", tiny_vae)


def test_a_classifier_is_no_pipeline(runs, trained_once):
    with pytest.raises(ConfigError, match="it is a deit-64x2x2, no DiT"):
        export(trained_once, "--layout", "diffusers")


def test_the_transformer_of_diffusers_has_other_timesteps_than_dit():
    """Why weights without RoPE are no DiTTransformer2DModel: it would compute something else."""
    theirs = CombinedTimestepLabelEmbeddings(5, 32).time_proj
    index = torch.arange(128)
    for divisor, near in ((127, True), (128, False)):
        phase = 999 * 10000.0 ** -(index / divisor)
        expected = torch.cat((phase.cos(), phase.sin()))
        apart = (theirs(torch.tensor([999]))[0] - expected).abs().max()
        assert (apart < 1e-2) == near


def test_the_index_names_our_module(runs, tiny_vae):
    folder = export(saved_dit(runs / "dit"), "--layout", "diffusers", "--vae", tiny_vae)
    index = json.loads((runs / folder / "model_index.json").read_text())
    assert index["transformer"] == ["spiralrope_dit", "SpiralRopeDiT"]
    module = (runs / folder / "transformer" / "spiralrope_dit.py").read_text()
    assert module.startswith("from spiralrope_cli.diffusers_models import SpiralRopeDiT")
