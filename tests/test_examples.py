from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_spiral_rope_in_timm_prints_the_shape_of_the_logits():
    done = subprocess.run(
        [sys.executable, EXAMPLES / "spiral_rope_in_timm.py"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(2, 1000)\n"


@pytest.fixture
def turned_and_plain():
    torch.manual_seed(0)
    options = {"depth": 2, "num_classes": 10}
    turned, plain = (timm.create_model("vit_small_patch16_224", **options).eval() for _ in range(2))
    plain.load_state_dict(turned.state_dict())
    load_example("spiral_rope_in_timm").add_spiral_rope(turned)
    # The same weights load after the change, because the rotation has none of its own.
    turned.load_state_dict(plain.state_dict())
    return turned, plain


def test_spiral_rope_in_timm_acts(turned_and_plain):
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        turned, plain = (model(x) for model in turned_and_plain)
    assert turned.isfinite().all()
    assert (turned - plain).abs().max() > 1e-4


@pytest.mark.parametrize("fused", [True, False])
def test_spiral_rope_in_timm_trains_with_and_without_a_fused_kernel(turned_and_plain, fused):
    model = turned_and_plain[0].train()
    for block in model.blocks:
        block.attn.fused_attn = fused
    model(torch.randn(1, 3, 224, 224)).square().mean().backward()
    for block in model.blocks:
        assert block.attn.qkv.weight.grad.isfinite().all()
        assert block.attn.qkv.weight.grad.any()
