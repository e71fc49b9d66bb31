from __future__ import annotations

import typer

from spiralrope_cli.commands import options as o
from spiralrope_cli.commands import recipe_options as r
from spiralrope_cli.commands.training import train

EXAMPLES = """
Examples:

  spiralrope finetune runs/pretrain-deit-ti-digits-r2     a run of yours

  spiralrope finetune deit-b --data ~/imagenet            published weights

  spiralrope finetune deit-b --data ~/birds --image-size 384

  spiralrope finetune checkpoint.pth --data ~/birds --freeze head-only

  spiralrope finetune deit-s --data ~/imagenet --dry-run
"""


def finetune(
    context: typer.Context,
    source: o.SourceArgument,
    image_size: r.ImageSize = None,
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
    crop_ratio: r.CropRatio = None,
    geometry: r.Geometry = None,
    crop_scale: r.CropScale = None,
    max_shift: r.MaxShift = None,
    max_rotation: r.MaxRotation = None,
    hflip: r.Hflip = None,
    auto_augment: r.AutoAugment = None,
    color_jitter: r.ColorJitter = None,
    random_erasing: r.RandomErasing = None,
    repeated_aug: r.RepeatedAug = None,
    mixup: r.Mixup = None,
    cutmix: r.Cutmix = None,
    smoothing: r.Smoothing = None,
    skip_bad: r.SkipBad = None,
    steps: r.Steps = None,
    lr: r.Lr = None,
    lr_rule: r.LrRule = None,
    min_lr: r.MinLr = None,
    warmup_epochs: r.WarmupEpochs = None,
    schedule: r.Schedule = None,
    freeze: r.Freeze = None,
    weight_decay: r.WeightDecay = None,
    clip_grad: r.ClipGrad = None,
    ema_decay: r.EmaDecay = None,
    out: o.Out = None,
    name: o.Name = None,
    seed: o.Seed = None,
    batch_size: o.BatchSize = None,
    micro_batch_size: o.MicroBatchSize = None,
    epochs: o.Epochs = None,
    resume: o.Resume = None,
    config: o.Config = None,
    tracker: o.Tracker = None,
    log_every: o.LogEvery = None,
    validate_every: o.ValidateEvery = None,
    save_every: o.SaveEvery = None,
    keep_last: o.KeepLast = None,
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
    """Finetune a DeiT from a run, a checkpoint file or published weights.

    SOURCE is a run folder, a .pth, .pt or .safetensors file, or a name of fetch --list.

    Its averaged (EMA) weights are taken, with its sizes and RoPE options.

    Other classes re-initialise the head; another --image-size resamples the positions.

    The same command again goes on where the last one stopped.
    """
    from spiralrope_cli.core.hub.source import find_source

    rope_options = o.given_rope(context)
    found = find_source(source)

    from spiralrope_cli.core.jobs.start import starting_point

    start, notes = starting_point(found, rope_options)
    train("finetune", context, start, notes)
