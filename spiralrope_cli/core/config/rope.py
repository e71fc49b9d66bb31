"""RoPE options of the user beside those of weights, recipes and config files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from spiralrope_cli.core.config.models import RopeConfig, rotate_misfit


def given_rope(given: dict[str, Any]) -> dict[str, Any]:
    """The RoPE options among the given ones (field name -> value), checked."""
    chosen = {name: given[name] for name in RopeConfig.__dataclass_fields__ if name in given}
    # These are valid or not depending on others, which may come from the weights.
    together = {"same_theta", "max_freq_lang", "min_freq_lang"}
    RopeConfig(**{name: value for name, value in chosen.items() if name not in together})
    check_rotate(chosen, chosen.get("rope_kind", RopeConfig.rope_kind))
    return chosen


def check_rotate(given: dict[str, Any], kind: str) -> None:
    """Raises if `rotate` is given for a kind that has no choice of directions."""
    if kind != "spiral" and given.get("rotate", 0) > 1:
        raise rotate_misfit(given["rotate"], kind)


def override_rope(trained: RopeConfig, given: dict[str, Any]) -> RopeConfig:
    """The RoPE options of weights with those of the user (field name -> value)."""
    kind = given.get("rope_kind", trained.rope_kind)
    check_rotate(given, kind)
    if {kind, trained.rope_kind} != {"spiral"}:
        given = {"rotate": RopeConfig.rotate, **given}  # that of the weights says nothing
    return replace(trained, **given)
