"""Checks of single values, told by the option that sets them. Standard library only."""

from __future__ import annotations

import math

from spiralrope_cli.core.errors import ConfigError


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuses a word that is not allowed."""
    if value not in allowed:
        raise ConfigError(f"{_option(name)} is {value}; it must be {' or '.join(allowed)}")


def at_least(name: str, value: float, lowest: float) -> None:
    """Refuses a number below the lowest, an infinite one, and none at all."""
    if not lowest <= value < math.inf:
        finite = ", and finite" if value == math.inf else ""
        raise ConfigError(f"{_option(name)} is {value}; it must be {lowest} or more{finite}")


def in_range(name: str, value: float, low: float, high: float, closed: bool = False) -> None:
    """Refuses a number outside [low, high), or outside [low, high] if closed."""
    if not (low <= value < high or (closed and value == high)):
        end = "]" if closed else ")"
        raise ConfigError(f"{_option(name)} is {value}; it must be in [{low}, {high}{end}")


def share(name: str, value: float) -> None:
    """Refuses a number outside (0, 1]."""
    if not 0 < value <= 1:
        raise ConfigError(f"{_option(name)} is {value}; it must be in (0, 1]")
