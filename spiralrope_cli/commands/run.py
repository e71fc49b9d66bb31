from __future__ import annotations

from typing import Any

import typer

from spiralrope_cli.commands import options as o
from spiralrope_cli.commands import recipe_options as r
from spiralrope_cli.commands import run_options as p
from spiralrope_cli.core.config.pipelines import deit_stages

DEIT_EXAMPLES = """
Examples:

  spiralrope run deit                                   DeiT-Ti on digits

  spiralrope run deit --rotate 4 --data ~/imagenet --nproc 8

  spiralrope run deit --rotate 4 --eval-only            measure it again

  spiralrope run deit --sweep rotate=none,1,2,4 --seeds 0,1,2

  spiralrope run deit --from-legacy "4 - - - - 8"       an old line
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
    epochs: p.Epochs = None,
    steps: r.Steps = None,
    lr: r.Lr = None,
    warmup_epochs: r.WarmupEpochs = None,
    batch_size: p.BatchSize = None,
    finetune_epochs: p.FinetuneEpochs = None,
    finetune_steps: p.FinetuneSteps = None,
    finetune_lr: p.FinetuneLr = None,
    finetune_warmup_epochs: p.FinetuneWarmupEpochs = None,
    finetune_batch_size: p.FinetuneBatchSize = None,
    out: p.Out = None,
    name: o.Name = None,
    seed: p.Seed = None,
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
    chosen = given(context)
    stages = deit_stages(eval_only=eval_only, skip_training=skip_training, finetune=with_finetune)
    from spiralrope_cli.core.jobs.pipeline_plan import deit_pipeline

    pipeline = deit_pipeline(chosen, stages, finetune=with_finetune)

    from spiralrope_cli.core.jobs.pipeline import run_deit

    run_deit(pipeline, dry_run=dry_run)


OWN = ("eval_only", "skip_training", "with_finetune", "dry_run", "from_legacy", "sweep", "seeds")


def given(context: typer.Context) -> dict[str, Any]:
    """The options that the user gave for the stages, by the name of the field they set."""
    return {name: value for name, value in o.given(context).items() if name not in OWN}
