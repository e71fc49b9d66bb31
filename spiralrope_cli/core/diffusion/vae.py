"""The VAE between pixels and latents, through diffusers.

Legend: B batch, (H, W) pixels, (h, w) = (H, W) / 8, L = 4 latent channels.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spiralrope_cli.core.config.dit_runs import LATENT_SCALE
from spiralrope_cli.core.errors import CheckpointError


class Vae:
    """A frozen `AutoencoderKL` of diffusers; a DiT takes its latents times `scale`."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.scale = float(model.config.scaling_factor)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior of the latents, not scaled. The exp of the log variance is in float32.

        Args:
            images: [B, 3, H, W] in [-1, 1].

        Returns:
            mean and standard deviation, [B, L, h, w] float32 each.
        """
        posterior = self.model.encode(images.to(self.model.dtype)).latent_dist
        posterior = type(posterior)(posterior.parameters.float())
        return posterior.mean, posterior.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images from scaled latents.

        Args:
            latents: [B, L, h, w] from a DiT.

        Returns:
            [B, 3, H, W] float32, about [-1, 1].
        """
        return self.model.decode((latents / self.scale).to(self.model.dtype)).sample.float()


def sample_posterior(
    mean: Tensor, std: Tensor, noise: Tensor, scale: float = LATENT_SCALE
) -> Tensor:
    """Latents for a DiT: scale * (mean + std * noise), [B, L, h, w] each."""
    return torch.addcmul(mean, std, noise) * scale


def load_vae(folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Vae:
    """A VAE from a folder in diffusers' layout.

    Raises:
        CheckpointError: the weights are damaged, or do not fit the config.
    """
    from diffusers import AutoencoderKL

    try:
        # Without accelerate, diffusers prints advice to install it.
        with contextlib.redirect_stderr(io.StringIO()):
            model, info = AutoencoderKL.from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=True,
                torch_dtype=dtype,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        # For a damaged file the message of diffusers speaks of the network and the Hub.
        raise CheckpointError(
            f"the VAE in {folder} cannot be read: its weights are damaged, or of another VAE",
            "fetch or copy it again",
        ) from error
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise CheckpointError(
            f"the VAE in {folder} does not fit its config: {len(wrong)} weights are missing, "
            f"unexpected or of another shape, for example {wrong[0]}"
        )
    model = model.to(device)
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
    return Vae(model)
