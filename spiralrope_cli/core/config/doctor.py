"""What `doctor` looks at. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from spiralrope_cli.core.config.checks import at_least
from spiralrope_cli.core.config.models import deit_size, dit_size, is_dit
from spiralrope_cli.core.config.runs import MachineConfig
from spiralrope_cli.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Checkup:
    """A look at this machine, with one kind of run in mind.

    Attributes:
        options: field name -> value, the given options of a training command: `arch`, `data`,
            `batch_size` and so on.
        runs: folder of the run folders.
        num: images that `dit-sample` would draw, 0 for its default.
        offline: asks nobody outside this machine.
        as_json: JSON in place of a table.
        machine: device and precision.
    """

    options: dict[str, Any] = field(default_factory=dict)
    runs: str
    num: int = 0
    offline: bool = False
    as_json: bool = False
    machine: MachineConfig = field(default_factory=MachineConfig)

    def __post_init__(self) -> None:
        at_least("num", self.num, 0)
        for name in ("batch_size", "micro_batch_size"):
            at_least(name, self.options.get(name, 1), 1)
        if self.num and not self.dit:
            raise ConfigError(
                f"--num {self.num} has no effect: it counts the images that a DiT draws",
                "name it by --arch, or leave --num out",
            )
        if arch := self.options.get("arch"):
            dit_size(arch) if self.dit else deit_size(arch)

    @property
    def dit(self) -> bool:
        """Whether the run in mind is that of a diffusion transformer."""
        return is_dit(self.options.get("arch", ""))


@dataclass(frozen=True)
class Finding:
    """Something that will fail, or hurt, and what to do about it.

    Attributes:
        subject: which part of the check-up found it.
        problem: in one line.
        hint: what to do, may be empty.
    """

    subject: str
    problem: str
    hint: str = ""
