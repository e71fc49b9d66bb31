"""RoPE-Mixed: learned frequencies for each head of each block.

Legend: N = h*w patch tokens, H heads, D channels of a head.

Source: "Rotary Position Embedding for Vision Transformer", arXiv 2403.13298.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spiralrope_cli.core.config.models import RopeConfig
from spiralrope_cli.core.rope import Grid, first_mixed_frequencies, mixed_angles, to_2tuple


class MixedRoPE(nn.Module):
    """Learned frequencies, `freqs` [2, depth, H, D/2], for columns and rows.

    Cosines and sines are computed in each forward pass, in float32 or better.

    Args:
        head_dim: channels per head, a multiple of 4.
        depth: blocks.
        num_heads: heads per block.
        config: `scaling` is used.
        pretrain_grid: patch grid in training, as a side or (rows, columns).

    Raises:
        ConfigError: head_dim is not a multiple of 4.
    """

    def __init__(
        self, head_dim: int, depth: int, num_heads: int, config: RopeConfig, pretrain_grid: Grid
    ) -> None:
        super().__init__()
        config.check_head_dim(head_dim)
        self.config = config
        self.pretrain_grid = to_2tuple(pretrain_grid)
        # The random state stays as it was: all kinds of RoPE have the same other weights of a seed.
        with torch.random.fork_rng(devices=[]):
            first = first_mixed_frequencies(head_dim, depth, num_heads)
        self.freqs = nn.Parameter(torch.empty(first.shape))
        self.freqs.data.copy_(first)

    def cos_sin(
        self, grid: tuple[int, int], prefix_tokens: int, device: torch.device
    ) -> tuple[Tensor, ...]:
        """[prefix + N, H, D/2, 2] of each block; prefix tokens have the identity."""
        freqs = self.freqs.to(device, torch.promote_types(self.freqs.dtype, torch.float32))
        angle = mixed_angles(freqs, grid, self.config, self.pretrain_grid)
        angle = F.pad(angle, (0, 0, 0, 0, prefix_tokens, 0))
        # unbind, not an index per block, whose backward would be a full-size tensor of zeros.
        return torch.stack((angle.cos(), angle.sin()), dim=-1).unbind()

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"freqs={tuple(self.freqs.shape)}, pretrain_grid={self.pretrain_grid}"
