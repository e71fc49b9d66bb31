"""From noise to latents: the samplers, and classifier-free guidance of the network they ask.

All samplers have one signature, and yield the latents of each step.

Args of each:
    diffusion: the process, whose chain they walk down.
    predict: `predict(x, timestep)` -> [B, 2L, H, W], with the original number of the step.
    start: standard normal [B, L, H, W].
    step_noise: `step_noise()` -> noise of the next step, as start; not called where a sampler
        needs none.
    eta: noise of `ddim`; the others have none to set.
    clip_denoised: clamps the predicted x_0 to [-1, 1] in every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spiralrope_cli.core.config.samples import (
    BETA_FIRST,
    BETA_LAST,
    NUM_TRAIN_STEPS,
    GuidanceConfig,
)
from spiralrope_cli.core.errors import ConfigError

if TYPE_CHECKING:
    from spiralrope_cli.core.diffusion.gaussian import GaussianDiffusion


Predict = Callable[[Tensor, int], Tensor]
StepNoise = Callable[[], Tensor]


def guided(network: Any, labels: Tensor, guidance: GuidanceConfig) -> Predict:
    """The network as samplers call it, with labels and guidance.

    Without guidance, and outside its interval (arXiv 2404.07724), a step computes B samples in
    place of 2B.

    Args:
        network: a DiT, or what has its `num_classes` and `forward_with_cfg`.
        labels: [B] classes, on the network's device.
        guidance: scale, channels and interval.

    Returns:
        `predict(x, timestep)` -> [B, 2L, H, W].
    """
    both = torch.cat((labels, torch.full_like(labels, network.num_classes)))
    low, high = guidance.cfg_interval
    channels = None if guidance.cfg_channels == "all" else int(guidance.cfg_channels)

    def predict(x: Tensor, timestep: int) -> Tensor:
        if guidance.cfg_scale == 1 or not low <= timestep < high:
            return network(x, torch.full_like(labels, timestep), labels)
        t = torch.full_like(both, timestep)
        out = network.forward_with_cfg(torch.cat((x, x)), t, both, guidance.cfg_scale, channels)
        return out[: len(x)]

    return predict


def ddpm(
    diffusion: GaussianDiffusion,
    predict: Predict,
    start: Tensor,
    step_noise: StepNoise,
    eta: float = 0.0,
    clip_denoised: bool = False,
) -> Iterator[Tensor]:
    """Ancestral sampling with the learned variance (arXiv 2006.11239, algorithm 2)."""
    x = start
    for index, timestep in _reversed_steps(diffusion):
        step = diffusion.p_mean_variance(predict(x, timestep), x, index, clip_denoised)
        x = step.mean
        if index:  # The last step adds no noise.
            x = torch.addcmul(x, (0.5 * step.log_variance).exp(), step_noise())
        yield x


def ddim(
    diffusion: GaussianDiffusion,
    predict: Predict,
    start: Tensor,
    step_noise: StepNoise,
    eta: float = 0.0,
    clip_denoised: bool = False,
) -> Iterator[Tensor]:
    """Deterministic at eta 0, with the noise of DDPM at 1 (arXiv 2010.02502, eq. 12 and 16)."""
    x = start
    constants = diffusion.constants
    for index, timestep in _reversed_steps(diffusion):
        step = diffusion.p_mean_variance(predict(x, timestep), x, index, clip_denoised)
        alpha_bar = constants.alphas_cumprod[index].item()
        alpha_bar_prev = constants.alphas_cumprod_prev[index].item()
        sigma = eta * math.sqrt(
            (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
        )
        x = math.sqrt(alpha_bar_prev) * step.pred_x0
        x = x.add(step.noise, alpha=math.sqrt(max(1 - alpha_bar_prev - sigma**2, 0)))
        if sigma:
            x = x.add(step_noise(), alpha=sigma)
        yield x


def dpm_solver(
    diffusion: GaussianDiffusion,
    predict: Predict,
    start: Tensor,
    step_noise: StepNoise,
    eta: float = 0.0,
    clip_denoised: bool = False,
) -> Iterator[Tensor]:
    """DPM-Solver++ (2M), deterministic (arXiv 2211.01095, algorithm 2), by diffusers' scheduler.

    It takes as many steps as the chain has, but spaces them itself.
    """
    # Imported here, since it takes seconds.
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    if diffusion.num_steps >= NUM_TRAIN_STEPS:
        raise ConfigError(
            f"--num-sampling-steps {diffusion.num_steps}: dpm++ takes at most "
            f"{NUM_TRAIN_STEPS - 1}",
            "10 to 50 are its usual range",
        )
    # With sample_max_value 1 dynamic thresholding is a clamp to [-1, 1], our clip_denoised.
    scheduler = DPMSolverMultistepScheduler(
        NUM_TRAIN_STEPS, BETA_FIRST, BETA_LAST, thresholding=clip_denoised, sample_max_value=1.0
    )
    scheduler.set_timesteps(diffusion.num_steps)
    scheduler.set_begin_index(0)
    x = start
    for timestep in scheduler.timesteps.tolist():
        noise, _ = predict(x, timestep).to(x.dtype).chunk(2, dim=1)
        x = scheduler.step(noise, timestep, x).prev_sample
        yield x


def _reversed_steps(diffusion: GaussianDiffusion) -> Iterator[tuple[int, int]]:
    """(index in the chain, original step number), the noisiest first."""
    yield from reversed(list(enumerate(diffusion.timesteps.tolist())))


BY_NAME = {"ddpm": ddpm, "ddim": ddim, "dpm++": dpm_solver}
