"""What does --precision auto gain over fp32? Train step of DeiT-S with Spiral RoPE, batch 8."""

from __future__ import annotations

import torch
from interleave import CPU, interleaved, median, prepare, ratio, show, train_step

from spiralrope_cli import create_model
from spiralrope_cli.core.runtime.device import pick_precision

BATCH, ROUNDS = 8, 9


def main() -> None:
    prepare()
    dtype, reason = pick_precision("auto", CPU)
    chosen = "bf16" if dtype == torch.bfloat16 else "fp32"
    model = create_model("deit-s")
    sides = {"auto": train_step(model, chosen, BATCH), "fp32": train_step(model, "fp32", BATCH)}
    seconds = interleaved(sides, ROUNDS)
    rows = [(name, f"{BATCH / median(seconds[name]):.1f} images/s") for name in seconds]
    faster = 1 / ratio(seconds, "auto", "fp32")
    show(f"auto is {chosen}: {reason}", [*rows, ("RATIO auto / fp32", f"{faster:.2f}")])


if __name__ == "__main__":
    main()
