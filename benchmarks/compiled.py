"""Does --compile pay on this CPU? Train steps, blocks compiled : eager, in seconds of all cores.

    TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 python benchmarks/compiled.py

CPU seconds, because a machine that does other work too would hide the difference. Without the
variable, a second run finds what the first one has compiled.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from interleave import deit_step, dit_step, median, prepare, show

from spiralrope_cli import create_model
from spiralrope_cli.core.models.factory import compile_blocks

STEPS = {
    "deit-ti on digits, batch 32": (
        deit_step,
        "deit-ti",
        {"image_size": 8, "patch_size": 2},
        32,
        8,
    ),
    "dit-ti2 on digits, batch 64": (dit_step, "dit-ti2", {"input_size": 8}, 64, 8),
    "deit-s, 224 px, batch 8": (deit_step, "deit-s", {}, 8, 224),
}
ROUNDS = 5


def cpu_seconds(call: Callable[[], None]) -> float:
    """Of this process and of the compilers that it starts."""
    before = os.times()
    call()
    return sum(os.times()[:4]) - sum(before[:4])


def main() -> None:
    prepare()
    for title, (make, arch, options, batch, size) in STEPS.items():
        for dtype in ("bf16", "fp32"):
            eager, compiled = (create_model(arch, **options) for _ in range(2))
            compile_blocks(compiled, say=lambda line: None)
            sides = {"eager": eager, "compiled": compiled}
            steps = {name: make(model, dtype, batch, size) for name, model in sides.items()}
            first = cpu_seconds(steps["compiled"])
            steps["eager"]()
            times = [[cpu_seconds(step) for step in steps.values()] for _ in range(ROUNDS)]
            eager_s, compiled_s = (median([*column]) for column in zip(*times, strict=True))
            won = f"{first / (eager_s - compiled_s):.0f}" if compiled_s < eager_s else "never"
            rows = [
                ("RATIO compiled / eager", f"{median([b / a for a, b in times]):.3f}"),
                ("eager", f"{1e3 * eager_s:.0f} ms"),
                ("first step, with the compilation", f"{first:.1f} s"),
                ("steps that win it back", won),
            ]
            show(f"{title}, {dtype}, train step", rows)


if __name__ == "__main__":
    main()
