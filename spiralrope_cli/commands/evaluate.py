from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from spiralrope_cli.commands import completion
from spiralrope_cli.commands import options as o
from spiralrope_cli.commands import recipe_options as r
from spiralrope_cli.core.config.evals import BOTH_CROP_RATIOS, EvalOptions
from spiralrope_cli.core.config.nested import build
from spiralrope_cli.core.config.runs import MachineConfig
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.runtime.launch import is_first_process, launch

WHICH, OUTPUT = "Which weights", "Output"

EXAMPLES = """
Examples:

  spiralrope eval                              the newest run's last weights

  spiralrope eval --ema --crop-ratio           its EMA weights, ratios 0.875 and 1.0

  spiralrope eval runs/x --all                 best and last, both ratios, raw and EMA

  spiralrope eval deit-b --data ~/imagenet     published weights, fetched if need be

  spiralrope eval deit-b --data ~/imagenet --image-size 160 --image-size 224 --image-size 384

  spiralrope eval runs/x runs/y --json         several at once, for scripts
"""


class CropRatioCommand(TyperCommand):
    """A command whose `--crop-ratio` may stand without a value and then means both."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Puts the two values in where none is given."""
        return super().parse_args(ctx, with_both_ratios(args))


def with_both_ratios(words: list[str]) -> list[str]:
    """The words with both values after each `--crop-ratio` that no number follows."""
    filled: list[str] = []
    for place, word in enumerate(words):
        if word == "--":
            return filled + words[place:]
        following = words[place + 1] if place + 1 < len(words) else ""
        if word == "--crop-ratio" and not _is_number(following):
            filled += [f"{word}={ratio}" for ratio in BOTH_CROP_RATIOS]
        else:
            filled.append(word)
    return filled


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SOURCE",
        help="Run folders, checkpoint files or published names; by default the newest run.",
        show_default=False,
        autocompletion=completion.sources,
    ),
]
Ema = Annotated[
    bool | None,
    o.option("--ema/--no-ema", panel=WHICH, metavar=" ", text="Averaged weights, not the raw."),
]
Best = Annotated[
    bool,
    o.option("--best", panel=WHICH, metavar=" ", text="A run's best checkpoint, not its last."),
]
Every = Annotated[
    bool,
    o.option(
        "--all",
        panel=WHICH,
        metavar=" ",
        text="Eight rows: best and last, crop ratios 0.875 and 1.0, raw and EMA weights.",
    ),
]
Data = Annotated[
    str | None,
    o.option(
        "--data",
        panel=o.DATA,
        text="digits, fashion-mnist, or a folder with train/ and val/ of class folders. "
        "Without it: the run's own, else $SPIRALROPE_DATA, else digits.",
        metavar="NAME|FOLDER",
        autocompletion=completion.data_sets,
    ),
]
CropRatios = Annotated[
    list[float] | None,
    o.option(
        "--crop-ratio",
        panel=o.DATA,
        text="Resize to image size / this, then crop the centre; repeatable. Without a value: "
        "0.875 and 1.0.",
        metavar="[R]",
    ),
]
ImageSizes = Annotated[
    list[str] | None,
    o.option(
        "--image-size",
        panel=o.DATA,
        text="Side, or height x width, in pixels; repeatable. By default the weights' own.",
        metavar="N|HxW",
        callback=lambda sizes: [o.parse_size(size) for size in sizes or []],
    ),
]
AsJson = Annotated[bool, o.option("--json", panel=OUTPUT, metavar=" ", text="JSON on stdout.")]
AsCsv = Annotated[bool, o.option("--csv", panel=OUTPUT, metavar=" ", text="CSV on stdout.")]
Out = Annotated[
    Path | None,
    o.option(
        "--out",
        panel=OUTPUT,
        text="Folder of eval.json; by default the run's or the file's.",
        metavar="FOLDER",
    ),
]


def evaluate(
    context: typer.Context,
    sources: Sources = None,
    ema: Ema = None,
    best: Best = False,
    every: Every = False,
    data: Data = None,
    crop_ratio: CropRatios = None,
    image_size: ImageSizes = None,
    skip_bad: r.SkipBad = None,
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
    json: AsJson = False,
    csv: AsCsv = False,
    out: Out = None,
    nproc: o.Nproc = None,
    nnodes: o.Nnodes = None,
    rdzv_endpoint: o.RdzvEndpoint = None,
    device: o.Device = None,
    precision: o.Precision = None,
    compile: o.Compile = None,
    workers: o.Workers = None,
) -> None:
    """Measure acc@1, acc@5 and loss on the held-out images.

    Without options: the last weights of the newest classifier run, raw, at the crop ratio of its
    data set. Sizes and RoPE options are the source's; options here win, with a warning.

    The table goes to stdout, and into eval.json beside the weights with what produced it.
    """
    if json and csv:
        raise ConfigError("--json and --csv exclude each other", "leave one of them out")
    chosen = o.given(context)
    machine: MachineConfig = build(MachineConfig, chosen)
    if every:
        idle = [("--ema", ema is not None), ("--best", best), ("--crop-ratio", bool(crop_ratio))]
        if names := [name for name, there in idle if there]:
            say(f"note: {', '.join(names)} without effect: --all has all of those rows")
    options = EvalOptions(
        sources=tuple(sources or (newest(),)),
        ema=bool(ema),
        best=best,
        every=every,
        crop_ratios=tuple(dict.fromkeys(crop_ratio or ())),
        image_sizes=tuple(dict.fromkeys(image_size or ())),  # type: ignore[arg-type]
        data=data,
        rope=o.given_rope(context),
        out=str(out.expanduser()) if out else None,
        output="json" if json else "csv" if csv else "table",
    )
    check_words(options)
    from spiralrope_cli.core.jobs.eval_plan import plan

    run, notes = plan(options, machine, set(chosen))
    for note in notes:
        say(f"note: {note}")
    launch("spiralrope_cli.core.jobs.evaluate:run", run)


def say(line: str) -> None:
    """One line on stderr, from the process that speaks for all."""
    if is_first_process():
        typer.echo(line, err=True)


def newest() -> str:
    """The newest classifier run, which is told."""
    from spiralrope_cli.core.hub.source import newest_run

    run = newest_run()
    say(f"newest run: {run}")
    return str(run)


def check_words(options: EvalOptions) -> None:
    """Refuses what names nothing, before anything heavy is loaded."""
    from spiralrope_cli.core.config.datasets import find_held_out
    from spiralrope_cli.core.hub.source import find_source

    for given in options.sources:
        find_source(given, best=options.best)
    if options.data is not None:
        find_held_out(options.data)
