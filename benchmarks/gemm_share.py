"""What fraction of the machine's matrix rate does the bf16 train step reach, and where is the rest?

DeiT-S with Spiral RoPE, 224 px, batch 8. The rate is that of the largest product of the network,
measured in turn with the step.
"""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.nn.functional as F
from interleave import deit_step, interleaved, median, prepare, show
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from spiralrope_cli import create_model

BATCH, ROUNDS = 8, 15
TOKENS, WIDTH = 8 * 197, 384
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "convolution"),
    "attention": ("scaled_dot_product",),
    "GELU": ("aten::gelu",),
    "rotation": ("_RotaryComplex",),
    "optimizer": ("adamw",),
    "copies and casts": ("aten::copy_",),
    "products, sums and norms by element": ("aten::",),
}


def kind_of(name: str) -> str:
    for kind, parts in KINDS.items():
        if any(part in name for part in parts):
            return kind
    return "everything else"


def main() -> None:
    prepare()
    step = deit_step(create_model("deit-s"), "bf16", BATCH)
    tokens = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16)
    weight = torch.randn(4 * WIDTH, WIDTH, dtype=torch.bfloat16)
    product = lambda: [F.linear(tokens, weight) for _ in range(20)]  # noqa: E731
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    seconds = interleaved({"step": step, "product": product}, ROUNDS)
    rate = 20 * 2 * TOKENS * WIDTH * 4 * WIDTH / median(seconds["product"])
    reached = counter.get_total_flops() / median(seconds["step"])
    show(
        "bf16 train step, DeiT-S, batch 8",
        [
            ("matrix rate", f"{rate / 1e9:.0f} GFLOP/s"),
            ("train step", f"{reached / 1e9:.0f} GFLOP/s"),
            ("SHARE", f"{reached / rate:.1%}"),
        ],
    )
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(3):
            step()
    spent: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        spent[kind_of(event.key)] += event.self_cpu_time_total
    total = sum(spent.values())
    rows = [(k, f"{v / total:.1%}") for k, v in sorted(spent.items(), key=lambda kv: -kv[1])]
    show("where the time goes", rows)


if __name__ == "__main__":
    main()
