"""Spiral RoPE in a timm vision transformer that has no rotary embedding of its own."""

import timm
import torch

from spiralrope_cli import RopeConfig, SpiralRoPE


class RotatePatches(SpiralRoPE):
    """Replaces timm's norm of queries and keys, [B, num_heads, 1 + 14*14, head_dim]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rotates all tokens but the class token."""
        return super().forward(x, grid=14, prefix_tokens=1)


def add_spiral_rope(model: timm.models.VisionTransformer) -> None:
    rope = RotatePatches(model.blocks[0].attn.head_dim, RopeConfig(rotate=2), pretrain_grid=14)
    for block in model.blocks:
        block.attn.q_norm = block.attn.k_norm = rope


if __name__ == "__main__":
    vit = timm.create_model("vit_small_patch16_224").eval()
    add_spiral_rope(vit)
    print(tuple(vit(torch.randn(2, 3, 224, 224)).shape))
