"""What a recipe gives, fitted to a small set of images or a short run. Standard library only.

Values of the user, and those that work, stay as they are.
"""

from __future__ import annotations

from typing import Any

from spiralrope_cli.core.config.option import leaves
from spiralrope_cli.core.config.training import LINEAR_RULE_BATCH, OptimConfig

FITTED = "fit"
"""Origin of a fitted value."""
STEPS_PER_EPOCH, SMALLEST_BATCH = 4, 8
"""A fitted batch leaves an epoch so many steps, unless it would be smaller than that."""
MIX_GROUP = 8
"""Images that share one mixup or cutmix draw; fixed, so that it is the same for any split."""


def fit_to_run(values: dict[str, Any], sources: dict[str, str]) -> list[str]:
    """Fits batch, rate and warm-up of the recipe, in place; one note for each."""
    notes: list[str] = []
    known = leaves(OptimConfig)

    def of_recipe(*names: str) -> bool:
        return all(sources[name] in ("recipe", "data set") for name in names)

    def fit(name: str, value: Any, why: str) -> None:
        notes.append(f"{known[name].called} {value}, not the recipe's {values[name]}: {why}")
        values[name], sources[name] = value, FITTED

    num_train = values["num_train"]
    if of_recipe("batch_size") and values["batch_size"] > num_train > 0:
        batch = fitted_batch(num_train)
        fit("batch_size", batch, f"the set has {num_train} images")
        if of_recipe("lr", "lr_rule") and batch < LINEAR_RULE_BATCH and values["lr_rule"] != "none":
            fit("lr_rule", "none", f"a batch of {batch} would leave little of --lr")
    batch, nproc = max(values["batch_size"], 1), max(values.get("nproc", 0), 1)
    if of_recipe("micro_batch_size") and batch % nproc == 0:
        micro, mine = values["micro_batch_size"], batch // nproc
        unit = MIX_GROUP if values.get("mixup") or values.get("cutmix") else 1
        divisors = [n for n in range(unit, min(micro, mine) + 1, unit) if mine % n == 0]
        if mine > micro and mine % micro and divisors and 4 * divisors[-1] >= micro:
            fit("micro_batch_size", divisors[-1], f"it divides {mine} images")
    if of_recipe("warmup_epochs"):
        per_epoch, warmup = max(num_train // batch, 1), values["warmup_epochs"]
        total = values["max_steps"] or values["epochs"] * per_epoch
        shorter = min(warmup, total // (4 * per_epoch))
        too_long = values["schedule"] != "constant" and total <= warmup * per_epoch
        if shorter < warmup and too_long:
            fit("warmup_epochs", shorter, f"the run has {total} steps, {per_epoch} per epoch")
        elif values["max_steps"]:
            values["warmup_epochs"] = shorter
    return notes


def fitted_batch(num_train: int) -> int:
    """The largest power of two that leaves an epoch several steps, where there is one."""
    wanted = max(num_train // STEPS_PER_EPOCH, min(SMALLEST_BATCH, num_train))
    return 1 << (wanted.bit_length() - 1)
