from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spiralrope_cli.core.models.factory import meta_inputs, model_cost, model_of
from spiralrope_cli.core.resolve import resolve


@pytest.mark.parametrize(
    ("command", "arch", "more"),
    [
        ("pretrain", "deit-32x2x2", {"image_size": (24, 32), "patch_size": 4}),
        ("pretrain", "deit-32x2x2", {"rope_kind": "mixed"}),
        ("dit-train", "dit-32x2x2-2", {"image_size": (16, 32)}),
    ],
)
def test_the_cost_of_a_model_is_what_torch_counts(command, arch, more):
    run = resolve(command, {"arch": arch, "data": "digits", **more}).run
    network = model_of(run)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.to("meta")(*meta_inputs(run, 1, torch.float32))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert model_cost(run) == (parameters, counter.get_total_flops())
