"""Where a run is executed, and what a training command takes beside its config.

Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from spiralrope_cli.core.config.option import DATA, MACHINE, PATH, RUN, Opt, check_fields
from spiralrope_cli.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """Where and how a run is executed. Of these only `precision` changes its numbers."""

    nproc: Annotated[
        int, Opt("Processes here; by default one per GPU, one on CPU.", MACHINE, ge=0, free=True)
    ] = 0
    nnodes: Annotated[int, Opt("Machines.", MACHINE, ge=1, free=True)] = 1
    rdzv_endpoint: Annotated[
        str,
        Opt(
            "Where several machines meet.",
            MACHINE,
            metavar="HOST:PORT",
            pattern=r"(.+:\d+)?",
            expects="HOST:PORT",
            free=True,
        ),
    ] = ""
    device: Annotated[
        Literal["auto", "cpu", "cuda", "mps"],
        Opt("By default a GPU, else the CPU.", MACHINE, free=True),
    ] = "auto"
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], Opt("auto: bf16 where the device computes it.", MACHINE)
    ] = "auto"
    compile: Annotated[
        bool, Opt("Through torch.compile.", MACHINE, flag="--compile/--no-compile", free=True)
    ] = False
    grad_checkpointing: Annotated[
        bool, Opt("Less memory: compute activations twice.", MACHINE, free=True)
    ] = False
    workers: Annotated[
        int,
        Opt(
            "Loader processes per process, for image folders; -1: up to 4, by cores.",
            MACHINE,
            ge=-1,
            free=True,
        ),
    ] = -1
    skip_bad: Annotated[
        bool, Opt("Go on without unreadable images, and count them.", DATA, free=True)
    ] = False
    resume: Annotated[
        Literal["auto", "must", "never"],
        Opt(
            "Go on from the newest checkpoint if there is one, insist on it, or never.",
            RUN,
            free=True,
        ),
    ] = "auto"
    tracker: Annotated[
        Literal["none", "tensorboard", "wandb"], Opt("Log to this one too.", RUN, free=True)
    ] = "none"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.nnodes > 1 and not self.rdzv_endpoint:
            raise ConfigError(
                f"--nnodes is {self.nnodes} without --rdzv-endpoint",
                "name the first machine, such as --rdzv-endpoint host:29500",
            )


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What a training command takes beside its config."""

    name: Annotated[str, Opt("Word at the end of the run folder's name.", RUN)] = ""
    config: Annotated[
        str,
        Opt(
            "config.yaml of a run to repeat; options win over it.",
            RUN,
            **{**PATH, "metavar": "FILE"},
        ),
    ] = ""
    dry_run: Annotated[bool, Opt("Print the resolved plan and stop.", RUN)] = False
