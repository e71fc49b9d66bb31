from __future__ import annotations

from typing import Annotated

import typer

from spiralrope_cli.commands.options import choice, option
from spiralrope_cli.core.config.checks import one_of
from spiralrope_cli.core.config.plots import FORMATS, OVER, target

PICTURE = "Picture"

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Draw runs, what a Spiral RoPE does, attention maps, or generated images.",
)

OutFile = Annotated[
    str | None,
    option("--out", panel=PICTURE, text="A .png or .svg; by default below plots/.", metavar="FILE"),
]
Format = Annotated[
    str | None,
    option("--format", panel=PICTURE, **choice("Where --out is not given.", FORMATS)),
]

RUN_EXAMPLES = """
Examples:

  spiralrope plot run runs/pretrain-deit-ti-digits-r2

  spiralrope plot run pretrain-deit-ti-digits-r1 pretrain-deit-ti-digits-r2    compared

  spiralrope plot run runs/* --over epoch --out all.svg
"""


@app.command("run", epilog=RUN_EXAMPLES)
def plot_run(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN", help="Run folders, or their names.", show_default=False),
    ],
    over: Annotated[str, option("--over", panel=PICTURE, **choice("Below the curves.", OVER))] = (
        OVER[0]
    ),
    out: OutFile = None,
    format: Format = None,
) -> None:
    """Loss, accuracy or variational bound, learning rate and speed of training runs.

    Several runs share the panels. Prints the path of the picture.
    """
    from spiralrope_cli.core.runtime.run_folder import find_run

    one_of("over", over, OVER)
    folders = list(dict.fromkeys(find_run(given) for given in runs))
    more = f"-and-{len(folders) - 1}-more" if len(folders) > 1 else ""
    path = target(out, format, f"run-{folders[0].resolve().name}{more}")

    from spiralrope_cli.core.jobs import plot as job

    job.draw_curves(folders, path, over)
    typer.echo(path)
