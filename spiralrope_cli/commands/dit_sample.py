from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from spiralrope_cli.commands import completion
from spiralrope_cli.commands import options as o
from spiralrope_cli.commands.options import RUN, choice, option, pair_parser, parse_size
from spiralrope_cli.core.config.checks import at_least
from spiralrope_cli.core.config.diffusion import (
    CFG_CHANNELS,
    SAMPLERS,
    GuidanceConfig,
)
from spiralrope_cli.core.config.dit_runs import NO_VAE
from spiralrope_cli.core.config.latents import VAE_NAMES
from spiralrope_cli.core.config.nested import build
from spiralrope_cli.core.config.runs import MachineConfig
from spiralrope_cli.core.config.samples import DEFAULTS, check_chain
from spiralrope_cli.core.runtime.launch import is_first_process, launch, world_size

SAMPLING, PICTURES = "Sampling", "Pictures"
JOB = "spiralrope_cli.core.jobs.sample_dit:run"
EXAMPLES = """
Examples:

  spiralrope dit-sample runs/dit-train-dit-ti2-digits-r0       a run of yours

  spiralrope dit-sample dit-xl2 --num 50000 --nproc 8          as published

  spiralrope dit-sample dit-xl2 --num 16 --cfg-scale 4 --classes 207,88

  spiralrope dit-sample dit-xl2 --num 64 --sampler dpm++ --steps 20

  spiralrope dit-sample RUN --num 1000 --png --dry-run         what it would do
"""


def parse_classes(text: str | tuple[int, ...] | None) -> tuple[int, ...] | None:
    """`207,88` as (207, 88).

    Raises:
        typer.BadParameter: no list of numbers.
    """
    if text is None or isinstance(text, tuple):
        return text
    if not re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", text):
        raise typer.BadParameter(f"{text!r} is no list of class numbers, as 207,88")
    return tuple(int(number) for number in text.split(","))


def dit_sample(
    context: typer.Context,
    source: o.SourceArgument,
    num: Annotated[
        int | None,
        option("--num", panel=SAMPLING, text="Images; 50000, or 200 of a run on a built-in set."),
    ] = None,
    steps: Annotated[
        str | None,
        option("--steps", panel=SAMPLING, text="250, counts per section as 10,15,20, or ddim25."),
    ] = None,
    sampler: Annotated[
        str | None,
        option("--sampler", panel=SAMPLING, **choice("How noise is taken away.", SAMPLERS)),
    ] = None,
    cfg_scale: Annotated[
        float | None,
        option("--cfg-scale", panel=SAMPLING, text="Guidance; 1 is none, and twice as fast."),
    ] = None,
    cfg_channels: Annotated[
        str | None,
        option(
            "--cfg-channels",
            panel=SAMPLING,
            **choice("Noise channels that are guided; published figures: 3.", CFG_CHANNELS),
        ),
    ] = None,
    cfg_interval: Annotated[
        str | None,
        option(
            "--cfg-interval",
            panel=SAMPLING,
            text="Guide where LO <= timestep < HI alone, of 0 to 1000.",
            metavar="LO,HI",
            callback=pair_parser("LO,HI, as 0,600"),
        ),
    ] = None,
    classes: Annotated[
        str | None,
        option(
            "--classes",
            panel=SAMPLING,
            text="Dealt out in turn over the images; by default drawn for each.",
            metavar="N,N,...",
            callback=parse_classes,
        ),
    ] = None,
    ema: Annotated[
        bool | None,
        option("--ema/--no-ema", panel=SAMPLING, metavar=" ", text="Averaged weights, or raw."),
    ] = None,
    image_size: Annotated[
        str | None,
        option(
            "--image-size",
            panel=PICTURES,
            text="Side, or height x width, in pixels; by default as trained.",
            metavar="N|HxW",
            callback=parse_size,
        ),
    ] = None,
    vae: Annotated[
        str | None,
        option(
            "--vae",
            panel=PICTURES,
            text="mse, ema, a folder in diffusers' layout, or none: pixels.",
            metavar="NAME|FOLDER",
            autocompletion=completion.words(*VAE_NAMES, NO_VAE),
        ),
    ] = None,
    png: Annotated[
        bool | None,
        option("--png", panel=PICTURES, metavar=" ", text="Write every image as a file too."),
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
    out: Annotated[
        str | None,
        option(
            "--out",
            panel=RUN,
            text="Folder of samples.npz and samples.png; by default runs/dit-sample-...",
            metavar="FOLDER",
        ),
    ] = None,
    name: o.Name = None,
    seed: Annotated[
        int | None,
        option("--seed", panel=RUN, text="Image i follows from it and i alone; 100."),
    ] = None,
    batch_size: Annotated[
        int | None, option("--batch-size", panel=RUN, text="Images at a time per process.")
    ] = None,
    dry_run: o.DryRun = False,
    nproc: o.Nproc = None,
    nnodes: o.Nnodes = None,
    rdzv_endpoint: o.RdzvEndpoint = None,
    device: o.Device = None,
    precision: o.Precision = None,
    compile: o.Compile = None,
) -> None:
    """Draw images with a DiT: a run, a checkpoint file or published weights.

    They go into samples.npz (arr_0, uint8), which fid reads, and a grid to look at.

    An interrupted command goes on with the missing images when it is given again.
    """
    from spiralrope_cli.core.hub.source import find_source

    chosen = o.given(context)
    for own in ("source", "dry_run"):
        chosen.pop(own)
    o.given_rope(context)
    check_words(chosen)
    found = find_source(source)

    from spiralrope_cli.core.jobs import sample_plan as plan

    run, weights = plan.settle(found, chosen)
    facts = plan.facts_of(run, weights)
    finished = plan.check_same(run, facts)
    if finished and not dry_run:
        if is_first_process():
            typer.echo(f"{run.out} is finished: {run.num} images", err=True)
            typer.echo(str(Path(run.out) / "samples.npz"))
        return
    plan.check_space(run)
    if is_first_process():
        plan.say_plan(run, weights, world_size(run.machine))
    if not dry_run:
        launch(JOB, run)


def check_words(chosen: dict[str, Any]) -> None:
    """Refuses what no weights could have, before anything heavy is loaded.

    Raises:
        ConfigError: names the option and what is allowed.
    """
    build(GuidanceConfig, chosen)
    build(MachineConfig, chosen)
    check_chain(*({**DEFAULTS, **chosen}[name] for name in ("sampler", "steps")))
    for name in ("num", "batch_size"):
        at_least(name, chosen.get(name, 1), 1)
    at_least("seed", chosen.get("seed", 0), 0)
