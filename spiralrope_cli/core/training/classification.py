"""The classifier's task: batches of images, cross entropy, validation."""

from __future__ import annotations

import math
from functools import partial
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from spiralrope_cli.core.config.runs import ClassifierRun, EvalProtocol
from spiralrope_cli.core.data.batches import ValidationImages, classifier_data
from spiralrope_cli.core.data.loader import Batch
from spiralrope_cli.core.errors import TrainingError
from spiralrope_cli.core.metrics.accuracy import measure_accuracy
from spiralrope_cli.core.models.deit import DeiT
from spiralrope_cli.core.runtime.device import autocast
from spiralrope_cli.core.runtime.distributed import DistContext
from spiralrope_cli.core.runtime.progress import Reporter, best_validation
from spiralrope_cli.core.runtime.seeds import generator_for
from spiralrope_cli.core.training.loop import LOWER_LR, Task, due
from spiralrope_cli.core.training.step import TrainState


def classification(config: ClassifierRun, ctx: DistContext) -> Task:
    """Data, loss and validation of a classifier.

    Raises:
        DataError: the data set is missing or damaged.
    """
    augment, model = config.augment, config.model
    protocol = EvalProtocol(
        data=config.data,
        num_val=config.num_val,
        image_size=model.image_size,
        in_chans=model.in_chans,
        crop_ratio=augment.crop_ratio,
        mean=augment.mean,
        std=augment.std,
    )
    val_images = ValidationImages(protocol, config.machine, ctx.device, ctx.rank, ctx.world_size)
    data = classifier_data(config, ctx.device, ctx.rank, ctx.world_size, val_images.unreadable)
    validate_steps = config.checkpoint.validate_every * config.steps_per_epoch
    return Task(
        train_steps=data.train_steps,
        remake=partial(data.remake, labels="targets"),
        unreadable=data.unreadable,
        loss=partial(classifier_loss, config, ctx),
        inspect_at=lambda step: due(step, validate_steps, config.total_steps),
        validate=partial(validate, config, ctx, val_images),
    )


def classifier_loss(
    config: ClassifierRun, ctx: DistContext, state: TrainState, forward: nn.Module, batch: Batch
) -> Tensor:
    """Mean cross entropy of one micro-batch, with stochastic depth."""
    model = cast(DeiT, state.model)
    # Random numbers for the whole batch of the step; each process takes its part. So they do not
    # depend on how the batch is split.
    generator = generator_for(config.seed, "depth", state.step)
    mask = model.drop_path_mask(config.optim.batch_size, generator)
    if mask is not None:
        mask = mask[..., batch.at.part].to(ctx.device, non_blocking=True)
    with autocast(ctx.device, ctx.dtype):
        logits = forward(batch.images, mask)
    # With mixup or cutmix the labels are soft, and smoothed already.
    smoothing = 0.0 if config.augment.mixes else config.augment.smoothing
    return F.cross_entropy(logits.float(), batch.labels, label_smoothing=smoothing)


def validate(
    config: ClassifierRun,
    ctx: DistContext,
    val_images: ValidationImages,
    state: TrainState,
    reporter: Reporter,
) -> None:
    """Validates raw and averaged weights, and records the best raw ones."""
    metrics = measure_accuracy(
        {"raw": state.model, "ema": state.ema.module},
        val_images.batches(),
        ctx.device,
        partial(autocast, ctx.device, ctx.dtype),
    )
    raw, ema = metrics["raw"], metrics["ema"]
    if not math.isfinite(raw.loss + ema.loss):
        raise TrainingError(f"validation loss is not finite at step {state.step}", LOWER_LR)
    values = {
        "epoch": state.step / config.steps_per_epoch,
        "acc1": raw.acc1,
        "acc5": raw.acc5,
        "val_loss": raw.loss,
        "ema_acc1": ema.acc1,
        "ema_acc5": ema.acc5,
        "ema_val_loss": ema.loss,
        "count": raw.count,
    }
    now = {"step": state.step, **values}
    state.best = best_validation([state.best, now]) if state.best else now
    reporter.validated(state.step, values, state.best["acc1"])
