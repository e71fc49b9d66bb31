"""What does Spiral RoPE cost in a bf16 train step? DeiT-S at 224 px, DiT-S/2 on 32x32 latents."""

from __future__ import annotations

from interleave import deit_step, dit_step, interleaved, median, prepare, ratio, show

from spiralrope_cli import RopeConfig, create_model

BATCH, ROUNDS = 8, 25


def main() -> None:
    prepare()
    for arch, make in (("deit-s", deit_step), ("dit-s2", dit_step)):
        sides = {
            name: make(create_model(arch, rope=RopeConfig(enabled=on)), "bf16", BATCH)
            for name, on in (("on", True), ("off", False))
        }
        seconds = interleaved(sides, ROUNDS)
        rows = [
            (f"RoPE {name}", f"{1e3 * median(seconds[name]):.0f} ms per step") for name in sides
        ]
        rows.append(("RATIO on / off", f"{ratio(seconds, 'on', 'off'):.3f}"))
        show(f"{arch}, train step, batch {BATCH}, bf16, RoPE on : off", rows)


if __name__ == "__main__":
    main()
