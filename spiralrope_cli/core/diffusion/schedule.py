"""Noise schedule: everything that follows from the betas, in float64. S steps in the chain."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spiralrope_cli.core.config.diffusion import NUM_TRAIN_STEPS, spaced_timesteps

BETA_FIRST, BETA_LAST = 1e-4, 0.02


class Constants(NamedTuple):
    """Factors of every step; a is alphas_cumprod, the share of the signal's power that is left."""

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


class Schedule:
    """Linear betas from 1e-4 to 0.02 over 1000 steps, or the chain of some of these steps.

    Args:
        steps: as in `spaced_timesteps`.

    Attributes:
        timesteps: [S] int64, original number of each step, ascending.
        betas: [S] float64.
        constants: [S] float64 each.

    Raises:
        ConfigError: no such chain exists.
    """

    def __init__(self, steps: str | int) -> None:
        self.timesteps = torch.tensor(spaced_timesteps(steps))
        all_betas = torch.linspace(BETA_FIRST, BETA_LAST, NUM_TRAIN_STEPS, dtype=torch.float64)
        left = (1 - all_betas).cumprod(0)[self.timesteps]
        left_before = torch.cat((left.new_ones(1), left[:-1]))
        self.betas = betas = 1 - left / left_before
        posterior_variance = betas * (1 - left_before) / (1 - left)
        self.constants = Constants(
            alphas_cumprod=left,
            alphas_cumprod_prev=left_before,
            sqrt_alphas_cumprod=left.sqrt(),
            sqrt_one_minus_alphas_cumprod=(1 - left).sqrt(),
            sqrt_recip_alphas_cumprod=left.rsqrt(),
            sqrt_recipm1_alphas_cumprod=(1 / left - 1).sqrt(),
            posterior_mean_coef1=betas * left_before.sqrt() / (1 - left),
            posterior_mean_coef2=(1 - left_before) * (1 - betas).sqrt() / (1 - left),
            # The first variance is 0 and has no logarithm: the second stands in.
            posterior_log_variance_clipped=posterior_variance[1:].log()[[0, *range(len(left) - 1)]],
            log_betas=betas.log(),
        )
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._timesteps_on: dict[torch.device, Tensor] = {}

    def at(self, index: int | Tensor, like: Tensor) -> Constants:
        """Constants of one step of the chain, or of one for each sample.

        The tables lie on each device once, so nothing waits for it.

        Args:
            index: step of the chain, 0 to S - 1, as a number or [B].
            like: [B, ...] whose device and dtype they are made for; float32 or better.

        Returns:
            [1 or B, 1, ...] each.
        """
        key = (like.device, torch.promote_types(like.dtype, torch.float32))
        if key not in self._tables:
            # A table made in inference mode could never be used in training.
            with torch.inference_mode(False):
                self._tables[key] = torch.stack(self.constants).to(key[1]).to(key[0])
        table = self._tables[key][:, index]
        return Constants(*table.reshape(len(table), -1, *(1,) * (like.ndim - 1)))

    def original(self, index: Tensor) -> Tensor:
        """[B] steps of the chain -> [B] original numbers, which the network is given."""
        if index.device not in self._timesteps_on:
            self._timesteps_on[index.device] = self.timesteps.to(index.device)
        return self._timesteps_on[index.device][index]
