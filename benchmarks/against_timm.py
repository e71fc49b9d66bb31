"""How fast is DeiT-S with Spiral RoPE beside timm's vit_small_patch16_rope_ape_224?"""

from __future__ import annotations

import timm
import torch
from interleave import Call, deit_step, forward, interleaved, median, prepare, ratio, show
from torch import nn

from spiralrope_cli import create_model

PEER = "vit_small_patch16_rope_ape_224"
BATCH, ROUNDS = 8, {"fp32": 7, "bf16": 15}


def deit_forward(model: nn.Module, dtype: str, batch: int) -> Call:
    return forward(model, dtype, torch.randn(batch, 3, 224, 224))


def main() -> None:
    prepare()
    for dtype, rounds in ROUNDS.items():
        for what, make in (("forward", deit_forward), ("train step", deit_step)):
            sides = {
                "ours": make(create_model("deit-s"), dtype, BATCH),
                "timm": make(timm.create_model(PEER), dtype, BATCH),
            }
            seconds = interleaved(sides, rounds)
            rows = [(name, f"{BATCH / median(seconds[name]):.1f} images/s") for name in seconds]
            faster = 1 / ratio(seconds, "ours", "timm")
            show(f"{what}, {dtype}, batch {BATCH}", [*rows, ("RATIO ours / timm", f"{faster:.3f}")])


if __name__ == "__main__":
    main()
