from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spiralrope_cli import GaussianDiffusion

GOLDEN = Path(__file__).parents[2] / "golden/diffusion"
CHAINS = ("250", "50", "ddim25", "10,15,20", "8")


def relative(ours, published):
    return ((ours - published).norm() / published.norm()).item()


def test_noised_latents_are_the_published_ones():
    golden = load_file(GOLDEN / "q_sample.safetensors")
    ours = GaussianDiffusion().q_sample(golden["x0"], golden["t"], golden["noise"])
    torch.testing.assert_close(ours, golden["x_t"], rtol=0, atol=1e-6)


def test_losses_are_the_published_ones(published_dit):
    golden = load_file(GOLDEN / "training_losses.safetensors")
    x0, t, noise = golden["x0"], golden["t"], golden["noise"]
    assert 0 in t  # The discretised likelihood is among them.
    losses = GaussianDiffusion().training_losses(published_dit, x0, t, noise, y=golden["y"])
    for name, loss in losses.items():
        torch.testing.assert_close(loss, golden[name], rtol=0, atol=2e-4)


def test_losses_and_their_gradient_follow_from_the_networks_output():
    golden = load_file(GOLDEN / "training_losses.safetensors")
    out = golden["model_output"].clone().requires_grad_()
    losses = GaussianDiffusion().training_losses(
        lambda x, t, y: out, golden["x0"], golden["t"], golden["noise"], y=golden["y"]
    )
    losses["loss"].mean().backward()
    assert relative(out.grad, golden["dmeanloss_doutput"]) <= 1e-3
    # The variational term sends nothing into the noise's channels.
    count = golden["x0"].numel()
    squared = 2 / count * (golden["model_output"][:, :4] - golden["noise"])
    torch.testing.assert_close(out.grad[:, :4], squared)


def test_losses_in_float64_are_the_published_ones(published_dit):
    golden = load_file(GOLDEN / "training_losses.safetensors")
    out = golden["model_output"].double()
    losses = GaussianDiffusion().training_losses(
        lambda x, t: out, golden["x0"].double(), golden["t"], golden["noise"].double()
    )
    for name, loss in losses.items():
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, golden[f"{name}_f64"], rtol=1e-4, atol=2e-5)


def test_the_bound_of_a_perfect_network_is_zero_but_for_the_first_step():
    diffusion = GaussianDiffusion()
    x0, noise = torch.randn(3, 2, 4, 4).clamp(-0.9, 0.9), torch.randn(3, 2, 4, 4)
    lowest = torch.cat((noise, -torch.ones_like(noise)), dim=1)
    losses = diffusion.training_losses(lambda x, t: lowest, x0, torch.tensor([0, 1, 999]), noise)
    torch.testing.assert_close(losses["vb"][1:], torch.zeros(2), rtol=0, atol=1e-6)
    # At the first step it pays for the grey level: a Gaussian of known width around it.
    sigma = math.exp(0.5 * diffusion.constants.posterior_log_variance_clipped[0])
    inside = math.erf(1 / 255 / sigma / math.sqrt(2))
    assert losses["vb"][0].item() == pytest.approx(-math.log2(inside), abs=2e-3)
    assert not losses["mse"].any()


@pytest.mark.parametrize(("value", "sign"), [(-1.0, 1), (1.0, -1)])
def test_the_outermost_grey_levels_have_no_far_side(value, sign):
    x0 = torch.full((1, 1, 2, 2), value)
    noise = torch.zeros_like(x0)
    # Far beyond the last level: inside a bin that is open, outside one that is not.
    beyond = torch.cat((torch.full_like(x0, sign * 20.0), noise), dim=1)
    within = torch.cat((torch.full_like(x0, -sign * 20.0), noise), dim=1)
    bound = {}
    for name, out in (("beyond", beyond), ("within", within)):
        losses = GaussianDiffusion().training_losses(
            lambda x, t, out=out: out, x0, torch.zeros(1, dtype=torch.long), noise
        )
        bound[name] = losses["vb"].item()
    assert bound["beyond"] == pytest.approx(0, abs=1e-3)
    assert bound["within"] == pytest.approx(-math.log2(1e-12), rel=1e-3)


def test_chains_hand_original_numbers_to_the_network():
    seen = []

    def network(x, t):
        seen.append(t.tolist())
        return torch.zeros(len(x), 2, 2, 2)

    diffusion = GaussianDiffusion("ddim25")
    diffusion.training_losses(network, torch.zeros(2, 1, 2, 2), torch.tensor([0, 24]))
    diffusion.sample(network, (1, 1, 2, 2))
    assert seen == [[0, 960], *([t] for t in range(960, -1, -40))]


def test_low_precision_outputs_give_float32_losses():
    losses = GaussianDiffusion().training_losses(
        lambda x, t: torch.zeros(2, 2, 2, 2, dtype=torch.bfloat16),
        torch.zeros(2, 1, 2, 2),
        torch.tensor([1, 2]),
    )
    assert all(loss.dtype == torch.float32 for loss in losses.values())


@pytest.mark.parametrize("clip", [False, True])
def test_one_step_back_is_the_published_one(published_dit, clip):
    golden = load_file(GOLDEN / "reverse_step.safetensors")
    diffusion, x, t = GaussianDiffusion("8"), golden["x"], golden["t"]
    with torch.no_grad():
        out = published_dit(x, diffusion.original_steps(t), golden["y"])
    step = diffusion.p_mean_variance(out, x, t, clip_denoised=clip)
    kind = "clipped" if clip else "unclipped"
    for ours, name in (
        (step.mean, "mean"),
        (step.log_variance.exp(), "variance"),
        (step.log_variance, "log_variance"),
        (step.pred_x0, "pred_xstart"),
    ):
        assert relative(ours, golden[f"{name}_{kind}"]) <= 2e-4, name


def test_constants_are_the_published_ones():
    golden = load_file(GOLDEN / "constants_1000_linear.safetensors")
    schedule = GaussianDiffusion("1000")
    ours = {"betas": schedule.betas, **schedule.constants._asdict()}
    ours["log_betas"], golden["log_betas"] = ours["log_betas"], golden["betas"].log()
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(tensor, golden[name], rtol=1e-10, atol=1e-14, msg=name)


@pytest.mark.parametrize("steps", CHAINS)
def test_shorter_chains_are_the_published_ones(steps):
    golden = load_file(GOLDEN / "respacing.safetensors")
    name, diffusion = steps.replace(",", "_"), GaussianDiffusion(steps)
    assert torch.equal(diffusion.timesteps, golden[f"timesteps_{name}"])
    torch.testing.assert_close(diffusion.betas, golden[f"betas_{name}"], rtol=0, atol=1e-12)
    assert diffusion.num_steps == len(diffusion.timesteps)


def test_a_number_is_as_good_as_its_digits():
    assert torch.equal(GaussianDiffusion(50).betas, GaussianDiffusion("50").betas)


def test_constants_of_a_batch_are_shaped_and_cast_for_it():
    schedule = GaussianDiffusion("10")
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        at = schedule.extract(torch.tensor([9, 0]), torch.empty(2, 3, 4, 4, dtype=dtype))
        assert at.log_betas.shape == (2, 1, 1, 1)
        assert at.log_betas.dtype == expected
        torch.testing.assert_close(
            at.log_betas.flatten(), schedule.betas.log()[[9, 0]].to(expected)
        )
    assert schedule.extract(3, torch.empty(2, 5)).log_betas.shape == (1, 1)


def test_tables_are_made_once_and_serve_training_after_inference():
    schedule, like = GaussianDiffusion("10"), torch.empty(1, 1)
    with torch.inference_mode():
        first = schedule.extract(0, like)
    table = schedule.extract(0, like).log_betas
    assert table.data_ptr() == first.log_betas.data_ptr()
    weight = torch.ones(1, requires_grad=True)
    (weight * table).sum().backward()


def test_the_network_is_given_original_numbers():
    schedule = GaussianDiffusion("ddim25")
    assert schedule.original_steps(torch.tensor([0, 1, 24])).tolist() == [0, 40, 960]
