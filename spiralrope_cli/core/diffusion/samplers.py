"""Samplers (DDPM, DDIM, DPM-Solver++) and classifier-free guidance.

All samplers have the same arguments, and yield the latents after each step:

    diffusion: the process, with its chain of steps.
    predict: `predict(x, timestep)` -> [B, 2L, H, W]; timestep is the original one, 0 to 999.
    start: standard normal [B, L, H, W].
    step_noise: `step_noise()` -> noise of the next step, [B, L, H, W]; called only if needed.
    eta: noise of `ddim`; the others ignore it.
    clip_denoised: clamp the predicted x_0 to [-1, 1] in every step.
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
    """`predict` of a network with labels and classifier-free guidance.

    Guidance computes 2B samples per step. Without it, and outside its interval (arXiv 2404.07724),
    a step computes only B.

    Args:
        network: a `DiT`, or a module with its `num_classes` and `forward_with_cfg`.
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
    """DDIM (arXiv 2010.02502, eq. 12 and 16): deterministic at eta 0, DDPM's noise at eta 1."""
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
    """DPM-Solver++ (2M) (arXiv 2211.01095, algorithm 2) by diffusers' scheduler; deterministic.

    The number of steps is that of the chain; the scheduler chooses the timesteps.
    """
    # Imported here because it takes seconds.
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    if diffusion.num_steps >= NUM_TRAIN_STEPS:
        raise ConfigError(
            f"--num-sampling-steps {diffusion.num_steps}: dpm++ takes at most "
            f"{NUM_TRAIN_STEPS - 1}",
            "10 to 50 are its usual range",
        )
    # Dynamic thresholding with sample_max_value 1 is a clamp to [-1, 1], as clip_denoised.
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
    """(step of the chain, original timestep), from the last to the first."""
    yield from reversed(list(enumerate(diffusion.timesteps.tolist())))


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm++": dpm_solver}
