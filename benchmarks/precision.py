"""What does --precision auto gain over fp32? Train steps with Spiral RoPE, batch 8."""

from __future__ import annotations

from interleave import CPU, deit_step, dit_step, interleaved, median, prepare, ratio, show

from spiralrope_cli import create_model
from spiralrope_cli.core.runtime.device import pick_precision

BATCH, ROUNDS = 8, 9


def main() -> None:
    prepare()
    chosen, reason = pick_precision("auto", CPU)
    for arch, make in (("deit-s", deit_step), ("dit-s2", dit_step)):
        model = create_model(arch)
        sides = {"auto": make(model, chosen, BATCH), "fp32": make(model, "fp32", BATCH)}
        seconds = interleaved(sides, ROUNDS)
        rows = [(name, f"{BATCH / median(seconds[name]):.1f} images/s") for name in seconds]
        faster = 1 / ratio(seconds, "auto", "fp32")
        show(f"{arch}: auto is {chosen}: {reason}", [*rows, ("RATIO auto / fp32", f"{faster:.2f}")])


if __name__ == "__main__":
    main()
