from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spiralrope_cli.commands import options as o
from spiralrope_cli.core.config.checks import one_of
from spiralrope_cli.core.errors import ConfigError

LAYOUTS = ("published", "safetensors")
FILE_SUFFIXES = (".pth", ".pt")
WHAT = "What to write"

EXAMPLES = """
Examples:

  spiralrope export runs/pretrain-deit-s-digits-r2 --layout published

  spiralrope export runs/pretrain-deit-s-digits-r2 --layout safetensors --ema --best

  spiralrope export deit-b --layout safetensors --out weights/deit-b

  spiralrope export old.pth --layout published --rotate 4 --out with-options.pth
"""

Layout = Annotated[
    str,
    o.option(
        "--layout",
        panel=WHAT,
        **o.choice("A file as the published ones, or a folder with a model card.", LAYOUTS),
    ),
]
Ema = Annotated[
    bool | None,
    o.option(
        "--ema/--no-ema",
        panel=WHAT,
        metavar=" ",
        text="Averaged or raw weights alone. Without: raw ones, and both in a published file.",
    ),
]
Best = Annotated[
    bool,
    o.option("--best", panel=WHAT, metavar=" ", text="A run's best checkpoint, not its last."),
]
Out = Annotated[
    Path | None,
    o.option(
        "--out",
        panel=WHAT,
        metavar="PATH",
        text="File (published) or folder (safetensors); by default below exports/.",
    ),
]


def export(
    context: typer.Context,
    source: o.SourceArgument,
    layout: Layout,
    ema: Ema = None,
    best: Best = False,
    out: Out = None,
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
) -> None:
    """Write weights to hand on: a file as the published ones, or safetensors with a model card.

    RoPE options come from the source; a bare state dict has none, and needs --rotate at least.

    Prints the path. What is there already is never written over.
    """
    one_of("layout", layout, LAYOUTS)
    chosen = o.given_rope(context)
    if out:
        out = out.expanduser()
        check_out(out, layout)

    from spiralrope_cli.core.hub.source import find_source

    found = find_source(source, best=best)
    if best and found.run != Path(source).expanduser():
        raise ConfigError(
            f"--best chooses among a run's checkpoints, and {source} is no run folder",
            "leave --best out",
        )

    from spiralrope_cli.core.jobs import export as job

    job.export(found, layout, ema=ema, out=out, rope=chosen)


def check_out(out: Path, layout: str) -> None:
    """Refuses a name that says something else than what is written there.

    Raises:
        ConfigError: the suffix is another layout's.
    """
    if layout == "published" and out.suffix not in FILE_SUFFIXES:
        raise ConfigError(
            f"--out {out} does not end with {' or '.join(FILE_SUFFIXES)}",
            "the published layout is one file",
        )
    if layout == "safetensors" and out.suffix in (*FILE_SUFFIXES, ".safetensors"):
        raise ConfigError(
            f"--out {out} names a file",
            "the safetensors layout is a folder: model.safetensors, config.yaml, README.md",
        )
