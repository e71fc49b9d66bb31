"""Gaussian diffusion with a learned variance: schedule, loss, and p(x_{t-1} | x_t).

Legend: B batch, L latent channels, S steps of the chain, e noise. The output of the network has 2L
channels: e, and v of eq. 15.

Source: "Improved Denoising Diffusion Probabilistic Models", arXiv 2102.09672. Equation numbers
refer to it. "Original" timesteps are those of the 1000 steps of training.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spiralrope_cli.core.config.option import one_of
from spiralrope_cli.core.config.samples import (
    BETA_FIRST,
    BETA_LAST,
    NUM_TRAIN_STEPS,
    SAMPLERS,
    space_timesteps,
)
from spiralrope_cli.core.diffusion import samplers
from spiralrope_cli.core.errors import ConfigError

HALF_BIN = 1 / 255
OPEN_BEYOND = 0.999
"""Beyond this the bin is black (-1) or white (1): it includes the whole tail of the Gaussian."""
LEAST_PROBABILITY = 1e-12


class Constants(NamedTuple):
    """Coefficients of every step, with the names of the published code (ADM's)."""

    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    posterior_log_variance_clipped: Tensor
    log_betas: Tensor


class PMeanVariance(NamedTuple):
    """Predicted p(x_{t-1} | x_t), with predicted x_0 and noise: [B, L, H, W] each."""

    mean: Tensor
    log_variance: Tensor
    pred_x0: Tensor
    noise: Tensor


class GaussianDiffusion:
    """The diffusion process of the published DiTs: linear betas from 1e-4 to 0.02 over 1000 steps.

    Args:
        steps: "1000": the whole chain, as in training; "250" or 250: that number of steps, evenly
            spaced; "ddim25": every 40th step.

    Attributes:
        num_steps: S.
        timesteps: [S] int64, original timesteps, ascending.
        betas: [S] float64.
        alphas_cumprod: [S] float64, alpha_bar.
        constants: [S] float64 each.

    Raises:
        ConfigError: `steps` is not possible.
    """

    def __init__(self, steps: str | int = "1000") -> None:
        self.timesteps = torch.tensor(space_timesteps(steps))
        all_betas = torch.linspace(BETA_FIRST, BETA_LAST, NUM_TRAIN_STEPS, dtype=torch.float64)
        alpha_bar = (1 - all_betas).cumprod(0)[self.timesteps]
        alpha_bar_prev = torch.cat((alpha_bar.new_ones(1), alpha_bar[:-1]))
        # Eq. 19: the betas of a shorter chain that keeps alpha_bar at its steps.
        self.betas = betas = 1 - alpha_bar / alpha_bar_prev
        posterior_variance = betas * (1 - alpha_bar_prev) / (1 - alpha_bar)
        self.constants = Constants(
            alphas_cumprod=alpha_bar,
            alphas_cumprod_prev=alpha_bar_prev,
            sqrt_alphas_cumprod=alpha_bar.sqrt(),
            sqrt_one_minus_alphas_cumprod=(1 - alpha_bar).sqrt(),
            sqrt_recip_alphas_cumprod=alpha_bar.rsqrt(),
            sqrt_recipm1_alphas_cumprod=(1 / alpha_bar - 1).sqrt(),
            posterior_mean_coef1=betas * alpha_bar_prev.sqrt() / (1 - alpha_bar),
            posterior_mean_coef2=(1 - alpha_bar_prev) * (1 - betas).sqrt() / (1 - alpha_bar),
            # The first variance is 0, so its logarithm is replaced by that of the second.
            posterior_log_variance_clipped=posterior_variance[1:].log()[
                [0, *range(len(alpha_bar) - 1)]
            ],
            log_betas=betas.log(),
        )
        self.num_steps = len(self.timesteps)
        self.alphas_cumprod = alpha_bar
        self._tables = {"constants": torch.stack(self.constants), "timesteps": self.timesteps}
        self._kept: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def extract(self, index: int | Tensor, like: Tensor) -> Constants:
        """Coefficients of one step of the chain, or of one step per sample.

        Args:
            index: step of the chain, 0 to S - 1: a number, or [B].
            like: [B, ...]; gives the device, the number of dimensions, and the dtype (at least
                float32).

        Returns:
            [1 or B, 1, ...] each.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        table = self._table("constants", like.device, dtype)[:, index]
        return Constants(*table.reshape(len(table), -1, *(1,) * (like.ndim - 1)))

    def original_steps(self, index: Tensor) -> Tensor:
        """[B] steps of the chain -> [B] original timesteps, the input of the network."""
        return self._table("timesteps", index.device, self.timesteps.dtype)[index]

    def _table(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A table on the device, kept there, so that no step waits for a copy."""
        if (key := (name, device, dtype)) in self._kept:
            return self._kept[key]
        with torch.inference_mode(False):  # a later backward pass could not use such a tensor
            table = self._tables[name].to(dtype).to(device)
        if not torch.compiler.is_compiling():  # a graph that keeps something is compiled once more
            self._kept[key] = table
        return table

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Adds noise (eq. 9): x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) e.

        Args:
            x0: [B, ...].
            t: [B] steps of the chain, 0 to S - 1.
            noise: standard normal, shape of x0.

        Returns:
            [B, ...].
        """
        coef = self.extract(t, x0)
        return coef.sqrt_alphas_cumprod * x0 + coef.sqrt_one_minus_alphas_cumprod * noise

    def training_losses(
        self,
        model: Callable[..., Tensor],
        x0: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        **model_kwargs: Any,
    ) -> dict[str, Tensor]:
        """Loss of each sample (eq. 16): mean squared error of the noise, plus variational bound.

        The paper weights the sum of the 1000 terms of the bound by 0.001. One random term per
        sample, with weight 1, has the same expectation. The bound trains the variance only: the
        predicted noise in it is detached.

        Args:
            model: called as `model(x_t, original timesteps [B], **model_kwargs)`.
            x0: latents [B, L, H, W].
            t: [B] steps of the chain.
            noise: shape of x0; by default from torch's global generator.
            model_kwargs: such as `y`.

        Returns:
            `loss`, `mse` and `vb` (bits per dimension), [B] each.
        """
        noise = torch.randn_like(x0) if noise is None else noise
        out = model(self.q_sample(x0, t, noise), self.original_steps(t), **model_kwargs)
        predicted, v = out.to(x0.dtype).chunk(2, dim=1)
        error = predicted - noise
        mse = error.square().flatten(1).mean(1)
        vb = self._bound(x0, t, error.detach(), v)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _bound(self, x0: Tensor, t: Tensor, error: Tensor, v: Tensor) -> Tensor:
        """[B] bits per dimension: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), NLL at t = 0."""
        coef = self.extract(t, x0)
        log_variance = _log_variance(v, coef)
        # Eq. 11: x_t has the same coefficient in both means, so it cancels in their difference.
        # What remains is the difference of the two x_0, which is a multiple of the error of e
        # (eq. 9). At t = 0 the true mean is x_0 itself.
        mean_error = coef.posterior_mean_coef1 * coef.sqrt_recipm1_alphas_cumprod * error
        log_var_diff = coef.posterior_log_variance_clipped - log_variance
        # Eq. 6, the KL divergence of two Gaussians.
        kl = 0.5 * (
            log_var_diff.exp() - log_var_diff - 1 + mean_error.square() * (-log_variance).exp()
        )
        first = (t == 0).reshape(coef.log_betas.shape)
        nats = torch.where(first, _discretised_nll(x0, mean_error, log_variance), kl)
        return nats.flatten(1).mean(1) / math.log(2)

    def p_mean_variance(
        self, out: Tensor, x: Tensor, index: int | Tensor, clip_denoised: bool = False
    ) -> PMeanVariance:
        """Predicted p(x_{t-1} | x_t) from the network's output (eq. 9, 11 and 15).

        Args:
            out: output of the network, [B, 2L, H, W].
            x: x_t, [B, L, H, W].
            index: step of the chain, a number or [B].
            clip_denoised: clamp the predicted x_0 to [-1, 1].
        """
        coef = self.extract(index, x)
        noise, v = out.to(x.dtype).chunk(2, dim=1)
        x0 = coef.sqrt_recip_alphas_cumprod * x - coef.sqrt_recipm1_alphas_cumprod * noise
        if clip_denoised:
            x0 = x0.clamp(-1, 1)
            noise = (coef.sqrt_recip_alphas_cumprod * x - x0) / coef.sqrt_recipm1_alphas_cumprod
        mean = coef.posterior_mean_coef1 * x0 + coef.posterior_mean_coef2 * x
        return PMeanVariance(mean, _log_variance(v, coef), x0, noise)

    @torch.no_grad()
    def sample(
        self,
        model: Callable[..., Tensor],
        shape: Sequence[int],
        sampler: str = "ddpm",
        eta: float = 0.0,
        clip_denoised: bool = False,
        noise: Tensor | None = None,
        step_noise: Tensor | Callable[[], Tensor] | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """Samples latents.

        Args:
            model: called as `model(x_t, original timesteps [B], **model_kwargs)`.
            shape: (B, L, H, W).
            sampler: `ddpm`, `ddim` or `dpm++`.
            eta: noise of `ddim`: 0 is none, 1 is that of `ddpm`.
            clip_denoised: clamp the predicted x_0 to [-1, 1] in every step.
            noise: initial noise, [B, L, H, W]; by default from torch's global generator.
            step_noise: noise of each step: [S, B, L, H, W] in the order of use, or a function that
                returns the next; by default from torch's global generator.
            model_kwargs: such as `y`.

        Returns:
            [B, L, H, W].

        Raises:
            ConfigError: unknown sampler, or too many steps for it.
        """
        if sampler not in SAMPLERS:
            raise ConfigError(f"--sampler is {sampler}; it must be {one_of(SAMPLERS)}")
        if noise is None:
            device = next(model.parameters()).device if isinstance(model, nn.Module) else None
            noise = torch.randn(*shape, device=device)

        def predict(x: Tensor, timestep: int) -> Tensor:
            return model(x, torch.full((len(x),), timestep, device=x.device), **model_kwargs)

        if step_noise is None:
            step_noise = partial(torch.randn_like, noise)
        draw = iter(step_noise).__next__ if isinstance(step_noise, Tensor) else step_noise
        walk = samplers.SAMPLERS[sampler](self, predict, noise, draw, eta, clip_denoised)
        return deque(walk, maxlen=1).pop()


def _log_variance(v: Tensor, coef: Constants) -> Tensor:
    """Eq. 15 with v in [-1, 1], as in the published code: -1 is the posterior's, 1 log beta."""
    return torch.lerp(coef.posterior_log_variance_clipped, coef.log_betas, (v + 1) / 2)


def _normal_cdf(z: Tensor) -> Tensor:
    """The approximation of the published code; the exact function would change `vb`."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def _discretised_nll(x0: Tensor, mean_error: Tensor, log_variance: Tensor) -> Tensor:
    """Negative log likelihood in nats (eq. 5) of x_0, one of 256 grey levels.

    The Gaussian has its mean at x_0 - `mean_error`.
    """
    scale = (-0.5 * log_variance).exp()
    below_upper = _normal_cdf((mean_error + HALF_BIN) * scale)
    below_lower = _normal_cdf((mean_error - HALF_BIN) * scale)
    inside = torch.where(x0 > OPEN_BEYOND, 1 - below_lower, below_upper - below_lower)
    return -torch.where(x0 < -OPEN_BEYOND, below_upper, inside).clamp(min=LEAST_PROBABILITY).log()
