"""What timm's own tests ask of every registered model, and what ours promise besides."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config, resolve_model_data_config
from timm.models import FeatureInfo, group_parameters
from timm.models._features import FeatureGetterNet
from timm.optim import create_optimizer_v2, param_groups_layer_decay

from spiralrope_cli import DeiT, RopeConfig, create_model, timm_models
from spiralrope_cli.core.config.models import DEIT_SIZES
from spiralrope_cli.core.errors import CheckpointError, ConfigError
from spiralrope_cli.core.hub.published import NetworkSpec, published_content
from spiralrope_cli.core.rope import build_angles

ARCHES = {
    "spiralrope_deit_tiny_patch16_224": "deit-ti",
    "spiralrope_deit_small_patch16_224": "deit-s",
    "spiralrope_deit_base_patch16_224": "deit-b",
    "spiralrope_deit_large_patch16_224": "deit-l",
}
TINY = "spiralrope_deit_tiny_patch16_224"
# The wide ones stand with four blocks; the full depth is seen on the meta device.
DEPTH = {"deit-ti": 12, "deit-s": 12, "deit-b": 4, "deit-l": 4}


def built(name, **options):
    """Real weights on a 2x2 grid, with branches that count: a fresh layer scale shuts them off."""
    torch.manual_seed(0)
    model = timm.create_model(
        name, **{"img_size": 32, "depth": DEPTH[ARCHES[name]], "num_classes": 5, **options}
    )
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "gamma" in parameter_name:
                parameter.fill_(0.5)
    return model.eval()


def pictures(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def x():
    return pictures(2, 3, 32, 32)


# ---- the registry


def test_importing_the_module_registers_the_models():
    code = (
        "import timm; before = timm.list_models('spiralrope*'); "
        "import spiralrope_cli.timm_models; print(before, *timm.list_models('spiralrope*'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", *sorted(ARCHES)]
    assert not timm.list_pretrained("spiralrope*")
    assert set(ARCHES) < set(timm_models.__all__)


@pytest.mark.parametrize(("name", "arch"), ARCHES.items())
def test_full_sizes_have_the_parameters_and_names_of_the_core(name, arch):
    with torch.device("meta"):
        model, core = timm.create_model(name), create_model(arch)
    assert [(k, v.shape) for k, v in model.state_dict().items()] == [
        (k, v.shape) for k, v in core.state_dict().items()
    ]
    assert model.num_classes == 1000
    assert model.image_size == (224, 224)


@pytest.mark.parametrize(("name", "arch"), ARCHES.items())
def test_full_sizes_give_logits_and_features_of_the_right_shape(name, arch):
    dim, depth, *_ = DEIT_SIZES[arch]
    with torch.device("meta"):
        images = torch.empty(2, 3, 224, 224)
        model = timm.create_model(name)
        features = timm.create_model(name, features_only=True)
        assert model(images).shape == (2, 1000)
        assert [f.shape for f in features(images)] == [(2, dim, 14, 14)] * 3
    assert features.feature_info.module_name() == [f"blocks.{depth - n}" for n in (3, 2, 1)]


@pytest.mark.parametrize("name", ARCHES)
def test_the_default_config_fits_the_model(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    config = model.default_cfg
    assert config is model.pretrained_cfg
    assert config["architecture"] == name
    assert config["num_classes"] == model.num_classes == 1000
    assert config["input_size"] == (3, 224, 224)
    assert config["pool_size"] is None
    assert f"{config['classifier']}.weight" in model.state_dict()
    assert f"{config['first_conv']}.weight" in model.state_dict()
    assert not config.get("url")
    assert not config.get("hf_hub_id")


def test_data_config_resolves_from_the_model_and_from_its_config():
    with torch.device("meta"):
        model = timm.create_model(TINY)
    data = resolve_data_config(model=model)
    assert data == resolve_data_config(model.pretrained_cfg)
    assert data == resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    assert data == resolve_model_data_config(model)
    assert data["input_size"] == (3, 224, 224)
    assert data["crop_pct"] == 0.875
    assert data["interpolation"] == "bicubic"
    assert data["mean"] == (0.485, 0.456, 0.406)
    assert data["std"] == (0.229, 0.224, 0.225)
    assert resolve_data_config({"crop_pct": 1.0}, model=model)["crop_pct"] == 1.0
    assert "CenterCrop" in str(create_transform(**data))


# ---- forward, backward and head of every size


@pytest.mark.parametrize("name", ARCHES)
def test_logits_features_and_head(name, x):
    model = built(name)
    with torch.no_grad():
        tokens = model.forward_features(x)
        pooled = model.forward_head(tokens, pre_logits=True)
        logits = model(x)
        assert tokens.shape == (2, 5, model.num_features)
        assert pooled.shape == (2, model.head_hidden_size)
        assert logits.shape == (2, 5)
        assert logits.isfinite().all()
        assert torch.equal(model.forward_head(tokens), logits)
        assert torch.equal(model.get_classifier()(pooled), logits)
        model.reset_classifier(0)
        assert model.num_classes == 0
        assert torch.equal(model(x), pooled)
        model.reset_classifier(0, "")
        assert torch.equal(model(x), tokens)
        model.reset_classifier(7, "token")
        assert model(x).shape == (2, 7)
    assert isinstance(model.get_classifier(), torch.nn.Linear)


@pytest.mark.parametrize("name", ARCHES)
def test_every_parameter_has_a_gradient(name, x):
    model = built(name, depth=2).train()
    logits = model(x)
    assert logits.isfinite().all()
    logits.mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", ARCHES)
def test_intermediates_are_those_of_the_forward_pass(name, x):
    model = built(name)
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    with torch.no_grad():
        last, intermediates = model.forward_intermediates(x)
        assert torch.equal(last, model.forward_features(x))
        normed = model.forward_intermediates(x, 1, norm=True, output_fmt="NLC")[1]
        assert torch.equal(normed[0], last[:, 1:])
    assert len(intermediates) == len(info.channels()) == len(model.blocks)
    for channels, reduction, found in zip(
        info.channels(), info.reduction(), intermediates, strict=True
    ):
        assert found.shape == (2, channels, 32 // reduction, 32 // reduction)
        assert found.isfinite().all()


@pytest.mark.parametrize("name", ARCHES)
def test_features_only_gives_the_chosen_blocks(name, x):
    chosen = [0, -2]
    net = built(name, features_only=True, out_indices=chosen, depth=4)
    assert isinstance(net, FeatureGetterNet)
    assert len(net.model.blocks) == 3
    assert not [key for key in net.state_dict() if "head" in key or ".norm.scale" in key]
    with torch.no_grad():
        found = net(x)
        _, expected = built(name, depth=4).forward_intermediates(x, chosen)
    assert net.feature_info.channels() == [f.shape[1] for f in found]
    assert net.feature_info.reduction() == [16, 16]
    # The head is drawn last, so that both have the same blocks.
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert not net.pretrained_cfg.get("classifier")


# ---- the same network as the core's


def test_logits_are_those_of_the_core_for_the_same_weights(x):
    rope = RopeConfig(rotate=4, projection="exact", max_freq_lang=1.0)
    core = create_model("deit-s", rope=rope, image_size=32, num_classes=5).eval()
    model = built("spiralrope_deit_small_patch16_224", **dataclasses.asdict(rope))
    core.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(x), core(x))
        model.load_state_dict(create_model("deit-s", image_size=32, num_classes=5).state_dict())
        assert not torch.equal(model(x), core(x))


@pytest.mark.parametrize(
    "options",
    [
        {"rotate": 4},
        {"enabled": False},
        {"theta": 100.0},
        {"freqs_for": "pixel"},
        {"freqs_for": "pixel", "max_freq": 5.0},
        {"truncate_percentage": 0.9},
        {"max_freq_lang": 1.0},
        {"min_freq_lang": 0.5},
        {"same_theta": True},
        {"projection": "exact"},
        {"scaling": "extrapolate", "pretrain_grid": (2, 2)},
    ],
    ids=str,
)
def test_every_rope_option_is_a_keyword_that_acts(options):
    images = pictures(1, 3, 64, 64)
    plain = {"img_size": 64, "depth": 2}
    if "pretrain_grid" in options:
        plain["pretrain_grid"] = options["pretrain_grid"]
    if "max_freq" in options:
        plain["freqs_for"] = "pixel"
    one, other = built(TINY, **plain), built(TINY, **{**plain, **options})
    rope = {k: v for k, v in options.items() if k != "pretrain_grid"}
    config = RopeConfig(**rope)
    assert one.state_dict().keys() == other.state_dict().keys()
    if config.enabled:
        assert other.rope.config == config
        table = build_angles((4, 4), 64, config, other.rope.pretrain_grid)
        unit = torch.stack((table.cos(), table.sin()), dim=-1).float()
        assert torch.equal(other.rope.cos_sin(other.grid, 1, images.device)[1:], unit)
    with torch.no_grad():
        assert (one(images) - other(images)).abs().max() > 1e-4


def test_the_kind_of_rope_is_a_keyword_and_its_frequencies_are_timms(tmp_path):
    images, options = pictures(1, 3, 64, 64), {"img_size": 64, "depth": 2, "num_classes": 5}
    model = built(TINY, rope_kind="mixed", **options)
    if not hasattr(timm.layers, "RotaryEmbeddingMixed"):
        pytest.skip("this timm is older than its RoPE-Mixed")
    theirs = timm.layers.RotaryEmbeddingMixed(192, 2, 3)
    assert theirs.freqs.shape == model.rope.freqs.shape
    assert "rope.freqs" in model.no_weight_decay()
    groups = param_groups_layer_decay(model, 0.1, model.no_weight_decay(), layer_decay=0.5)
    mine = [each for each in groups for p in each["params"] if p is model.rope.freqs]
    assert [each["weight_decay"] for each in mine] == [0.0]
    model.train()(images).sum().backward()
    assert model.rope.freqs.grad.any()
    last, _ = model.eval().forward_intermediates(images, [0, 1])
    torch.testing.assert_close(last, model.forward_features(images))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = timm.create_model(
        TINY, rope_kind="mixed", checkpoint_path=tmp_path / "model.safetensors", **options
    ).eval()
    assert torch.equal(again(images), model(images))
    axial, plain = (
        built(TINY, **options, **kind) for kind in ({"rope_kind": "axial"}, {"rotate": 0})
    )
    assert torch.equal(axial(images), plain(images))


def test_a_safetensors_checkpoint_of_the_core_loads(tmp_path, x):
    core = create_model("deit-ti", image_size=32, num_classes=5).eval()
    save_file(core.state_dict(), tmp_path / "model.safetensors")
    model = timm.create_model(
        TINY, img_size=32, num_classes=5, checkpoint_path=tmp_path / "model.safetensors"
    ).eval()
    overlaid = timm.create_model(
        TINY,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "model.safetensors"), "num_classes": 5},
        img_size=32,
    ).eval()
    with torch.no_grad():
        assert torch.equal(model(x), core(x))
        assert torch.equal(overlaid(x), core(x))


def exported(folder, rope):
    """A tiny DeiT as `spiralrope export --layout published` writes it, and that DeiT."""
    core = create_model("deit-ti", rope=rope, image_size=32, num_classes=5).eval()
    network = NetworkSpec("deit-ti", rope, 5, (32, 32), (2, 2), (2, 2))
    state = core.state_dict()
    torch.save(published_content(network, state, state, progress={}), folder / "checkpoint.pth")
    return core, folder / "checkpoint.pth"


def test_published_files_with_frequencies_load(tmp_path, x):
    core, file = exported(tmp_path, RopeConfig(rotate=4, max_freq_lang=1.0))
    sizes = {"img_size": 32, "num_classes": 5, "max_freq_lang": 1.0, "rotate": 4}
    model = timm.create_model(TINY, checkpoint_path=file, **sizes).eval()
    other = timm.create_model(TINY, **sizes).eval()
    state = torch.load(file, weights_only=True)["model"]
    assert "blocks.0.attn.rope.freqs" in state
    assert other.load_state_dict(state) == ([], [])
    with torch.no_grad():
        assert torch.equal(model(x), core(x))
        assert torch.equal(other(x), core(x))
    with pytest.raises(RuntimeError, match="Unexpected"):
        other.load_state_dict({**state, "blocks.0.attn.rope.other": torch.ones(1)})


def test_frequencies_of_other_options_are_told(tmp_path):
    _, file = exported(tmp_path, RopeConfig(rotate=4, max_freq_lang=1.0))
    with pytest.warns(UserWarning, match="frequencies in the file differ"):
        timm.create_model(TINY, checkpoint_path=file, img_size=32, num_classes=5, rotate=4)


# ---- keywords of timm


def test_images_of_any_rectangle_patch_and_channels():
    model = built(TINY, depth=1, img_size=(8, 24), patch_size=4, in_chans=1)
    images = pictures(2, 1, 8, 24)
    assert model(images).shape == (2, 5)
    assert model.feature_info == [{"module": "blocks.0", "num_chs": 192, "reduction": 4}]
    ((found, prefix),) = model.forward_intermediates(
        images, return_prefix_tokens=True, intermediates_only=True
    )
    assert found.shape == (2, 192, 2, 6)
    assert prefix.shape == (2, 1, 192)
    lines = model.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
    assert torch.equal(found.flatten(2).transpose(1, 2), lines[0])


def test_pooling(x):
    token, mean, whole = (built(TINY, depth=1, global_pool=pool) for pool in ("token", "avg", ""))
    tokens = token.forward_features(x)
    assert torch.equal(token(x), token.head(tokens[:, 0]))
    assert torch.equal(mean(x), token.head(tokens[:, 1:].mean(1)))
    assert torch.equal(whole(x), token.head(tokens))
    bare = built(TINY, depth=1, num_classes=0, global_pool="")
    assert bare(x).shape == tokens.shape


def test_head_dropout_acts_in_training_alone(x):
    model = built(TINY, depth=1, drop_rate=0.5)
    assert torch.equal(model(x), built(TINY, depth=1)(x))
    tokens = model.train().forward_features(x)
    dropped = model.forward_head(tokens, pre_logits=True) == 0
    assert 0.3 < dropped.float().mean() < 0.7


def test_stopping_early_runs_no_block_behind_the_last(x):
    model, ran = built(TINY), []
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    kept = model.forward_intermediates(x, [4, 1], intermediates_only=True)
    assert ran == list(range(12))
    ran.clear()
    last, early = model.forward_intermediates(x, [4, 1], stop_early=True, output_fmt="NLC")
    assert ran == list(range(5))
    assert torch.equal(early[1].transpose(1, 2).unflatten(2, (2, 2)), kept[1])
    assert torch.equal(last[:, 1:], model.norm(early[1]))


def test_pruning_leaves_what_the_chosen_blocks_need(x):
    model = built(TINY, drop_path_rate=0.1)
    expected = model.forward_intermediates(x, [2, 5], intermediates_only=True)
    assert model.prune_intermediate_layers([2, -7], prune_norm=True) == [2, 5]
    assert len(model.blocks) == 6
    assert model.num_classes == 0
    assert isinstance(model.norm, torch.nn.Identity)
    for one, other in zip(
        model.forward_intermediates(x, [2, 5], intermediates_only=True), expected, strict=True
    ):
        assert torch.equal(one, other)
    assert model.train()(x).shape == (2, 5, 192)


def test_pruned_layers_take_their_learned_frequencies_along(x):
    model = built(TINY, rope_kind="mixed")
    expected = model.forward_intermediates(x, [2], intermediates_only=True)
    model.prune_intermediate_layers([2])
    assert model.rope.freqs.shape[1] == len(model.blocks) == 3
    found = model.forward_intermediates(x, [2], intermediates_only=True)
    assert torch.equal(found[0], expected[0])


def test_parameters_are_made_where_and_as_asked():
    model = timm.create_model(TINY, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float64)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_converted_model_runs_in_its_own_dtype(dtype, x):
    model = built(TINY, depth=3, drop_path_rate=0.2)
    with torch.no_grad():
        expected = model(x)
        found = model.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    assert (found - expected).norm() < 0.05 * expected.norm()
    model.train()(x.to(dtype)).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ---- training by timm's scripts


def run_of(model, method, x, seed):
    torch.manual_seed(seed)
    return getattr(model, method)(x)


@pytest.mark.parametrize("method", ["forward", "forward_features", "forward_intermediates"])
def test_stochastic_depth_draws_from_the_global_generator_in_training_alone(method, x):
    model = built(TINY, depth=3, drop_path_rate=0.5)

    def tokens(seed):
        found = run_of(model, method, x, seed)
        return found[0] if isinstance(found, tuple) else found

    assert torch.equal(tokens(0), tokens(1))
    model.train()
    assert torch.equal(tokens(0), tokens(0))
    assert not torch.equal(tokens(0), tokens(1))


def test_a_given_keep_is_taken(x):
    model = built(TINY, depth=3, drop_path_rate=0.5).train()
    state = torch.get_rng_state()
    drop_path_mask = torch.zeros(3, 2, 2)
    embedded, _ = model.embed(x)
    assert torch.equal(model.forward_features(x, drop_path_mask), model.norm(embedded))
    assert torch.equal(model(x, drop_path_mask), model.head(model.norm(embedded)[:, 0]))
    assert torch.equal(torch.get_rng_state(), state)


def test_no_draw_without_stochastic_depth(x):
    model = built(TINY, depth=1).train()
    state = torch.get_rng_state()
    model(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_gradient_checkpointing_changes_no_gradient(x):
    gradients = []
    for enable in (False, True):
        model = built(TINY, depth=2, drop_path_rate=0.5).train()
        model.set_grad_checkpointing(enable)
        assert model.grad_checkpointing == enable
        run_of(model, "forward", x, seed=3).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_step_of_timm_training_with_layer_decay(x):
    model = built(TINY, drop_path_rate=0.1).train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(model(x), torch.tensor([0, 3]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert len({group["lr_scale"] for group in optimizer.param_groups}) == 14


def test_decay_spares_positions_class_token_and_vectors():
    model = built(TINY, depth=1)
    groups = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert names == {
        "patch_embed.proj.weight",
        "head.weight",
        *(f"blocks.0.{part}.weight" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    }


def test_layers_are_grouped_from_stem_to_head():
    model = built(TINY, depth=3)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert {layers[name] for name in ("cls_token", "pos_embed", "patch_embed.proj.weight")} == {0}
    assert [layers[f"blocks.{n}.attn.qkv.weight"] for n in range(3)] == [1, 2, 3]
    # The final norm goes with the last block or behind it, the head last of all.
    assert 3 <= layers["norm.scale"] <= layers["head.weight"]
    assert layers["head.weight"] == max(layers.values())
    assert layers.keys() == {name for name, _ in model.named_parameters()}


def test_a_fresh_head_follows_the_recipe():
    model = built(TINY, depth=1).double()
    model.reset_classifier(50)
    assert model.head.weight.dtype == torch.float64
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.head.bias.any()
    model.eval().reset_classifier(3)
    assert not any(module.training for module in model.modules())


# ---- what cannot work


def test_pretrained_weights_are_refused_with_a_way_out():
    with pytest.raises(CheckpointError, match=f"no pretrained weights for {TINY}") as caught:
        timm.create_model(TINY, pretrained=True)
    assert "pretrained_cfg_overlay=dict(hf_hub_id='OWNER/NAME')" in caught.value.hint


@pytest.mark.parametrize("word", ["rotat", "qkv_bias", "attn_drop_rate"])
def test_an_unknown_keyword_is_an_error(word):
    with pytest.raises(TypeError, match=rf"{word}: no keyword of this model.*rotate"):
        timm.create_model(TINY, **{word: 0.5})


def test_options_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="--rotate is -1"):
        timm.create_model(TINY, rotate=-1)
    with pytest.raises(ConfigError, match="not a multiple"):
        timm.create_model(TINY, img_size=30)
    with pytest.raises(ValueError, match="global_pool is 'map'"):
        timm.create_model(TINY, depth=1, global_pool="map")


def test_wrong_requests_for_features_are_refused(x):
    model = built(TINY, depth=1)
    with pytest.raises(ValueError, match="output_fmt is 'NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")
    with pytest.raises(ValueError, match="global_pool is 'max'"):
        model.reset_classifier(2, "max")
    with pytest.raises(ValueError, match=r"\(16, 16\), not \(32, 32\)"):
        model(x[..., :16, :16])


# ---- weights that were exported


@pytest.fixture
def shared(tmp_path):
    """A folder of a small DeiT, as `save_pretrained` and `export` write it."""
    rope = RopeConfig(rotate=4, scaling="extrapolate")
    model = DeiT(24, 2, 2, rope=rope, image_size=(16, 24), patch_size=8, num_classes=5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_weights_of_a_file_bring_their_options(shared):
    model, folder = shared
    overlay = {"file": str(folder / "model.safetensors")}
    loaded = timm.create_model(TINY, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = pictures(2, 3, 16, 24)
    assert torch.equal(loaded(x), model(x))
    assert loaded.rope.config == model.rope.config
    assert tuple(loaded.pretrained_cfg["input_size"]) == (3, 16, 24)


def test_options_that_contradict_the_weights_are_warned_of(shared):
    overlay = {"file": str(shared[1] / "model.safetensors")}
    with pytest.warns(UserWarning, match="rotate is 2, and was 4 in training"):
        timm.create_model(TINY, pretrained=True, rotate=2, pretrained_cfg_overlay=overlay)


def test_weights_of_another_size_are_refused(shared):
    overlay = {"file": str(shared[1] / "model.safetensors")}
    with pytest.raises(CheckpointError, match=f"these weights are of {TINY}, not of"):
        timm.create_model(
            "spiralrope_deit_base_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay
        )


def test_a_timm_model_is_saved_and_loaded_as_a_deit_is(shared, tmp_path):
    model, folder = shared
    loaded = timm_models.SpiralRopeDeiT.from_pretrained(folder).eval()
    loaded.save_pretrained(tmp_path / "again")
    x = pictures(2, 3, 16, 24)
    assert torch.equal(DeiT.from_pretrained(tmp_path / "again")(x), model(x))
    loaded.reset_classifier(5, "avg")
    with pytest.raises(CheckpointError, match="global_pool is 'avg'"):
        loaded.save_pretrained(tmp_path / "pooled")
