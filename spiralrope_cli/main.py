"""The command line: registers the commands, and is the one place that turns errors into words."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

from spiralrope_cli.commands import (
    dit_encode,
    dit_sample,
    dit_train,
    doctor,
    evaluate,
    export,
    fetch,
    fid,
    finetune,
    plot,
    pretrain,
    run,
)
from spiralrope_cli.core.errors import SpiralRopeError, UnreadableImageError, refused_path
from spiralrope_cli.core.runtime.launch import (
    is_first_process,
    joined_world_size,
    leave_at_once,
    share_the_machine,
)
from spiralrope_cli.version import __version__

DEBUG_VARIABLE = "SPIRALROPE_DEBUG"

app = typer.Typer(
    name="spiralrope",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("pretrain", epilog=pretrain.EXAMPLES)(pretrain.pretrain)
app.command("finetune", epilog=finetune.EXAMPLES)(finetune.finetune)
app.command("eval", cls=evaluate.CropRatioCommand, epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.add_typer(run.app, name="run")
app.command("dit-train", epilog=dit_train.EXAMPLES)(dit_train.dit_train)
app.command("dit-encode", epilog=dit_encode.EXAMPLES)(dit_encode.dit_encode)
app.command("dit-sample", epilog=dit_sample.EXAMPLES)(dit_sample.dit_sample)
app.command("fetch", epilog=fetch.EXAMPLES)(fetch.fetch)
app.command("export", epilog=export.EXAMPLES)(export.export)
app.command("fid", epilog=fid.EXAMPLES)(fid.fid)
app.add_typer(plot.app, name="plot")
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"spiralrope {__version__}")
        raise typer.Exit


@app.callback()
def spiralrope(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Vision transformers with Spiral RoPE: rotary position embedding in many directions.

    COMMAND --help shows its options and examples.
    """


def main() -> None:
    """Entry point of the console script."""
    share_the_machine()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # else it is closed, or a test's
            stream.reconfigure(errors="replace")  # figures are not lost for want of a letter
    try:
        app(prog_name="spiralrope")
        return
    except (SpiralRopeError, OSError) as caught:
        error = refused_path(caught) if isinstance(caught, OSError) else caught
        if error is None or os.environ.get(DEBUG_VARIABLE):
            raise
        # Under torchrun or srun all processes meet the same error, but for a damaged image.
        if is_first_process() or isinstance(error, UnreadableImageError):
            typer.echo(f"error: {error.message}", err=True)
            if error.hint:
                typer.echo(f"  {error.hint}", err=True)
        code = error.exit_code
        del error
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        code = 130
    if joined_world_size() is not None:
        leave_at_once(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
