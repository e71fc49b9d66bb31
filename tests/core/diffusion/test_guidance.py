from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spiralrope_cli import GaussianDiffusion
from spiralrope_cli.core.config.diffusion import GuidanceConfig
from spiralrope_cli.core.diffusion.guidance import guided
from spiralrope_cli.core.diffusion.samplers import BY_NAME

GOLDEN = Path(__file__).parents[2] / "golden/diffusion"


@pytest.fixture
def passes(published_dit):
    """Samples in each pass of the network, by original step number."""
    seen = []
    hook = published_dit.register_forward_pre_hook(
        lambda _, args: seen.append((args[1][0].item(), len(args[0])))
    )
    yield seen
    hook.remove()


def last(walk):
    return list(walk)[-1]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "sampler", "eta"),
    [("p", "ddpm", 0.0), ("ddim0", "ddim", 0.0), ("ddim0.5", "ddim", 0.5)],
)
def test_guided_trajectories_are_the_published_ones(published_dit, name, sampler, eta):
    golden = load_file(GOLDEN / "loops_cfg.safetensors")
    # Only the first half of the published batch is a sample; the other carries the null class.
    start, labels, noise = golden["x_T"][:2], golden["y"][:2], golden["noise"][:, :2]
    predict = guided(published_dit, labels, GuidanceConfig(cfg_scale=4.0))
    draw = iter(noise).__next__
    final = last(BY_NAME[sampler](GaussianDiffusion("8"), predict, start, draw, eta))
    published = golden[f"{name}.final"][:2]
    assert (final - published).norm() <= 2e-4 * published.norm()


@torch.no_grad()
def test_the_null_class_is_computed_in_guided_steps_alone(published_dit, passes):
    x, labels = torch.zeros(3, 4, 8, 8), torch.tensor([1, 2, 3])
    predict = guided(published_dit, labels, GuidanceConfig(cfg_scale=2.0, cfg_interval=(100, 500)))
    for timestep in (999, 500, 499, 100, 99, 0):
        assert predict(x, timestep).shape == (3, 8, 8, 8)
    assert passes == [(999, 3), (500, 3), (499, 6), (100, 6), (99, 3), (0, 3)]
    guided(published_dit, labels, GuidanceConfig())(x, 300)
    assert passes[-1] == (300, 3)


@torch.no_grad()
def test_outside_the_interval_nothing_is_guided(published_dit):
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    plain = published_dit(x, torch.full((2,), 700), labels)
    predict = guided(published_dit, labels, GuidanceConfig(cfg_scale=4.0, cfg_interval=(0, 700)))
    torch.testing.assert_close(predict(x, 700), plain)
    assert (predict(x, 699) - plain).abs().max() > 0.1


@torch.no_grad()
def test_guided_channels_are_those_asked_for(published_dit):
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    plain = published_dit(x, torch.full((2,), 5), labels)
    three, every = (
        guided(published_dit, labels, GuidanceConfig(cfg_scale=4.0, cfg_channels=channels))(x, 5)
        for channels in ("3", "all")
    )
    torch.testing.assert_close(three[:, 3:], plain[:, 3:])
    torch.testing.assert_close(every[:, 4:], plain[:, 4:])
    assert torch.equal(three[:, :3], every[:, :3])
    assert (every[:, 3] - plain[:, 3]).abs().max() > 0.1
