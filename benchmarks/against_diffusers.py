"""How fast is DiT-S/2 with Spiral RoPE beside diffusers' DiT of that size without? Batch 4."""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel
from interleave import forward, interleaved, median, prepare, ratio, show

from spiralrope_cli import create_model
from spiralrope_cli.core.models.factory import cast_matmuls

BATCH, ROUNDS = 4, 25


def main() -> None:
    prepare()
    latents = torch.randn(BATCH, 4, 32, 32)
    t, labels = torch.randint(0, 1000, (2, BATCH))
    for dtype in ("fp32", "bf16"):
        ours = create_model("dit-s2")
        if dtype == "bf16":
            cast_matmuls(ours, torch.bfloat16)  # as dit-sample does
        peer = DiTTransformer2DModel(
            num_attention_heads=6, attention_head_dim=64, out_channels=8, num_layers=12
        )
        sides = {
            "ours": forward(ours, "fp32", latents, t, labels),  # without autocast
            "diffusers": forward(peer, dtype, latents, timestep=t, class_labels=labels),
        }
        seconds = interleaved(sides, ROUNDS)
        rows = [(name, f"{BATCH / median(seconds[name]):.1f} images/s") for name in seconds]
        faster = 1 / ratio(seconds, "ours", "diffusers")
        show(f"forward, {dtype}", [*rows, ("RATIO ours / diffusers", f"{faster:.3f}")])


if __name__ == "__main__":
    main()
