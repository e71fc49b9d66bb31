from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spiralrope_cli.core.runtime import distributed


@dataclass(frozen=True)
class Accuracy:
    """Figures of one set of weights on one data set.

    Attributes:
        acc1: top-1 accuracy in percent.
        acc5: top-5 accuracy in percent.
        loss: mean cross entropy in nats.
        count: images, each counted once.
    """

    acc1: float
    acc5: float
    loss: float
    count: int


@torch.inference_mode()
def evaluate(
    models: dict[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    autocast: Callable[[], object],
) -> dict[str, Accuracy]:
    """Accuracy of several models in one pass over the data, summed over all processes.

    Args:
        models: name -> network giving logits [B, K]; left in the mode they came in.
        batches: this process's images [B, ...] and labels [B].
        device: where the models are.
        autocast: makes the context of the forward passes.

    Returns:
        name -> figures.
    """
    was_training = {name: model.training for name, model in models.items()}
    # Counts in float32 would lose images beyond 16 million.
    wide = torch.float32 if device.type == "mps" else torch.float64
    sums = torch.zeros(len(models), 4, dtype=wide, device=device)
    for model in models.values():
        model.eval()
    for images, labels in batches:
        for number, model in enumerate(models.values()):
            with autocast():  # type: ignore[attr-defined]
                logits = model(images)
            sums[number] += _batch_sums(logits.float(), labels)
    for name, model in models.items():
        model.train(was_training[name])
    figures = {}
    for name, (top1, top5, loss, count) in zip(
        models, distributed.total(sums).tolist(), strict=True
    ):
        many = max(count, 1)
        figures[name] = Accuracy(100 * top1 / many, 100 * top5 / many, loss / many, int(count))
    return figures


def _batch_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """[4]: hits among the first one and five, summed loss, images."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = ranked == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack((hits[:, 0].sum(), hits.any(1).sum(), loss, loss.new_tensor(len(labels))))
