"""Spiral RoPE in a timm vision transformer, which rotates nothing by itself."""

import timm
import torch

from spiralrope_cli import RopeConfig, SpiralRoPE


class TurnPatches(SpiralRoPE):
    """Takes the place of timm's norm of queries and keys, [B, heads, 1 + 14*14, head_dim]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Leaves the class token as it is."""
        return super().forward(x, grid=14, prefix_tokens=1)


def add_spiral_rope(model: timm.models.VisionTransformer) -> None:
    rope = TurnPatches(model.blocks[0].attn.head_dim, RopeConfig(rotate=2), pretrain_grid=14)
    for block in model.blocks:
        block.attn.q_norm = block.attn.k_norm = rope


if __name__ == "__main__":
    vit = timm.create_model("vit_small_patch16_224").eval()
    add_spiral_rope(vit)
    print(tuple(vit(torch.randn(2, 3, 224, 224)).shape))
