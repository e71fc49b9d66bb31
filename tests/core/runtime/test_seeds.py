from __future__ import annotations

import torch

from spiralrope_cli.core.runtime.seeds import NoisePerImage

CPU = torch.device("cpu")


def trajectories(seed, indices, draws=3):
    noise = NoisePerImage(seed, indices, (4, 3, 5), CPU)
    return torch.stack([noise.draw() for _ in range(draws)], dim=1)


def test_an_images_noise_is_the_same_in_any_batch():
    whole = trajectories(7, range(6))
    assert whole.shape == (6, 3, 4, 3, 5)
    for indices in ([0, 1, 2], [3], [5, 4], [1, 3, 5]):
        assert torch.equal(trajectories(7, indices), whole[indices])


def test_images_steps_and_seeds_differ():
    flat = torch.cat((trajectories(7, range(4)), trajectories(8, range(4)))).flatten(0, 1)
    assert len({tuple(noise.flatten().tolist()) for noise in flat}) == 2 * 4 * 3


def test_noise_is_standard_normal():
    noise = trajectories(0, range(200), draws=5).double()
    assert abs(noise.mean().item()) < 0.02
    assert abs(noise.std().item() - 1) < 0.02
