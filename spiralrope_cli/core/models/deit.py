"""DeiT-III (arXiv 2204.07118) with Spiral RoPE, with the published parameter names.

Legend: B batch, N = h*w patch tokens, C width, H heads, D channels of a head. `cos_sin` holds
cosines and sines: [tokens, D/2, 2] from `SpiralRoPE`, [tokens, H, D/2, 2] from `MixedRoPE`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spiralrope_cli.core.config.models import RopeConfig
from spiralrope_cli.core.config.runs import check_divides
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.kernels import (
    Gelu,
    Linear,
    add_scaled,
    attention,
    fp32_on_cpu,
    has_rotary_kernel,
    matmul_dtype,
    rms_norm,
    rotate_qkv,
)
from spiralrope_cli.core.models.mixed_rope import MixedRoPE
from spiralrope_cli.core.models.pretrained import Pretrained
from spiralrope_cli.core.rope import Grid, SpiralRoPE, apply_rotary, to_2tuple

CosSin = Tensor | tuple[Tensor, ...]
"""Cosines and sines for all blocks, or those of each block."""
INIT_STD = 0.02
LAYER_SCALE_INIT = 1e-4


def build_rope(
    config: RopeConfig, head_dim: int, depth: int, num_heads: int, pretrain_grid: Grid
) -> SpiralRoPE | MixedRoPE | None:
    """The rotary embedding of a network; None if it is off."""
    if config.mixed:
        return MixedRoPE(head_dim, depth, num_heads, config, pretrain_grid)
    return SpiralRoPE(head_dim, config, pretrain_grid) if config.enabled else None


def of_block(cos_sin: CosSin | None, number: int) -> Tensor | None:
    """Cosines and sines of one block."""
    return cos_sin[number] if isinstance(cos_sin, tuple) else cos_sin


class RMSNorm(nn.Module):
    """scale * x / (rms(x) + eps) (arXiv 1910.07467, eq. 4).

    eps is outside the root, unlike in `nn.RMSNorm`: the published weights were trained this way.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[..., C] -> [..., C] in dtype, by default that of `scale`; rms in float32 or better."""
        x_fp32 = x if x.dtype == torch.float64 else x.float()
        return rms_norm(x_fp32, self.scale, self.eps, dtype or self.scale.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with rotary embedding of the queries and keys.

    With `qk_norm` each head's queries and keys are normalised before they are rotated.
    """

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(dim // num_heads) if qk_norm else None
        self.k_norm = RMSNorm(dim // num_heads) if qk_norm else None
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, cos_sin: Tensor | None) -> Tensor:
        """[B, N, C] and [N, D/2, 2] or [N, H, D/2, 2] cosines and sines -> [B, N, C]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, H, D]
        packed = fp32_on_cpu(qkv)
        if cos_sin is not None and self.q_norm is None and has_rotary_kernel(packed, cos_sin):
            q, k, v = rotate_qkv(packed, cos_sin)  # [B, N, H, D]
        else:
            # unbind, not three slices: its backward is one stack, that of each slice a full-size
            # tensor of zeros.
            q, k, v = packed.unbind(2)
            if self.q_norm is not None and self.k_norm is not None:
                q, k = self.q_norm(q, v.dtype), self.k_norm(k, v.dtype)
            if cos_sin is not None:
                per_head = cos_sin if cos_sin.ndim == 4 else cos_sin[:, None]
                q, k = apply_rotary(q, per_head), apply_rotary(k, per_head)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # [B, H, N, D]
        out = attention(q, k, v).to(qkv.dtype)
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, GELU, linear: [B, N, C] -> [B, N, C]."""

    def __init__(self, dim: int, hidden_dim: int, gelu: Gelu = "none") -> None:
        super().__init__()
        self.gelu = gelu
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`fc1` applies the GELU, because oneDNN fuses both."""
        return self.fc2(self.fc1(x, self.gelu))


class PatchEmbed(nn.Module):
    """Image to patch tokens by a strided convolution."""

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, h*patch, w*patch] -> [B, h*w, C], row-major."""
        return self.proj(images.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm block with LayerScale (arXiv 2103.17239) and stochastic depth (arXiv 1603.09382)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, init_scale: float) -> None:
        super().__init__()
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_scale))
        self.gamma_2 = nn.Parameter(torch.full((dim,), init_scale))
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = RMSNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, cos_sin: Tensor | None, drop_path_mask: Tensor | None) -> Tensor:
        """[B, N, C] -> [B, N, C]; the mask is [2, B], one row per branch."""
        gamma_1: Tensor = self.gamma_1
        gamma_2: Tensor = self.gamma_2
        if drop_path_mask is not None:
            # Multiplied into the layer scale, [B, 1, C]: one pass over the tokens less.
            gamma_1 = gamma_1 * drop_path_mask[0, :, None, None]
            gamma_2 = gamma_2 * drop_path_mask[1, :, None, None]
        dtype = matmul_dtype(self.attn.qkv.weight)
        x = add_scaled(x, self.attn(self.norm1(x, dtype), cos_sin), gamma_1)
        return add_scaled(x, self.mlp(self.norm2(x, dtype)), gamma_2)


class DeiT(nn.Module, Pretrained):
    """Vision transformer classifier.

    Args:
        embed_dim: width C.
        depth: blocks.
        num_heads: heads per block; C / num_heads must be a multiple of 4 with RoPE.
        rope: options of the rotary embedding; `enabled=False`: none.
        image_size: side or (height, width) in pixels.
        patch_size: side of a patch in pixels.
        in_chans: channels of the images.
        num_classes: outputs; 0: no head, `forward` returns the class token's features.
        pretrain_grid: patch grid of pretraining, to which positions are interpolated; by default
            the model's own.
        drop_path: stochastic depth rate, the same in every block.
        mlp_ratio: hidden width of the MLP over C.

    Raises:
        ConfigError: sizes that do not divide, or RoPE options that do not fit the heads.
    """

    family = "deit"

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        *,
        rope: RopeConfig,
        image_size: Grid = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        pretrain_grid: Grid | None = None,
        drop_path: float = 0.0,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        height, width = to_2tuple(image_size)
        check_divides((height, width), patch_size)
        if embed_dim % num_heads:
            raise ConfigError(f"a width of {embed_dim} does not split into {num_heads} heads")
        self.image_size = (height, width)
        self.grid = (height // patch_size, width // patch_size)
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.drop_path = drop_path
        self.grad_checkpointing = False

        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], embed_dim))
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.rope = build_rope(
            rope, embed_dim // num_heads, depth, num_heads, pretrain_grid or self.grid
        )
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, LAYER_SCALE_INIT) for _ in range(depth)
        )
        self.norm: nn.Module = RMSNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.init_weights()

    @property
    def init_args(self) -> dict[str, Any]:  # type: ignore[override]
        """Arguments of the class that the weights belong to."""
        patch_embed, block = self.patch_embed.proj, cast(Block, self.blocks[0])
        return {
            "embed_dim": self.embed_dim,
            "depth": len(self.blocks),
            "num_heads": block.attn.num_heads,
            "rope": asdict(self.rope.config if self.rope else RopeConfig(enabled=False)),
            "image_size": self.image_size,
            "patch_size": patch_embed.stride[0],
            "in_chans": patch_embed.in_channels,
            "num_classes": self.num_classes,
            "pretrain_grid": self.rope.pretrain_grid if self.rope else None,
            "mlp_ratio": len(block.mlp.fc1.weight) / self.embed_dim,
        }

    def init_weights(self) -> None:
        """Published init: truncated normal 0.02 for linears and embeddings, zero biases.

        Do not change the order: the weights of a seed depend on it.
        """
        nn.init.trunc_normal_(self.cls_token, std=INIT_STD)
        nn.init.trunc_normal_(self.pos_embed, std=INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(module.bias)

    def drop_path_mask(self, batch_size: int, generator: torch.Generator) -> Tensor | None:
        """Stochastic depth: which samples of one step keep which residual branch.

        The mask is for the whole batch of a step, and the caller seeds the generator by the step.
        So an image has the same mask for any number of processes and micro-batches.

        Args:
            batch_size: B, the images of the whole step.
            generator: a CPU generator.

        Returns:
            [depth, 2, B] float32 on the CPU: 0 where a sample skips the branch, else
            1 / (1 - rate). None if the rate is 0.
        """
        if not self.drop_path:
            return None
        keep_prob = 1 - self.drop_path
        mask = torch.rand(len(self.blocks), 2, batch_size, generator=generator) < keep_prob
        return mask.float() / keep_prob

    def embed(self, images: Tensor) -> tuple[Tensor, CosSin | None]:
        """[B, channels, height, width] -> tokens before the first block [B, 1 + N, C], cos_sin."""
        if tuple(images.shape[-2:]) != self.image_size:
            raise ValueError(f"images are {tuple(images.shape[-2:])}, not {self.image_size}")
        x = self.patch_embed(images) + self.pos_embed
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        return x, self.rope.cos_sin(self.grid, 1, x.device) if self.rope is not None else None

    def run_block(
        self, number: int, x: Tensor, cos_sin: CosSin | None, drop_path_mask: Tensor | None
    ) -> Tensor:
        """[B, 1 + N, C] -> [B, 1 + N, C] through one block; the mask is [depth, 2, B]."""
        block, cos_sin = self.blocks[number], of_block(cos_sin, number)
        mask = drop_path_mask[number] if drop_path_mask is not None else None
        if self.grad_checkpointing and self.training:
            return checkpoint(block, x, cos_sin, mask, use_reentrant=False)
        return block(x, cos_sin, mask)

    def own_drop_path_mask(self, images: Tensor) -> Tensor | None:
        """A mask from torch's global generator, for training loops that pass none."""
        if not self.training:
            return None
        mask = self.drop_path_mask(len(images), torch.default_generator)
        return mask.to(self.cls_token) if mask is not None else None

    def forward_blocks(self, images: Tensor, drop_path_mask: Tensor | None = None) -> Tensor:
        """[B, channels, height, width] -> [B, 1 + N, C] before the final norm."""
        mask = self.own_drop_path_mask(images) if drop_path_mask is None else drop_path_mask
        x, cos_sin = self.embed(images)
        for number in range(len(self.blocks)):
            x = self.run_block(number, x, cos_sin, mask)
        return x

    def forward_features(self, images: Tensor, drop_path_mask: Tensor | None = None) -> Tensor:
        """[B, channels, height, width] -> [B, 1 + N, C] after the final norm."""
        return self.norm(self.forward_blocks(images, drop_path_mask))

    def forward(self, images: Tensor, drop_path_mask: Tensor | None = None) -> Tensor:
        """Classifies images.

        Args:
            images: [B, channels, height, width], normalised.
            drop_path_mask: [depth, 2, B] from `drop_path_mask`; in training mode None makes one.

        Returns:
            logits [B, classes].
        """
        x = self.norm(self.forward_blocks(images, drop_path_mask)[:, 0])  # the class token alone
        return self.head(x.to(self.head.weight.dtype) if isinstance(self.head, nn.Linear) else x)


def resize_pos_embed(pos_embed: Tensor, old_grid: Grid, new_grid: Grid) -> Tensor:
    """Resamples a position embedding to another patch grid: bicubic, without antialias.

    Args:
        pos_embed: [1, h*w, C] for `old_grid`, row-major.
        old_grid: side or (rows, columns).
        new_grid: side or (rows, columns).

    Returns:
        [1, new h * new w, C].
    """
    old_grid, new_grid = to_2tuple(old_grid), to_2tuple(new_grid)
    if old_grid == new_grid:
        return pos_embed
    grid = pos_embed.unflatten(1, old_grid).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, new_grid, mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).flatten(1, 2)
