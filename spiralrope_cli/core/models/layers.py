"""Parts of the networks. Legend: B batch, N tokens, C width, H heads, D channels of a head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spiralrope_cli.core.kernels import Gelu, Linear, attention, fp32_on_cpu
from spiralrope_cli.core.rope import apply_rotary


class RMSNorm(nn.Module):
    """scale * x / (rms(x) + eps), with eps outside the root as the published weights have it."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C] in the scale's dtype, the statistic in float32 or better."""
        x_fp32 = x if x.dtype == torch.float64 else x.float()
        rms = torch.linalg.vector_norm(x_fp32, dim=-1, keepdim=True) * x_fp32.shape[-1] ** -0.5
        return (x_fp32 * (rms + self.eps).reciprocal() * self.scale).to(self.scale.dtype)


class Attention(nn.Module):
    """Multi-head self-attention whose queries and keys are turned by the given table.

    With `qk_norm` each head's queries and keys are normalised before they are turned.
    """

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(dim // num_heads) if qk_norm else None
        self.k_norm = RMSNorm(dim // num_heads) if qk_norm else None
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, cos_sin: Tensor | None) -> Tensor:
        """[B, N, C] and [N, D/2, 2] cosines and sines -> [B, N, C]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, H, D]
        # One unbind: its gradient is one stack, where slices would each fill a whole tensor.
        q, k, v = fp32_on_cpu(qkv).unbind(2)  # [B, N, H, D]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if cos_sin is not None:
            q, k = apply_rotary(q, cos_sin[:, None]), apply_rotary(k, cos_sin[:, None])
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # [B, H, N, D]
        out = attention(q, k, v).to(qkv.dtype)
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int, gelu: Gelu = "none") -> None:
        super().__init__()
        self.gelu = gelu
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]; the GELU is taken in `fc1`."""
        return self.fc2(self.fc1(x, self.gelu))


class PatchEmbed(nn.Module):
    """Image to patch tokens by a strided convolution."""

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, h*patch, w*patch] -> [B, h*w, C], row-major."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """The DeiT's: pre-norm, with layer scale and stochastic depth."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, init_scale: float) -> None:
        super().__init__()
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_scale))
        self.gamma_2 = nn.Parameter(torch.full((dim,), init_scale))
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = RMSNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, cos_sin: Tensor | None, drop_path_mask: Tensor | None) -> Tensor:
        """One block.

        Args:
            x: [B, N, C].
            cos_sin: [N, D/2, 2] cosines and sines, None without RoPE.
            drop_path_mask: [2, B], 0 where a sample skips the branch, else 1 / (1 - rate).

        Returns:
            [B, N, C].
        """
        gamma_1, gamma_2 = self.gamma_1, self.gamma_2
        if drop_path_mask is not None:
            gamma_1, gamma_2 = (
                gamma * on[:, None, None]
                for gamma, on in zip((gamma_1, gamma_2), drop_path_mask, strict=True)
            )  # [B, 1, C]
        # x + branch * gamma, in one pass.
        x = torch.addcmul(x, self.attn(self.norm1(x), cos_sin), gamma_1)
        return torch.addcmul(x, self.mlp(self.norm2(x)), gamma_2)
