"""What does Spiral RoPE cost in a train step? DeiT-S, 224 px, batch 8, bf16, RoPE on : off."""

from __future__ import annotations

from interleave import interleaved, median, prepare, ratio, show, train_step

from spiralrope_cli import RopeConfig, create_model

BATCH, ROUNDS = 8, 25


def main() -> None:
    prepare()
    sides = {
        name: train_step(create_model("deit-s", rope=RopeConfig(enabled=on)), "bf16", BATCH)
        for name, on in (("on", True), ("off", False))
    }
    seconds = interleaved(sides, ROUNDS)
    rows = [(f"RoPE {name}", f"{1e3 * median(seconds[name]):.0f} ms per step") for name in seconds]
    show(__doc__ or "", [*rows, ("RATIO on / off", f"{ratio(seconds, 'on', 'off'):.3f}")])


if __name__ == "__main__":
    main()
