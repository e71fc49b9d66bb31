from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from spiralrope_cli.core.config.nested import build
from spiralrope_cli.core.config.recipes import PRETRAIN
from spiralrope_cli.core.config.training import OptimConfig
from spiralrope_cli.core.training.step import TrainState

GOLDEN = Path(__file__).parents[2] / "golden"
DECAYS = json.loads((GOLDEN / "manifest.json").read_text())["ema_decays"]


class OneParameter(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.w = nn.Parameter(values.clone())


def state_of(values, decay):
    return TrainState.create(
        OneParameter(values), build(OptimConfig, {**PRETRAIN, "ema_decay": decay})
    )


@pytest.mark.parametrize("decay", DECAYS)
def test_the_running_average_is_the_published_one(decay):
    tensors = load_file(GOLDEN / "optim" / "ema.safetensors")
    history = tensors["w"]
    state = state_of(history[0], decay)
    averages = [state.ema.module.w.clone()]
    for values in history[1:]:
        state.model.w.data.copy_(values)
        state.ema.update(state.model)
        averages.append(state.ema.module.w.clone())
    published = tensors[f"deit_w_{decay}"]
    torch.testing.assert_close(torch.stack(averages), published, rtol=0, atol=2e-6)


def test_the_average_starts_as_a_copy_that_wants_no_gradient():
    state = state_of(torch.tensor([1.0, 2.0]), 0.9)
    assert state.step == 0
    assert state.ema.module.w is not state.model.w
    assert torch.equal(state.ema.module.w, state.model.w)
    assert not state.ema.module.w.requires_grad
    assert state.model.w.requires_grad
    state.model.w.data.zero_()
    assert state.ema.module.w.tolist() == [1.0, 2.0]
