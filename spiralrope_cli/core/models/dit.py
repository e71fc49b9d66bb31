"""Diffusion transformer with Spiral RoPE, with the published parameter names.

Legend: B batch, L latent channels, (H, W) the latent's size, p patch side, N = h*w patch tokens,
C width, D channels of a head.

Source: "Scalable Diffusion Models with Transformers", arXiv 2212.09748: section 3.2, figure 3
(adaLN-Zero blocks). Attention and MLP are those of the ViT, as in the paper.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spiralrope_cli.core.config.models import RopeConfig
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.kernels import (
    Linear,
    add_scaled,
    matmul_dtype,
    modulate,
    no_autocast,
)
from spiralrope_cli.core.models.deit import (
    INIT_STD,
    Attention,
    Mlp,
    PatchEmbed,
    build_rope,
    of_block,
)
from spiralrope_cli.core.models.pretrained import Pretrained
from spiralrope_cli.core.rope import Grid, to_2tuple

NORM_EPS = 1e-6
NUM_SINUSOIDS = 256
MAX_PERIOD = 10000.0


class TimestepEmbedder(nn.Module):
    """Timestep to vector: sinusoids, then linear, SiLU, linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Linear(NUM_SINUSOIDS, dim), nn.SiLU(), Linear(dim, dim))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """[B] timesteps, 0 to 999 -> [B, C].

        The phases are computed in float32 or better: in bf16 the steps 998 and 999 are equal.
        """
        at_least_fp32 = torch.promote_types(dtype, torch.float32)
        index = torch.arange(NUM_SINUSOIDS // 2, dtype=at_least_fp32, device=t.device)
        frequency = torch.exp(index * (-2 * math.log(MAX_PERIOD) / NUM_SINUSOIDS))
        phase = t[:, None].to(at_least_fp32) * frequency
        return self.mlp(torch.cat((phase.cos(), phase.sin()), dim=-1).to(dtype))


class LabelEmbedder(nn.Module):
    """Class to vector; the last row of the table is the null class, for guidance."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y: Tensor) -> Tensor:
        """[B] -> [B, C]."""
        return self.embedding_table(y)


def modulation(dim: int, num_signals: int) -> nn.Sequential:
    """Linear layer from the condition to shifts, scales and gates: [B, C] -> [B, signals * C].

    The published module has a SiLU before it. Here `DiT.forward` computes the SiLU once for all
    blocks, and an identity takes its place, so that the parameters keep their names
    (`adaLN_modulation.1`).
    """
    return nn.Sequential(nn.Identity(), Linear(dim, num_signals * dim))


class DiTBlock(nn.Module):
    """Pre-norm block with adaptive layer norm and gated branches (adaLN-Zero)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qk_norm: bool) -> None:
        super().__init__()
        self.attn = Attention(dim, num_heads, qk_norm)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), gelu="tanh")  # as published
        self.adaLN_modulation = modulation(dim, 6)

    def forward(self, x: Tensor, cos_sin: Tensor | None, condition: Tensor) -> Tensor:
        """[B, N, C], cosines and sines as in `Attention`, and condition [B, C] -> [B, N, C]."""
        with no_autocast(x.device):
            signals = self.adaLN_modulation(condition).unflatten(-1, (6, 1, -1))
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = signals.unbind(1)  # [B, 1, C]
        dtype = matmul_dtype(self.attn.qkv.weight)
        x = add_scaled(
            x, self.attn(modulate(x, shift_1, scale_1, NORM_EPS, dtype), cos_sin), gate_1
        )
        return add_scaled(x, self.mlp(modulate(x, shift_2, scale_2, NORM_EPS, dtype)), gate_2)


class FinalLayer(nn.Module):
    """Adaptive layer norm, then a linear layer to the pixels of each patch."""

    def __init__(self, dim: int, patch_size: int, out_chans: int) -> None:
        super().__init__()
        self.linear = Linear(dim, patch_size * patch_size * out_chans)
        self.adaLN_modulation = modulation(dim, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """[B, N, C] and [B, C] -> [B, N, p*p*channels]; the channel varies fastest."""
        shift, scale = self.adaLN_modulation(condition).unflatten(-1, (2, 1, -1)).unbind(1)
        return self.linear(modulate(x, shift, scale, NORM_EPS, self.linear.weight.dtype))


class DiT(nn.Module, Pretrained):
    """Predicts a latent's noise, and the variance of p(x_{t-1} | x_t).

    Args:
        embed_dim: width C.
        depth: blocks.
        num_heads: heads per block; C / num_heads must be a multiple of 4 with RoPE.
        rope: options of the rotary embedding; `enabled=False`: fixed sin-cos positions instead.
        input_size: side or (height, width) of the latent.
        patch_size: side of a patch in latent pixels.
        in_chans: channels L of the latent.
        num_classes: K classes, 0 to K - 1; class K is the null class, for guidance.
        pretrain_grid: patch grid of pretraining, to which positions are interpolated; by default
            the model's own.
        label_dropout: probability that a label becomes the null class in training.
        qk_norm: RMS norm of queries and keys, per head.
        mlp_ratio: hidden width of the MLP over C.

    Raises:
        ConfigError: sizes that do not divide, or RoPE options that do not fit the heads.
    """

    family = "dit"

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        *,
        rope: RopeConfig,
        input_size: Grid = 32,
        patch_size: int = 2,
        in_chans: int = 4,
        num_classes: int = 1000,
        pretrain_grid: Grid | None = None,
        label_dropout: float = 0.1,
        qk_norm: bool = False,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        height, width = self.input_size = to_2tuple(input_size)
        if min(height, width) < patch_size or height % patch_size or width % patch_size:
            raise ConfigError(
                f"a latent of {height}x{width} does not split into patches of {patch_size}"
            )
        if embed_dim % num_heads:
            raise ConfigError(f"a width of {embed_dim} does not split into {num_heads} heads")
        self.patch_size = patch_size
        self.grid = (height // patch_size, width // patch_size)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.label_dropout = label_dropout
        self.grad_checkpointing = False

        self.x_embedder = PatchEmbed(patch_size, in_chans, embed_dim)
        self.t_embedder = TimestepEmbedder(embed_dim)
        self.y_embedder = LabelEmbedder(num_classes, embed_dim)
        self.rope = build_rope(
            rope, embed_dim // num_heads, depth, num_heads, pretrain_grid or self.grid
        )
        if self.rope is None:
            num_patches = self.grid[0] * self.grid[1]
            self.pos_embed = nn.Parameter(torch.empty(1, num_patches, embed_dim), False)
        self.blocks = nn.ModuleList(
            DiTBlock(embed_dim, num_heads, mlp_ratio, qk_norm) for _ in range(depth)
        )
        self.final_layer = FinalLayer(embed_dim, patch_size, 2 * in_chans)
        self.init_weights()

    @property
    def init_args(self) -> dict[str, Any]:  # type: ignore[override]
        """Arguments of the class that the weights belong to."""
        proj, block = self.x_embedder.proj, cast(DiTBlock, self.blocks[0])
        return {
            "embed_dim": proj.out_channels,
            "depth": len(self.blocks),
            "num_heads": block.attn.num_heads,
            "rope": asdict(self.rope.config if self.rope else RopeConfig(enabled=False)),
            "input_size": self.input_size,
            "patch_size": self.patch_size,
            "in_chans": self.in_chans,
            "num_classes": self.num_classes,
            "pretrain_grid": self.rope.pretrain_grid if self.rope else None,
            "label_dropout": self.label_dropout,
            "qk_norm": block.attn.q_norm is not None,
            "mlp_ratio": len(block.mlp.fc1.weight) / proj.out_channels,
        }

    def init_weights(self) -> None:
        """Published init: Xavier uniform, normal 0.02 for the embedders, zeros for adaLN-Zero.

        Zero gates make each block the identity, and a zero final layer makes the output 0. Do not
        change the order: the weights of a seed depend on it.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                # The patch embedding (a convolution) is initialised like a matrix, as published.
                nn.init.xavier_uniform_(module.weight.data.flatten(1))
                nn.init.zeros_(module.get_parameter("bias"))
        for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table"):
            nn.init.normal_(self.get_parameter(f"{name}.weight"), std=INIT_STD)
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer"):
                nn.init.zeros_(parameter)
        if self.rope is None:
            self.pos_embed.data.copy_(sincos_pos_embed(self.grid, self.pos_embed.shape[-1]))

    def label_drop_mask(self, batch_size: int, generator: torch.Generator) -> Tensor | None:
        """Label dropout: which samples of one step get the null class.

        Args:
            batch_size: B, the samples of the whole step.
            generator: a CPU generator.

        Returns:
            [B] bool on the CPU; None if the rate is 0.
        """
        if not self.label_dropout:
            return None
        return torch.rand(batch_size, generator=generator) < self.label_dropout

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, label_drop_mask: Tensor | None = None
    ) -> Tensor:
        """Predicts noise and variance.

        Under autocast only the matmuls of the blocks are in bf16. Embedders, modulation and final
        layer take little time and keep the dtype of the weights.

        Args:
            x: noised latents [B, L, H, W]; with RoPE any size that is a multiple of the patch.
            t: [B] timesteps, 0 to 999.
            y: [B] classes; `num_classes` is the null class.
            label_drop_mask: [B] bool from `label_drop_mask`, True where the label becomes null.

        Returns:
            [B, 2L, H, W]: noise, then v, which interpolates the log variance (`GaussianDiffusion`),
            about -1 to 1.

        Raises:
            ValueError: the size is not a multiple of the patch; without RoPE: not the model's size.
        """
        height, width = x.shape[-2:]
        if self.rope is None and (height, width) != self.input_size:
            raise ValueError(f"latents are {(height, width)}, not {self.input_size}")
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"latents of {(height, width)} do not split into patches of {self.patch_size}"
            )
        grid = (height // self.patch_size, width // self.patch_size)
        if label_drop_mask is not None:
            y = torch.where(label_drop_mask, self.num_classes, y)
        dtype = self.x_embedder.proj.weight.dtype
        with no_autocast(x.device):
            condition = F.silu(self.t_embedder(t, dtype) + self.y_embedder(y))  # [B, C]
            x = self.x_embedder(x.to(dtype)).contiguous()
        if self.rope is None:
            x, cos_sin = x + self.pos_embed, None
        else:
            cos_sin = self.rope.cos_sin(grid, 0, x.device)
        for number, block in enumerate(self.blocks):
            own = of_block(cos_sin, number)
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, own, condition, use_reentrant=False)
            else:
                x = block(x, own, condition)
        with no_autocast(x.device):
            return self.unpatchify(self.final_layer(x, condition), grid)

    def unpatchify(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, h*w, p*p*channels] -> [B, channels, H, W]."""
        patch = self.patch_size
        x = x.unflatten(2, (patch, patch, -1)).unflatten(1, grid)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, grid[0] * patch, grid[1] * patch)

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, cfg_channels: int | None = 3
    ) -> Tensor:
        """Classifier-free guidance (arXiv 2207.12598, eq. 6).

        e = e_null + scale * (e_label - e_null)

        Args:
            x: latents [2B, L, H, W]; the second half is ignored, the first is used twice.
            t: [2B] timesteps, 0 to 999.
            y: [2B] labels, then B times the null class.
            cfg_scale: 1 + w of the paper; 1 is no guidance.
            cfg_channels: number of leading noise channels that are guided; None: all. The
                published code guides 3 of 4; its authors say that they keep this for
                reproducibility.

        Returns:
            [2B, 2L, H, W]; the guided channels are equal in both halves, the others are not.
        """
        half = x[: len(x) // 2]
        out = self(torch.cat((half, half)), t, y)
        guided = self.in_chans if cfg_channels is None else min(cfg_channels, self.in_chans)
        labelled, null = out[:, :guided].chunk(2)
        noise = null + cfg_scale * (labelled - null)
        return torch.cat((torch.cat((noise, noise)), out[:, guided:]), dim=1)


def sincos_pos_embed(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed sin-cos positions: the first half of the channels for columns, the second for rows.

    Args:
        grid: patches as (rows, columns).
        dim: width C, a multiple of 4.

    Returns:
        [1, h*w, C] float32; each half is [sin, cos].

    Raises:
        ConfigError: the width is not a multiple of 4.
    """
    if dim % 4:
        raise ConfigError(f"a width of {dim} is not a multiple of 4")
    frequency = MAX_PERIOD ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    x, y = column.reshape(-1, 1) * frequency, row.reshape(-1, 1) * frequency
    return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), dim=1).float()[None]
