from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spiralrope_cli import GaussianDiffusion
from spiralrope_cli.core.config.samples import GuidanceConfig
from spiralrope_cli.core.diffusion.samplers import SAMPLERS, guided
from spiralrope_cli.core.errors import ConfigError

GOLDEN = Path(__file__).parents[2] / "golden/diffusion"
WAYS = [
    ("p", "ddpm", 0.0, False),
    ("p_clip", "ddpm", 0.0, True),
    ("ddim0", "ddim", 0.0, False),
    ("ddim0_clip", "ddim", 0.0, True),
    ("ddim0.5", "ddim", 0.5, False),
]


def relative(ours, published):
    return ((ours - published).norm() / published.norm()).item()


def perfect(x0):
    """A network that knows the picture: its noise always points there."""
    whole = GaussianDiffusion().alphas_cumprod

    def predict(x, timestep):
        left = whole[timestep].item()
        noise = (x - left**0.5 * x0) / (1 - left) ** 0.5
        return torch.cat((noise, torch.zeros_like(noise)), dim=1)

    return predict


@pytest.mark.parametrize(("name", "sampler", "eta", "clip"), WAYS)
@pytest.mark.parametrize("loops", ["loops_plain", "loops_cfg"])
def test_trajectories_are_the_published_ones(published_dit, loops, name, sampler, eta, clip):
    golden = load_file(GOLDEN / f"{loops}.safetensors")
    network = published_dit
    if loops == "loops_cfg":
        network = partial(published_dit.forward_with_cfg, cfg_scale=4.0)
    start = golden["x_T"]
    final = GaussianDiffusion("8").sample(
        network,
        start.shape,
        sampler,
        eta,
        clip,
        noise=start,
        step_noise=golden["noise"],
        y=golden["y"],
    )
    assert relative(final, golden[f"{name}.final"]) <= 2e-4
    assert relative(final.double(), golden[f"{name}.final_f64"]) <= 2e-4


@pytest.mark.parametrize(("name", "sampler", "eta"), [("p", "ddpm", 0.0), ("ddim0.5", "ddim", 0.5)])
def test_every_step_is_the_published_one(published_dit, name, sampler, eta):
    golden = load_file(GOLDEN / "loops_plain.safetensors")

    @torch.no_grad()
    def predict(x, timestep):
        return published_dit(x, torch.full_like(golden["y"], timestep), golden["y"])

    walk = SAMPLERS[sampler](
        GaussianDiffusion("8"), predict, golden["x_T"], iter(golden["noise"]).__next__, eta
    )
    published_steps = (*golden[f"{name}.steps"], golden[f"{name}.final"])
    for ours, published in zip(walk, published_steps, strict=True):
        assert relative(ours, published) <= 2e-4


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("clip", [False, True])
def test_a_perfect_network_leads_to_the_picture(sampler, clip):
    draw = torch.Generator().manual_seed(0)
    x0 = torch.rand(2, 3, 4, 4, generator=draw) * 1.8 - 0.9
    start = torch.randn(2, 3, 4, 4, generator=draw)
    walk = SAMPLERS[sampler](
        GaussianDiffusion("20"),
        perfect(x0),
        start,
        lambda: torch.randn(2, 3, 4, 4, generator=draw),
        0.0,
        clip,
    )
    steps = list(walk)
    assert len(steps) == 20
    torch.testing.assert_close(steps[-1], x0, rtol=0, atol=2e-3)


def test_clipping_bounds_what_dpm_solver_leads_to():
    x0 = torch.full((1, 1, 2, 2), 3.0)
    walks = {
        clip: list(
            SAMPLERS["dpm++"](
                GaussianDiffusion("10"), perfect(x0), torch.randn(1, 1, 2, 2), None, 0.0, clip
            )
        )
        for clip in (False, True)
    }
    torch.testing.assert_close(walks[False][-1], x0, rtol=0, atol=1e-2)
    torch.testing.assert_close(walks[True][-1], torch.ones_like(x0), rtol=0, atol=1e-2)


def test_dpm_solver_takes_fewer_steps_to_the_same_picture_as_ddim(published_dit):
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sample = partial(
        GaussianDiffusion.sample, shape=start.shape, noise=start, y=torch.tensor([1, 2])
    )

    def calm(x, t, y):
        out = published_dit(x, t, y)
        return torch.cat((out[:, :4].tanh(), out[:, 4:]), dim=1)

    fine = sample(GaussianDiffusion("100"), calm, sampler="ddim")
    few = {name: sample(GaussianDiffusion("12"), calm, sampler=name) for name in ("ddim", "dpm++")}
    assert relative(few["dpm++"], fine) < relative(few["ddim"], fine)


def test_noise_is_drawn_only_where_it_is_used():
    x0, start = torch.zeros(1, 1, 2, 2), torch.randn(1, 1, 2, 2)
    drawn = {}
    for name, eta in (("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0), ("dpm++", 0.0)):
        calls = []

        def draw(calls=calls):
            calls.append(1)
            return torch.zeros_like(start)

        list(SAMPLERS[name](GaussianDiffusion("5"), perfect(x0), start, draw, eta))
        drawn[name, eta] = len(calls)
    assert drawn == {("ddpm", 0.0): 4, ("ddim", 0.0): 0, ("ddim", 1.0): 4, ("dpm++", 0.0): 0}


def test_without_handed_in_noise_it_is_torchs_own(published_dit):
    diffusion, y = GaussianDiffusion("4"), torch.tensor([1, 2])
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(diffusion.sample(published_dit, (2, 4, 8, 8), y=y))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not results[0].requires_grad


def test_what_a_sampler_cannot_do_is_refused():
    with pytest.raises(ConfigError, match="--sampler is euler"):
        GaussianDiffusion("4").sample(perfect(0), (1, 1, 2, 2), sampler="euler")
    with pytest.raises(ConfigError, match=r"--num-sampling-steps 1000: dpm\+\+ takes at most 999"):
        GaussianDiffusion().sample(perfect(0), (1, 1, 2, 2), sampler="dpm++")


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
    final = last(SAMPLERS[sampler](GaussianDiffusion("8"), predict, start, draw, eta))
    published = golden[f"{name}.final"][:2]
    assert (final - published).norm() <= 2e-4 * published.norm()


@torch.no_grad()
def test_the_null_class_is_computed_in_guided_steps_alone(published_dit, passes):
    x, labels = torch.zeros(3, 4, 8, 8), torch.tensor([1, 2, 3])
    predict = guided(published_dit, labels, GuidanceConfig(cfg_scale=2.0, cfg_interval=(100, 500)))
    for timestep in (999, 500, 499, 100, 99, 0):
        assert predict(x, timestep).shape == (3, 8, 8, 8)
    assert passes == [(999, 3), (500, 3), (499, 6), (100, 6), (99, 3), (0, 3)]
    for timestep in (0, 999):  # the whole interval is the default
        guided(published_dit, labels, GuidanceConfig(cfg_scale=1.5))(x, timestep)
        assert passes[-1] == (timestep, 6)
    for timestep in (0, 500, 999):
        guided(published_dit, labels, GuidanceConfig())(x, timestep)
        assert passes[-1] == (timestep, 3)


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
