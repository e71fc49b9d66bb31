from __future__ import annotations

import typer

from spiralrope_cli.commands import dit_options as d
from spiralrope_cli.commands import options as o
from spiralrope_cli.commands import recipe_options as r
from spiralrope_cli.commands.training import train

EXAMPLES = """
Examples:

  spiralrope dit-train                                   DiT-Ti/2 on digits

  spiralrope dit-train --rotate 2 --name four            four directions

  spiralrope dit-train --data ~/imagenet --arch dit-b4   the published recipe

  spiralrope dit-train --arch dit-b4 --latents latents   from cached latents

  spiralrope dit-train --init dit-xl2 --data flowers     published weights first

  spiralrope dit-train --dry-run                         what it would do
"""


def dit_train(
    context: typer.Context,
    arch: d.Arch = None,
    image_size: r.ImageSize = None,
    qk_norm: d.QkNorm = None,
    init: d.Init = None,
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
    hflip: r.Hflip = None,
    skip_bad: r.SkipBad = None,
    steps: r.Steps = None,
    lr: d.Lr = None,
    min_lr: r.MinLr = None,
    warmup_epochs: r.WarmupEpochs = None,
    schedule: d.Schedule = None,
    weight_decay: r.WeightDecay = None,
    clip_grad: r.ClipGrad = None,
    ema_decay: r.EmaDecay = None,
    label_dropout: d.LabelDropout = None,
    out: o.Out = None,
    name: o.Name = None,
    seed: d.Seed = None,
    batch_size: o.BatchSize = None,
    micro_batch_size: o.MicroBatchSize = None,
    epochs: o.Epochs = None,
    resume: o.Resume = None,
    config: o.Config = None,
    tracker: o.Tracker = None,
    log_every: o.LogEvery = None,
    sample_every: d.SampleEvery = None,
    save_every: d.SaveEvery = None,
    keep_last: d.KeepLast = None,
    keep_every: o.KeepEvery = None,
    dry_run: o.DryRun = False,
    nproc: o.Nproc = None,
    nnodes: o.Nnodes = None,
    rdzv_endpoint: o.RdzvEndpoint = None,
    device: o.Device = None,
    precision: o.Precision = None,
    compile: o.Compile = None,
    grad_checkpointing: o.GradCheckpointing = None,
    workers: o.Workers = None,
) -> None:
    """Train a DiT with Spiral RoPE: a diffusion transformer, by class.

    Without options: DiT-Ti/2 on the pixels of the bundled digits, in minutes on two CPU cores.

    What is not given comes from --config, the data set and the published recipe.

    The same command again goes on where the last one stopped.
    """
    if init is None:
        train("dit-train", context)
        return
    from spiralrope_cli.core.hub.source import find_source

    rope_options = o.given_rope(context)
    found = find_source(init)

    from spiralrope_cli.core.jobs.start import starting_point

    start, notes = starting_point(found, rope_options, dit=True)
    train("dit-train", context, start, notes)
