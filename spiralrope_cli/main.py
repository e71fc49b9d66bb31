"""The command line: registers the commands, and prints errors. Nothing else does the latter."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated, Any

import typer

from spiralrope_cli import __version__
from spiralrope_cli.commands.command import commands
from spiralrope_cli.core.errors import (
    ConfigError,
    SpiralRopeError,
    UnreadableImageError,
    system_error,
)
from spiralrope_cli.core.runtime.launch import (
    is_first_process,
    joined_world_size,
    leave_at_once,
    share_the_machine,
)

DEBUG_VARIABLE = "SPIRALROPE_DEBUG"

USAGE_ERROR: Any = typer.BadParameter.__base__
"""What Typer raises for a wrong command line; it has no public name."""

COMMANDS = {
    "pretrain": "Train a DeiT with Spiral RoPE from scratch.",
    "finetune": "Finetune a DeiT from a run, a checkpoint file or published weights.",
    "eval": "Evaluate acc@1, acc@5 and loss on the validation images.",
    "predict": "Predict the classes of your own images with a DeiT.",
    "run": "Run a whole pipeline in one folder: training, evaluation or sampling, report.",
    "dit-train": "Train a class-conditional DiT (diffusion transformer) with Spiral RoPE.",
    "dit-encode": "Encode images with a VAE once, to train a DiT from cached latents.",
    "dit-sample": "Sample images from a DiT: a run, a checkpoint file or published weights.",
    "fetch": "Download published weights, VAEs, Inception weights, reference batches or CIFAR-100.",
    "export": "Export weights to share: as a folder, as one file, or onto the Hugging Face Hub.",
    "fid": "Compute FID, sFID, Inception Score, KID, Precision and Recall of images.",
    "plot": "Plot training curves, Spiral RoPE, attention maps, or images.",
    "doctor": "Check this machine, and what a run needs.",
}
"""Name of a command -> the first line of its help."""

app = commands(COMMANDS, name="spiralrope", add_completion=True)


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

    spiralrope COMMAND --help shows options and examples.
    """


def _run() -> int:
    """Runs the command, and returns the exit code."""
    try:
        return app(prog_name="spiralrope", standalone_mode=False) or 0
    except USAGE_ERROR as wrong:
        if not (said := wrong.format_message()):
            return int(wrong.exit_code)  # the help was printed instead
        hint = f"see {wrong.ctx.command_path} -h" if wrong.ctx else ""
        raise ConfigError(said[0].lower() + said[1:].rstrip("."), hint) from None


def main() -> None:
    """Runs the command line; `__main__.py` calls it."""
    share_the_machine()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # else it is closed, or a test's
            # Print "?" for a letter that the encoding lacks: do not lose the metrics.
            stream.reconfigure(errors="replace")
    try:
        code = _run()
    except Exception as caught:
        error = caught if isinstance(caught, SpiralRopeError) else system_error(caught)
        if error is None or os.environ.get(DEBUG_VARIABLE):
            raise
        # Under torchrun or srun every process raises the same error, so the first one prints it.
        # A damaged image is the exception: only the process that reads it raises.
        if is_first_process() or isinstance(error, UnreadableImageError):
            typer.echo(f"error: {error.message}", err=True)
            if error.hint:
                typer.echo(f"  {error.hint}", err=True)
        code = error.exit_code
        del error
    if code and joined_world_size() is not None:
        leave_at_once(code)
    sys.exit(code)
