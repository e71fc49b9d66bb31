"""How fast is DeiT-S with Spiral RoPE beside timm's vit_small_patch16_rope_ape_224?"""

from __future__ import annotations

import timm
from interleave import forward, interleaved, median, prepare, ratio, show, train_step

from spiralrope_cli import create_model

PEER = "vit_small_patch16_rope_ape_224"
BATCH, ROUNDS = 8, {"fp32": 7, "bf16": 15}


def main() -> None:
    prepare()
    for dtype, rounds in ROUNDS.items():
        for what, make in (("forward", forward), ("train step", train_step)):
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
