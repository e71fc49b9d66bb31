from __future__ import annotations

import re
from typing import Any

import typer

from spiralrope_cli.commands import dit_options as d
from spiralrope_cli.commands import dit_sample
from spiralrope_cli.commands import options as o
from spiralrope_cli.commands import recipe_options as r
from spiralrope_cli.commands import run_options as p
from spiralrope_cli.core.config.legacy import translate
from spiralrope_cli.core.config.pipelines import deit_stages
from spiralrope_cli.core.config.sweeps import parse_seeds, points
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.runtime.launch import is_first_process, joined_world_size

DEIT_EXAMPLES = """
Examples:

  spiralrope run deit                                   DeiT-Ti on digits

  spiralrope run deit --rotate 4 --data ~/imagenet --nproc 8

  spiralrope run deit --rotate 4 --eval-only            measure it again

  spiralrope run deit --sweep rotate=none,1,2,4 --seeds 0,1,2

  spiralrope run deit --from-legacy "4 - - - - 8"       an old line
"""

DIT_EXAMPLES = """
Examples:

  spiralrope run dit                                    DiT-Ti/2 on digits

  spiralrope run dit --no-rope --name baseline

  spiralrope run dit --rotate 2 --data ~/imagenet --arch dit-b4 --nproc 8

  spiralrope run dit --reference imagenet256.npz --num 10000 --dry-run

  spiralrope run dit --from-legacy "- 4"                an old line
"""

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")


@app.callback()
def run() -> None:
    """Whole pipelines, from the first training to the last figure, in one folder."""


@app.command(epilog=DEIT_EXAMPLES)
def deit(
    context: typer.Context,
    eval_only: p.EvalOnly = False,
    skip_training: p.SkipTraining = False,
    with_finetune: p.Finetune = True,
    dry_run: p.DryRun = False,
    from_legacy: p.FromLegacy = None,
    sweep: p.Sweep = None,
    seeds: p.Seeds = None,
    arch: r.Arch = None,
    image_size: r.ImageSize = None,
    patch_size: r.PatchSize = None,
    drop_path: r.DropPath = None,
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
    data: r.Data = None,
    skip_bad: r.SkipBad = None,
    epochs: o.Epochs = None,
    steps: r.Steps = None,
    lr: r.Lr = None,
    warmup_epochs: r.WarmupEpochs = None,
    batch_size: o.BatchSize = None,
    finetune_epochs: p.FinetuneEpochs = None,
    finetune_steps: p.FinetuneSteps = None,
    finetune_lr: p.FinetuneLr = None,
    finetune_warmup_epochs: p.FinetuneWarmupEpochs = None,
    finetune_batch_size: p.FinetuneBatchSize = None,
    out: p.Out = None,
    name: o.Name = None,
    seed: o.Seed = None,
    micro_batch_size: o.MicroBatchSize = None,
    tracker: o.Tracker = None,
    log_every: o.LogEvery = None,
    validate_every: o.ValidateEvery = None,
    save_every: o.SaveEvery = None,
    keep_last: o.KeepLast = None,
    nproc: o.Nproc = None,
    nnodes: o.Nnodes = None,
    rdzv_endpoint: o.RdzvEndpoint = None,
    device: o.Device = None,
    precision: o.Precision = None,
    compile: o.Compile = None,
    grad_checkpointing: o.GradCheckpointing = None,
    workers: o.Workers = None,
) -> None:
    """Pretrain a DeiT, finetune it, and measure it eight times.

    Without options: DeiT-Ti with four directions on the bundled digits, in minutes on two cores.

    Options of the recipe are of pretraining; those of finetuning begin with --finetune-.

    The same command again skips what is done and goes on with what is not.
    """
    if from_legacy is not None:
        say_translated(context, from_legacy, "deit")
        return
    chosen = given(context)
    check_not_joined()
    grid, numbers = points(sweep or ()), parse_seeds(seeds) if seeds is not None else []
    stages = deit_stages(eval_only=eval_only, skip_training=skip_training, finetune=with_finetune)
    if sweep or numbers:
        from spiralrope_cli.core.jobs.sweep_plan import deit_sweep

        planned = deit_sweep(chosen, grid, numbers, stages, finetune=with_finetune)

        from spiralrope_cli.core.jobs.sweep import run_sweep

        run_sweep(planned, dry_run=dry_run)
        return
    from spiralrope_cli.core.jobs.pipeline_plan import deit_pipeline

    pipeline = deit_pipeline(chosen, stages, finetune=with_finetune)

    from spiralrope_cli.core.jobs.pipeline import run_deit

    run_deit(pipeline, dry_run=dry_run)


@app.command(epilog=DIT_EXAMPLES)
def dit(
    context: typer.Context,
    dry_run: p.DryRun = False,
    from_legacy: p.FromLegacy = None,
    arch: d.Arch = None,
    image_size: r.ImageSize = None,
    rope: o.Rope = None,
    rotate: d.Rotate = None,
    theta: o.Theta = None,
    freqs_for: o.FreqsFor = None,
    max_freq: o.MaxFreq = None,
    truncate_percentage: o.TruncatePercentage = None,
    max_freq_lang: o.MaxFreqLang = None,
    min_freq_lang: o.MinFreqLang = None,
    same_theta: o.SameTheta = None,
    projection: o.Projection = None,
    scaling: o.Scaling = None,
    data: d.Data = None,
    vae: d.Vae = None,
    latents: d.Latents = None,
    skip_bad: r.SkipBad = None,
    epochs: o.Epochs = None,
    steps: r.Steps = None,
    lr: d.Lr = None,
    warmup_epochs: r.WarmupEpochs = None,
    batch_size: o.BatchSize = None,
    num: p.Num = None,
    sampler: p.Sampler = None,
    sampling_steps: p.SamplingSteps = None,
    cfg_scale: p.CfgScale = None,
    sampling_seed: p.SamplingSeed = None,
    reference: p.Reference = None,
    weights: p.Weights = None,
    out: p.Out = None,
    name: o.Name = None,
    seed: d.Seed = None,
    micro_batch_size: o.MicroBatchSize = None,
    tracker: o.Tracker = None,
    log_every: o.LogEvery = None,
    sample_every: d.SampleEvery = None,
    save_every: d.SaveEvery = None,
    keep_last: d.KeepLast = None,
    nproc: o.Nproc = None,
    nnodes: o.Nnodes = None,
    rdzv_endpoint: o.RdzvEndpoint = None,
    device: o.Device = None,
    precision: o.Precision = None,
    compile: o.Compile = None,
    grad_checkpointing: o.GradCheckpointing = None,
    workers: o.Workers = None,
) -> None:
    """Train a DiT, draw images with it, and measure them.

    Without options: DiT-Ti/2 on the bundled digits, in minutes on two cores.

    FID needs a --reference and the weights that fetch inception brings; it is left out otherwise.

    The same command again skips what is done and goes on with what is not.
    """
    if from_legacy is not None:
        say_translated(context, from_legacy, "dit")
        return
    chosen = given(context)
    check_not_joined()
    sampling = {field: chosen.pop(name) for name, field in OF_SAMPLING.items() if name in chosen}
    try:
        dit_sample.check_words(sampling)
    except ConfigError as error:
        told = (OF_SAMPLES.sub(r"--sampling-\1", text) for text in (error.message, error.hint))
        raise ConfigError(*told) from error
    measured = {name: chosen.pop(name, "") for name in ("reference", "weights")}
    from spiralrope_cli.core.jobs.pipeline_plan import dit_pipeline

    pipeline = dit_pipeline(chosen, sampling, **measured)

    from spiralrope_cli.core.jobs.pipeline_dit import run_dit

    run_dit(pipeline, dry_run=dry_run)


OF_SAMPLING = {
    **{name: name for name in ("num", "sampler", "cfg_scale")},
    **{"sampling_steps": "steps", "sampling_seed": "seed"},
}
"""Option -> the one of `dit-sample` that it is."""
OF_SAMPLES = re.compile(r"--(steps|seed)\b")
"""Those of them that training has too, as errors of `dit-sample` call them."""

OWN = ("eval_only", "skip_training", "with_finetune", "dry_run", "from_legacy", "sweep", "seeds")


def given(context: typer.Context) -> dict[str, Any]:
    """The options that the user gave for the stages, by the name of the field they set."""
    return {name: value for name, value in o.given(context).items() if name not in OWN}


def check_not_joined() -> None:
    """Refuses processes that a launcher started: each stage forms a group of its own.

    Raises:
        ConfigError: says what to use in its place.
    """
    if (joined_world_size() or 1) > 1:
        raise ConfigError(
            "run starts the processes of each stage itself, and cannot join those of a launcher",
            "use --nproc, --nnodes and --rdzv-endpoint in place of torchrun or srun's tasks; the "
            "single commands do join",
        )


def say_translated(context: typer.Context, line: str, kind: str) -> None:
    """Prints the command for an old line on stdout, and what to know about it on stderr.

    Raises:
        ConfigError: a word that cannot be, or other options beside the line.
    """
    sources = {name: context.get_parameter_source(name) for name in context.params}
    typed = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    if typed != ["from_legacy"]:
        raise ConfigError(
            "--from-legacy stands alone", "add the other options to the command that it prints"
        )
    command, notes = translate(line, kind)
    if is_first_process():
        for note in notes:
            typer.echo(f"note: {note}", err=True)
        typer.echo(command)
