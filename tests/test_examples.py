from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from spiralrope_cli.core.runtime.progress import read_metrics

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


def test_resolution_extrapolation_measures_what_eval_measures(trained_once, capsys, monkeypatch):
    example = load_example("resolution_extrapolation")
    monkeypatch.setattr(example, "SIDES", (8, 12))
    example.main(str(trained_once))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["pixels", "8", "12"]
    own_size = lines[1].split()
    last = [line for line in read_metrics(trained_once) if "ema_acc1" in line][-1]
    assert float(own_size[1]) == float(own_size[3]) == pytest.approx(last["ema_acc1"], abs=0.01)


def test_sample_digits_draws_a_column_per_class(drawn_once, tmp_path, capsys):
    target = tmp_path / "digits.png"
    load_example("sample_digits").main(str(drawn_once), str(target), "2")
    assert capsys.readouterr().out == f"{target}\n"
    with Image.open(target) as picture:
        assert picture.size == (10 * 66 + 2, 4 * 66 + 2)
        assert len(picture.getcolors(1 << 20)) > 2
