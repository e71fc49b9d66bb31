"""What `doctor` inspects. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from spiralrope_cli.core.config.models import deit_size, dit_size, is_dit
from spiralrope_cli.core.config.option import (
    DATA,
    MODEL,
    PATH,
    RUN,
    SHOW,
    Opt,
    check_fields,
)
from spiralrope_cli.core.config.resolve import RUNS_FOLDER
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Checkup:
    """What is inspected on this machine, with one kind of run in mind."""

    arch: Annotated[
        str,
        Opt(
            "Architecture to check, a deit-... or dit-...; by default the data set's.",
            MODEL,
            metavar="NAME",
            complete="archs",
        ),
    ] = ""
    data: Annotated[
        str,
        Opt(
            "Built-in name or folder; by default SPIRALROPE_DATA, else digits.",
            DATA,
            metavar="NAME|FOLDER",
            complete="data_sets",
        ),
    ] = ""
    runs: Annotated[str, Opt("Folder of the run folders.", RUN, **PATH)] = RUNS_FOLDER
    num_samples: Annotated[
        int,
        Opt("Images of dit-sample; 50000, or 200 of a built-in set.", RUN, ge=0, was="--num"),
    ] = 0
    batch_size: Annotated[int | None, Opt("Total images per optimizer step.", RUN, ge=1)] = None
    micro_batch_size: Annotated[
        int | None, Opt("Images per process and pass; gradients accumulate.", RUN, ge=1)
    ] = None
    offline: Annotated[bool, Opt("Do not contact the Hub.", SHOW)] = False
    as_json: Annotated[bool, Opt("JSON on stdout, nothing else.", SHOW, flag="--json")] = False
    options: dict[str, Any] = field(default_factory=dict)  # those of a training command, as given
    machine: MachineConfig = field(default_factory=MachineConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_samples and not self.dit:
            raise ConfigError(
                f"--num-samples {self.num_samples} has no effect: it is the number of images "
                "that a DiT draws",
                "name it by --arch, or leave --num-samples out",
            )
        if self.arch:
            dit_size(self.arch) if self.dit else deit_size(self.arch)

    @property
    def dit(self) -> bool:
        """Whether the run in mind is that of a diffusion transformer."""
        return is_dit(self.arch)
