"""Notes of a plan on settings that work but are probably not intended. Torch is imported late."""

from __future__ import annotations

import math

from spiralrope_cli.core.config.dit_runs import DiTRun, TrainingRun
from spiralrope_cli.core.config.folders import numbering_note
from spiralrope_cli.core.config.training import MOST_OF_FIRST

CLAMP_HINT_FRACTION = 0.15
LITTLE_OF_FIRST = 0.01
SMALL_CHANGE = 0.1
"""Change of a query against axial RoPE below which results can hardly differ."""
MOST_PATCHES = 1 << 18
"""Patches up to which the notes of a plan look at the position of each."""


def hints(run: TrainingRun) -> list[str]:
    """Notes on settings that work but are probably not intended."""
    rope, optim = run.rope, run.optim
    messages = numbering_note(run.class_names)
    if optim.schedule == "cosine" and optim.peak_lr < optim.min_lr:
        messages.append(
            f"the learning rate rises to the end: its peak of {optim.peak_lr:g} is below --min-lr "
            f"{optim.min_lr:g}; try a higher --lr, or --lr-rule none"
        )
    fraction = 0.0 if optim.ema_warmup else optim.ema_decay**run.total_steps
    if fraction > MOST_OF_FIRST:
        messages.append(
            f"{fraction:.0%} of the EMA weights will still be the first ones: {run.total_steps} "
            f"steps are few for --ema-decay {optim.ema_decay:g}; at "
            f"{LITTLE_OF_FIRST ** (1 / run.total_steps):.4g} it would be {LITTLE_OF_FIRST:.0%}, "
            "and with --ema-warmup 0%"
        )
    if isinstance(run, DiTRun) and run.model.class_dropout_prob == 0:
        messages.append(
            "--class-dropout-prob 0 trains no null label: dit-sample then refuses --cfg-scale"
        )
    if rope.enabled and rope.rotate > (most := max(run.head_dim // 8, 1)):
        messages.append(
            f"--rotate {rope.rotate}: heads of {run.head_dim} channels support at most {most}; "
            "with more, some directions have too few channels, or none"
        )
    if rope.enabled and rope.rotate > 1 and math.prod(run.grid) <= MOST_PATCHES:
        from spiralrope_cli.core.rope import change_from_axial, clamped_fraction

        fraction = clamped_fraction(run.grid, rope, run.head_dim)
        if rope.projection != "exact" and fraction >= CLAMP_HINT_FRACTION:
            messages.append(
                f"{fraction:.0%} of the positions are clamped; --projection exact clamps none"
            )
        change = change_from_axial(run.grid, run.head_dim, rope, run.model.pretrain_grid)
        if change < SMALL_CHANGE:
            rows, columns = run.grid
            messages.append(
                f"on {rows}x{columns} patches and heads of {run.head_dim} channels, rotate "
                f"{rope.rotate} changes queries by {change:.1%} against axial RoPE: such runs "
                "hardly differ"
            )
    return messages
