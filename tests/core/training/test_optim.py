from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spiralrope_cli import RopeConfig, create_model
from spiralrope_cli.core.config.nested import build
from spiralrope_cli.core.config.recipes import PRETRAIN
from spiralrope_cli.core.config.training import OptimConfig
from spiralrope_cli.core.models.deit import DeiT
from spiralrope_cli.core.training.optim import build_optimizer, parameter_groups

MANIFEST = json.loads((Path(__file__).parents[2] / "golden" / "manifest.json").read_text())


def tiny_deit():
    return DeiT(64, 2, 2, rope=RopeConfig(), image_size=64, patch_size=16, num_classes=10)


def decay_by_name(model, groups):
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    return {name: decay.get(id(parameter)) for name, parameter in model.named_parameters()}


def test_what_decays_is_what_decayed_in_the_published_runs():
    model = tiny_deit()
    assert decay_by_name(model, parameter_groups(model, 0.3)) == MANIFEST["weight_decay_of"]


def test_every_parameter_stands_in_one_group():
    with torch.device("meta"):
        model = create_model("deit-ti")
    groups = parameter_groups(model, 0.1)
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(map(id, model.parameters()))


def test_frozen_parameters_are_left_out():
    model = tiny_deit()
    model.blocks[0].requires_grad_(False)
    decay = decay_by_name(model, parameter_groups(model, 0.3))
    assert {name for name, value in decay.items() if value is None} == {
        name for name in decay if name.startswith("blocks.0.")
    }


def test_the_optimizer_has_the_runs_numbers():
    model = tiny_deit()
    optim = build(OptimConfig, {**PRETRAIN, "batch_size": 1024, "lr": 1e-3})
    optimizer = build_optimizer(model, optim)
    assert decay_by_name(model, optimizer.param_groups) == MANIFEST["weight_decay_of"]
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(2e-3)
        assert group["betas"] == (0.9, 0.95)


def test_decay_shrinks_matrices_and_nothing_else():
    model = tiny_deit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = build_optimizer(model, build(OptimConfig, {**PRETRAIN, "weight_decay": 0.5}))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, tensor in model.state_dict().items():
        factor = 0.95 if MANIFEST["weight_decay_of"][name] else 1.0
        torch.testing.assert_close(tensor, before[name] * factor, msg=name)
