from __future__ import annotations

from typing import Annotated, Any

import typer

from spiralrope_cli.commands import options as o
from spiralrope_cli.commands.options import DATA, MODEL, RUN, option
from spiralrope_cli.core.config.doctor import Checkup
from spiralrope_cli.core.config.nested import build
from spiralrope_cli.core.config.resolve import RUNS_FOLDER
from spiralrope_cli.core.config.runs import MachineConfig

SHOW = "What to show"

EXAMPLES = """
Examples:

  spiralrope doctor                              this machine and the digits

  spiralrope doctor --data ~/imagenet --arch deit-b --nproc 8

  spiralrope doctor --arch dit-xl2 --data ~/imagenet --num 50000

  spiralrope doctor --offline --json             for scripts
"""


def doctor(
    context: typer.Context,
    arch: Annotated[
        str | None,
        option(
            "--arch",
            panel=MODEL,
            text="A deit-... or dit-... whose needs are looked at; by default the data set's.",
            metavar="NAME",
        ),
    ] = None,
    data: Annotated[
        str | None,
        option(
            "--data",
            panel=DATA,
            text="Built-in name or folder; by default SPIRALROPE_DATA, else digits.",
            metavar="NAME|FOLDER",
        ),
    ] = None,
    runs: Annotated[
        str,
        option("--runs", panel=RUN, text="Folder of the run folders; runs.", metavar="FOLDER"),
    ] = RUNS_FOLDER,
    num: Annotated[
        int,
        option("--num", panel=RUN, text="Images of dit-sample; 50000, or 200 of a built-in set."),
    ] = 0,
    batch_size: o.BatchSize = None,
    micro_batch_size: o.MicroBatchSize = None,
    nproc: o.Nproc = None,
    device: o.Device = None,
    precision: o.Precision = None,
    offline: Annotated[
        bool, option("--offline", panel=SHOW, metavar=" ", text="Do not ask the Hub.")
    ] = False,
    json: Annotated[
        bool, option("--json", panel=SHOW, metavar=" ", text="JSON on stdout, nothing else.")
    ] = False,
) -> None:
    """Look at this machine: versions, devices, data, disk, Hub, cache, and what a run would need.

    Exit code 0: all is well. 1: something was found that would make a run fail.

    A Hub that does not answer is told, and is no failure.
    """
    chosen = o.given(context)
    wanted = ("arch", "data", "batch_size", "micro_batch_size", "nproc", "device", "precision")
    options: dict[str, Any] = {name: chosen[name] for name in wanted if name in chosen}
    checkup = Checkup(
        options=options,
        runs=runs,
        num=num,
        offline=offline,
        as_json=json,
        machine=build(MachineConfig, options),
    )
    from spiralrope_cli.core.jobs.doctor import run

    if not run(checkup):
        raise typer.Exit(1)
