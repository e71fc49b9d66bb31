"""Networks go through folders and the Hub, and mean the same to all who load them."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import spiralrope_cli.timm_models  # noqa: F401
from spiralrope_cli import DeiT, DiT, RopeConfig, load_model
from spiralrope_cli.core.errors import CheckpointError

ROPES = [
    {"rotate": 4, "projection": "exact", "scaling": "extrapolate"},
    {"rotate": 2, "same_theta": True, "max_freq_lang": 1.0},
    {"rope_kind": "mixed"},
    {"enabled": False},
]


def filled(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def deit(**more):
    more = {"rope": RopeConfig(rotate=4), "pretrain_grid": (3, 5), **more}
    sizes = {"image_size": (16, 24), "patch_size": 4, "in_chans": 1, "num_classes": 5}
    return filled(DeiT(32, 2, 2, **sizes, **more))


def dit(**more):
    more = {"rope": RopeConfig(rotate=2), "qk_norm": True, "label_dropout": 0.0, **more}
    return filled(DiT(32, 2, 2, input_size=(4, 8), num_classes=5, **more))


@pytest.fixture
def images():
    return torch.randn(2, 1, 16, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def noised():
    x = torch.randn(2, 4, 4, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([7, 900]), torch.tensor([1, 2])


@pytest.mark.parametrize("rope", ROPES, ids=str)
def test_a_deit_comes_back_as_it_went(tmp_path, images, rope):
    model = deit(rope=RopeConfig(**rope))
    model.save_pretrained(tmp_path)
    for back in (DeiT.from_pretrained(tmp_path), load_model(tmp_path)):
        assert torch.equal(back(images), model(images))
        assert back.init_args == model.init_args
        assert not back.training


@pytest.mark.parametrize("rope", ROPES, ids=str)
def test_a_dit_comes_back_as_it_went(tmp_path, noised, rope):
    model = dit(rope=RopeConfig(**rope))
    model.save_pretrained(tmp_path)
    for back in (DiT.from_pretrained(tmp_path), load_model(tmp_path)):
        assert torch.equal(back(*noised), model(*noised))
    assert DiT.from_pretrained(tmp_path).init_args == model.init_args


def test_what_was_pushed_is_one_model_for_all(hub, images):
    model = deit()
    model.push_to_hub("me/vit", private=True)
    assert "me/vit" in hub.private
    tiny = "spiralrope_deit_tiny_patch16_224"
    for back in (
        DeiT.from_pretrained("me/vit"),
        DeiT.from_pretrained("me/vit", revision=hub.commits["me/vit"][0][0]),
        load_model("hf:me/vit"),
        load_model("hf:me/vit/model.safetensors@main"),
        timm.create_model("hf-hub:me/vit", pretrained=True).eval(),
        timm.create_model(tiny, True, pretrained_cfg_overlay={"hf_hub_id": "me/vit"}).eval(),
    ):
        assert torch.equal(back(images), model(images))
    card = ModelCard.load("me/vit")
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.eval_results is None
    assert 'load_model("hf:me/vit")' in card.text
    assert "arXiv:2602.03227" in card.text


def test_config_json_has_what_every_reader_needs(tmp_path):
    deit().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["arch"], config["num_heads"], config["rope"]["rotate"]) == ("deit-32x2x2", 2, 4)
    assert config["architecture"] == "spiralrope_deit_tiny_patch16_224"
    assert config["pretrained_cfg"]["input_size"] == [1, 16, 24]
    assert set(config["rope"]) == set(RopeConfig.__dataclass_fields__)
    dit().save_pretrained(tmp_path / "dit")
    config = json.loads((tmp_path / "dit" / "config.json").read_text())
    assert (config["arch"], config["label_dropout"]) == ("dit-32x2x2-2", 0.0)
    assert "architecture" not in config, "timm has no DiT"


def test_the_wrong_class_and_no_config_are_told(tmp_path):
    dit().save_pretrained(tmp_path / "dit")
    with pytest.raises(CheckpointError, match="is a dit-32x2x2-2, so it is no DeiT"):
        DeiT.from_pretrained(tmp_path / "dit")
    (tmp_path / "dit" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json of this package"):
        DiT.from_pretrained(tmp_path / "dit")


def test_options_of_another_version_are_not_ignored(tmp_path):
    deit().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope"]["curl"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"RoPE options of another version.*curl"):
        DeiT.from_pretrained(tmp_path)


def test_a_missing_tensor_is_not_a_random_one(tmp_path):
    deit().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["norm.scale"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"norm\.scale"):
        DeiT.from_pretrained(tmp_path)


def test_a_damaged_file_is_found(tmp_path):
    deit().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        load_model(tmp_path)
