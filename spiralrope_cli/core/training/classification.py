"""The classifier's task: batches of images, cross entropy, validation, accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spiralrope_cli.core.config.datasets import EvalProtocol
from spiralrope_cli.core.config.runs import ClassifierRun
from spiralrope_cli.core.data.batches import EVAL_BATCH, ValidationImages, classifier_data
from spiralrope_cli.core.data.loader import Batch, BatchIndices
from spiralrope_cli.core.errors import TrainingError
from spiralrope_cli.core.models.deit import DeiT
from spiralrope_cli.core.runtime import distributed
from spiralrope_cli.core.runtime.device import autocast
from spiralrope_cli.core.runtime.distributed import DistContext
from spiralrope_cli.core.runtime.progress import Reporter, best_validation
from spiralrope_cli.core.runtime.seeds import generator_for
from spiralrope_cli.core.training.loop import LOWER_LR, Task, due
from spiralrope_cli.core.training.step import TrainState, is_sharded

Name = TypeVar("Name")


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
        data=data,
        loss=partial(classifier_loss, config, ctx),
        black=partial(black_images, config, ctx.device),
        inspect_at=lambda step: due(step, validate_steps, config.total_steps),
        validate=partial(validate, config, ctx, val_images),
    )


def black_images(config: ClassifierRun, device: torch.device, number: int) -> Batch:
    """A batch of black images of class 0."""
    at = BatchIndices([], [], part=slice(0, number))
    labels = torch.zeros(number, dtype=torch.int64, device=device)
    if config.augment.mixes:
        labels = F.one_hot(labels, config.model.num_classes).float()
    return Batch(at, torch.zeros(number, *config.input_shape, device=device), labels)


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
    batches = val_images.batches()
    if is_sharded(state.model):
        batches = with_black_images(config, ctx, batches)
    metrics = measure_accuracy(
        {"raw": state.model, "ema": state.ema.module},
        batches,
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


def with_black_images(
    config: ClassifierRun, ctx: DistContext, batches: Iterator[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, then images without a label, so that all processes have as many batches.

    The forward pass of a sharded network is a collective.
    """
    number = 0
    for number, batch in enumerate(batches, start=1):  # noqa: B007 - the number of the last
        yield batch
    for _ in range(number, math.ceil(config.num_val / (EVAL_BATCH * ctx.world_size))):
        image = black_images(config, ctx.device, 1).images
        yield image, torch.empty(0, dtype=torch.int64, device=ctx.device)


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 accuracy in percent, mean cross entropy in nats, and number of images."""

    acc1: float
    acc5: float
    loss: float
    count: int


@torch.inference_mode()
def measure_accuracy(
    models: Mapping[Name, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    autocast: Callable[[], Any],
    classes: Mapping[Name, Sequence[int]] | None = None,
) -> dict[Name, Accuracy]:
    """Accuracy of several models in one pass over the data, summed over all processes.

    Args:
        models: name -> network with logits [B, K]; train or eval mode is restored.
        batches: images [B, ...] of this process, and labels: class numbers [B], or bool
            [B, L], where each of several classes is right. Images without a label do not count.
        device: device of the models.
        autocast: returns the context of the forward passes.
        classes: name -> class of the network for each of the L classes of the labels; others are
            not predicted. Without it L is K, and the numbers are the same.
    """
    was_training = [model.training for model in models.values()]
    # float32 counts exactly only to 16 million.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    sums = torch.zeros(len(models), 4, dtype=dtype, device=device)
    chosen = {n: torch.tensor(each, device=device) for n, each in (classes or {}).items() if each}
    for model in models.values():
        model.eval()
    for images, labels in batches:
        for number, (name, model) in enumerate(models.items()):
            with autocast():
                logits = model(images)[: len(labels)]
            if name in chosen:
                logits = logits[:, chosen[name]]
            sums[number] += _batch_sums(logits.float(), labels)
    for model, training in zip(models.values(), was_training, strict=True):
        model.train(training)
    found = {}
    totals = distributed.all_reduce(sums).tolist()
    for name, (*hits, loss, count) in zip(models, totals, strict=True):
        num = max(count, 1)
        acc1, acc5 = (100 * each / num for each in hits)
        found[name] = Accuracy(acc1, acc5, loss / num, int(count))
    return found


def _batch_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """[4]: top-1 hits, top-5 hits, sum of losses, number of images.

    Where several classes are right, one of them among the predictions is a hit, and the loss is
    -log of their total probability.
    """
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    if labels.dtype == torch.bool:
        hits = labels.gather(1, ranked)
        loss = -logits.log_softmax(1).masked_fill(~labels, -math.inf).logsumexp(1).sum()
    else:
        hits = ranked == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack((hits[:, 0].sum(), hits.any(1).sum(), loss, loss.new_full((), len(labels))))
