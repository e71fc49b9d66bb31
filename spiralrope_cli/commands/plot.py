from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spiralrope_cli.commands import completion
from spiralrope_cli.commands import options as o
from spiralrope_cli.commands.options import choice, option
from spiralrope_cli.core.config.checks import one_of
from spiralrope_cli.core.config.nested import build
from spiralrope_cli.core.config.plots import (
    FORMATS,
    OVER,
    ROPE_PANELS,
    AttentionPlot,
    RopePlot,
    SamplesPlot,
    notes,
    published_sizes,
    target,
)
from spiralrope_cli.core.config.rope import RopeConfig
from spiralrope_cli.core.errors import ConfigError

WHAT, PICTURE = "What to look at", "Picture"

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

  spiralrope plot run runs/pretrain-* --over epoch --out all.svg
"""


@app.command("run", epilog=RUN_EXAMPLES)
def plot_run(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN",
            help="Run folders, or their names.",
            show_default=False,
            autocompletion=completion.training_runs,
        ),
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
    from spiralrope_cli.core.runtime.report import METRICS_FILE
    from spiralrope_cli.core.runtime.run_folder import find_run

    one_of("over", over, OVER)
    named = list(dict.fromkeys(find_run(given) for given in runs))
    folders = [folder for folder in named if (folder / METRICS_FILE).is_file()] or named
    for folder in named:
        if folder not in folders:
            typer.echo(f"note: {folder} is left out: it has no {METRICS_FILE}", err=True)
    more = f"-and-{len(folders) - 1}-more" if len(folders) > 1 else ""
    path = target(out, format, f"run-{folders[0].resolve().name}{more}")

    from spiralrope_cli.core.jobs import plot as job

    job.draw_curves(folders, path, over)
    typer.echo(path)


ROPE_EXAMPLES = """
Examples:

  spiralrope plot rope                                          two times two directions

  spiralrope plot rope --rotate 1 --rotate 2 --rotate 4         compared

  spiralrope plot rope --rotate 4 --show score --grid 28 --format svg

  spiralrope plot rope --arch dit-xl2 --rotate 2 --truncate-percentage 0.25

  spiralrope plot rope --grid 7x28 --projection exact
"""


@app.command("rope", epilog=ROPE_EXAMPLES)
def plot_rope(
    context: typer.Context,
    rotates: Annotated[
        list[int] | None,
        option(
            "--rotate",
            panel=o.ROPE,
            text="Half the number of directions; repeat it to compare.",
            metavar="N",
        ),
    ] = None,
    theta: o.Theta = None,
    freqs_for: o.FreqsFor = None,
    max_freq: o.MaxFreq = None,
    truncate_percentage: o.TruncatePercentage = None,
    max_freq_lang: o.MaxFreqLang = None,
    min_freq_lang: o.MinFreqLang = None,
    same_theta: o.SameTheta = None,
    projection: o.Projection = None,
    scaling: o.Scaling = None,
    arch: Annotated[
        str,
        option(
            "--arch",
            panel=o.MODEL,
            text="Whose heads and grid; deit-s, dit-xl2, ...",
            autocompletion=completion.archs,
        ),
    ] = "deit-s",
    head_dim: Annotated[
        int | None, option("--head-dim", panel=o.MODEL, text="Channels per head; or by --arch.")
    ] = None,
    grid: Annotated[
        str | None,
        option(
            "--grid",
            panel=o.MODEL,
            text="Patches, a side or rows x columns; or by --arch.",
            metavar="N|HxW",
            callback=o.parse_size,
        ),
    ] = None,
    pretrain_grid: Annotated[
        str | None,
        option(
            "--pretrain-grid",
            panel=o.MODEL,
            text="Patches that the model was trained at; by default --grid.",
            metavar="N|HxW",
            callback=o.parse_size,
        ),
    ] = None,
    show: Annotated[
        list[str] | None,
        option("--show", panel=PICTURE, **choice("Panels, repeatable; all.", ROPE_PANELS)),
    ] = None,
    out: OutFile = None,
    format: Format = None,
) -> None:
    """What a Spiral RoPE does: directions, frequencies, the clamp's reach, scores.

    Prints the path of the picture.
    """
    chosen = o.given_rope(context)
    ropes = tuple(RopeConfig(rotate=each, **chosen) for each in dict.fromkeys(rotates or ())) or (
        RopeConfig(**chosen),
    )
    of_arch, side = published_sizes(arch)
    sides = (side, side)
    plot = RopePlot(
        ropes=ropes,
        head_dim=of_arch if head_dim is None else head_dim,
        grid=grid or sides,  # type: ignore[arg-type]
        pretrain_grid=pretrain_grid or grid or sides,  # type: ignore[arg-type]
        panels=tuple(dict.fromkeys(show or ROPE_PANELS)),
    )
    words = "-".join(f"r{rope.rotate}" for rope in ropes)
    path = target(out, format, f"rope-{words}")
    for note in notes(plot, set(chosen)):
        typer.echo(f"note: {note}", err=True)

    from spiralrope_cli.core.jobs import plot as job

    job.draw_rope(plot, path)
    typer.echo(path)


ATTENTION_EXAMPLES = """
Examples:

  spiralrope plot attention deit-b photo.jpg                    the class token, last layer

  spiralrope plot attention deit-b photo.jpg --patch 7,3 --layer 0 --layer 5 --layer 11

  spiralrope plot attention runs/pretrain-deit-s-birds-r4 photo.jpg --head 2 --ema
"""


@app.command("attention", epilog=ATTENTION_EXAMPLES)
def plot_attention(
    context: typer.Context,
    source: o.SourceArgument,
    image: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE",
            help="A picture's file.",
            show_default=False,
            autocompletion=completion.paths,
        ),
    ],
    patch: Annotated[
        str | None,
        option(
            "--patch",
            panel=WHAT,
            text="Patch that looks, counted from 0; by default the class token.",
            metavar="ROW,COL",
            callback=o.pair_parser("ROW,COL, as 7,3"),
        ),
    ] = None,
    layer: Annotated[
        list[int] | None,
        option("--layer", panel=WHAT, text="From 0, repeatable; by default the last.", metavar="N"),
    ] = None,
    head: Annotated[
        list[int] | None,
        option("--head", panel=WHAT, text="From 0, repeatable; by default all.", metavar="N"),
    ] = None,
    ema: Annotated[
        bool, option("--ema", panel=WHAT, metavar=" ", text="Averaged weights, not raw ones.")
    ] = False,
    best: Annotated[
        bool, option("--best", panel=WHAT, metavar=" ", text="A run's best checkpoint.")
    ] = False,
    image_size: Annotated[
        str | None,
        option(
            "--image-size",
            panel=WHAT,
            text="Side, or height x width, in pixels; by default as trained.",
            metavar="N|HxW",
            callback=o.parse_size,
        ),
    ] = None,
    rope: o.Rope = None,
    rotate: o.Rotate = None,
    theta: o.Theta = None,
    freqs_for: o.FreqsFor = None,
    max_freq: o.MaxFreq = None,
    truncate_percentage: o.TruncatePercentage = None,
    max_freq_lang: o.MaxFreqLang = None,
    min_freq_lang: o.MinFreqLang = None,
    same_theta: o.SameTheta = None,
    projection: o.Projection = None,
    scaling: o.Scaling = None,
    out: OutFile = None,
    format: Format = None,
) -> None:
    """Where a DeiT's class token, or a patch, looks in a picture: a map for each head.

    Brightness goes up to the largest value of each map, which is written above it.
    """
    from spiralrope_cli.core.hub.source import find_source

    plot = AttentionPlot(
        source=source,
        image=image,
        ema=ema,
        rope=o.given_rope(context),
        image_size=image_size,  # type: ignore[arg-type]
        patch=patch,  # type: ignore[arg-type]
        layers=tuple(dict.fromkeys(layer or ())),
        heads=tuple(dict.fromkeys(head or ())),
    )
    path = target(out, format, f"attention-{Path(source).resolve().stem}-{Path(image).stem}")
    if path.resolve() == Path(image).resolve():
        raise ConfigError(f"--out {out} is IMAGE itself", "name another file")
    found = find_source(source, best=best)

    from spiralrope_cli.core.jobs.plot_attention import draw_attention

    draw_attention(found, plot, path)
    typer.echo(path)


SAMPLES_EXAMPLES = """
Examples:

  spiralrope plot samples runs/dit-sample-dit-xl2-ddpm250

  spiralrope plot samples samples.npz --num 32 --columns 8

  spiralrope plot samples ~/imagenet/val --num 100 --out val.svg
"""


@app.command("samples", epilog=SAMPLES_EXAMPLES)
def plot_samples(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder of dit-sample, .npz of images, or folder of images.",
            show_default=False,
            autocompletion=completion.paths,
        ),
    ],
    num: Annotated[
        int | None, option("--num", panel=PICTURE, text="The first so many images; 64.")
    ] = None,
    columns: Annotated[
        int | None, option("--columns", panel=PICTURE, text="Images per row; by default a square.")
    ] = None,
    labels: Annotated[
        bool | None,
        option(
            "--labels/--no-labels",
            panel=PICTURE,
            metavar=" ",
            text="Classes below the images, where they are known.",
        ),
    ] = None,
    out: OutFile = None,
    format: Format = None,
) -> None:
    """A grid of generated images, or of any others, with their classes where known."""
    given = {"num": num, "columns": columns, "labels": labels}
    chosen = {name: value for name, value in given.items() if value is not None}
    plot: SamplesPlot = build(SamplesPlot, {"source": source, **chosen})
    path = target(out, format, f"samples-{Path(source).resolve().stem}")

    from spiralrope_cli.core.jobs.plot_samples import draw_samples

    draw_samples(plot, path)
    typer.echo(path)
