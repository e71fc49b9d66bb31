from __future__ import annotations

from typing import Any

import typer

from spiralrope_cli.commands.command import SETTINGS, command
from spiralrope_cli.core.config.models import BY_WEIGHTS, RopeConfig
from spiralrope_cli.core.config.plots import AttentionPlot, RopePlot, RunPlot, SamplesPlot

plot = typer.Typer(
    no_args_is_help=True,
    help="Plot training curves, Spiral RoPE, attention maps, or images.",
    **SETTINGS,
)


@command(RunPlot, group=plot)
def run(given: dict[str, Any]) -> None:
    """Plot loss, accuracy or variational bound, learning rate and speed of training runs.

    Several runs are drawn in the same panels. Prints the path of the figure.

    Examples:
      spiralrope plot run runs/pretrain-deit-ti-digits-r2
      spiralrope plot run pretrain-deit-ti-digits-r1 pretrain-deit-ti-digits-r2
      spiralrope plot run runs/pretrain-* --over epoch --out all.svg
    """
    from spiralrope_cli.core.jobs.plot import draw_run

    draw_run(given)


@command(
    RopePlot,
    RopeConfig,
    leave_out=("enabled", "rotate"),
    defaults={"panels": ""},
    group=plot,
)
def rope(given: dict[str, Any]) -> None:
    """Plot Spiral RoPE: directions, frequencies, clamped positions, attention scores.

    With --rope-kind mixed: the learned frequencies of one layer.

    Prints the path of the figure.

    Examples:
      spiralrope plot rope                                 four directions
      spiralrope plot rope --rotate 1 --rotate 2 --rotate 4   compare three
      spiralrope plot rope --rotate 4 --show score --grid 28 --format svg
      spiralrope plot rope --arch dit-xl2 --rotate 2 --truncate-percentage 0.25
      spiralrope plot rope --grid 7x28 --projection exact
      spiralrope plot rope runs/birds --layer 3            of its weights
    """
    from spiralrope_cli.core.jobs.plot import draw_rope

    draw_rope(given)


@command(AttentionPlot, RopeConfig, defaults=BY_WEIGHTS, group=plot)
def attention(given: dict[str, Any]) -> None:
    """Plot attention maps of a DeiT over an image: one map per head, for one query token.

    The colours of each map range from 0 to its maximum, which is in the title. Prints the path of
    the figure.

    Examples:
      spiralrope plot attention deit-b photo.jpg            of the class token
      spiralrope plot attention deit-b photo.jpg --patch 7,3 --layer 0 --layer 11
      spiralrope plot attention runs/birds photo.jpg --head 2 --ema
    """
    from spiralrope_cli.core.jobs.plot import draw_attention

    draw_attention(given)


@command(SamplesPlot, group=plot)
def samples(given: dict[str, Any]) -> None:
    """Plot a grid of images, with their classes if known.

    Prints the path of the figure.

    Examples:
      spiralrope plot samples runs/dit-sample-dit-xl2-ddpm250
      spiralrope plot samples samples.npz --num-samples 32 --columns 8
      spiralrope plot samples ~/imagenet/val --num-samples 100 --out val.svg
    """
    from spiralrope_cli.core.jobs.plot import draw_grid

    draw_grid(given)
