from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spiralrope_cli import GaussianDiffusion
from spiralrope_cli.core.diffusion.schedule import Schedule

GOLDEN = Path(__file__).parents[2] / "golden/diffusion"
CHAINS = ("250", "50", "ddim25", "10,15,20", "8")


def test_constants_are_the_published_ones():
    golden = load_file(GOLDEN / "constants_1000_linear.safetensors")
    schedule = Schedule("1000")
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
    schedule = Schedule("10")
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        at = schedule.at(torch.tensor([9, 0]), torch.empty(2, 3, 4, 4, dtype=dtype))
        assert at.log_betas.shape == (2, 1, 1, 1)
        assert at.log_betas.dtype == expected
        torch.testing.assert_close(
            at.log_betas.flatten(), schedule.betas.log()[[9, 0]].to(expected)
        )
    assert schedule.at(3, torch.empty(2, 5)).log_betas.shape == (1, 1)


def test_tables_are_made_once_and_serve_training_after_inference():
    schedule, like = Schedule("10"), torch.empty(1, 1)
    with torch.inference_mode():
        first = schedule.at(0, like)
    table = schedule.at(0, like).log_betas
    assert table.data_ptr() == first.log_betas.data_ptr()
    weight = torch.ones(1, requires_grad=True)
    (weight * table).sum().backward()


def test_the_network_is_given_original_numbers():
    schedule = Schedule("ddim25")
    assert schedule.original(torch.tensor([0, 1, 24])).tolist() == [0, 40, 960]
