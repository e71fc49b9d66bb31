"""Accuracy of models on a data set, and rows of `eval.json`."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spiralrope_cli.core.runtime import distributed
from spiralrope_cli.core.runtime.run_folder import differences, read_rows, write_json

SAME = ("sha256", "checkpoint", "weights", "data", "image_size", "crop_ratio", "rope", "precision")
"""A new row replaces an old one that is equal in these."""

Record = dict[str, Any]
Name = TypeVar("Name")


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
) -> dict[Name, Accuracy]:
    """Accuracy of several models in one pass over the data, summed over all processes.

    Args:
        models: name -> network with logits [B, K]; train or eval mode is restored.
        batches: images [B, ...] and labels [B] of this process.
        device: device of the models.
        autocast: returns the context of the forward passes.
    """
    was_training = [model.training for model in models.values()]
    # float32 counts exactly only to 16 million.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    sums = torch.zeros(len(models), 4, dtype=dtype, device=device)
    for model in models.values():
        model.eval()
    for images, labels in batches:
        for number, model in enumerate(models.values()):
            with autocast():
                logits = model(images)
            sums[number] += _batch_sums(logits.float(), labels)
    for model, training in zip(models.values(), was_training, strict=True):
        model.train(training)
    found = {}
    totals = distributed.all_reduce_sum(sums).tolist()
    for name, (*hits, loss, count) in zip(models, totals, strict=True):
        num = max(count, 1)
        acc1, acc5 = (100 * each / num for each in hits)
        found[name] = Accuracy(acc1, acc5, loss / num, int(count))
    return found


def _batch_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """[4]: top-1 hits, top-5 hits, sum of losses, number of images."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = ranked == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack((hits[:, 0].sum(), hits.any(1).sum(), loss, loss.new_tensor(len(labels))))


# --- Rows of an `eval.json`


def is_same(before: Record, now: Record) -> bool:
    """Whether two rows have the same weights and protocol."""
    return not differences(before, {name: now[name] for name in SAME}, free=())


def add_rows(path: Path, rows: Sequence[Record], decoded: int) -> None:
    """Adds rows to an `eval.json`; they replace rows of the same weights and protocol."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [old for old in read_rows(path) if not any(is_same(old, new) for new in rows)]
    kept = [
        old for old in kept if math.isfinite(old.get("loss", 0.0))
    ]  # earlier versions wrote NaN
    write_json(path, {"decoded": decoded, "rows": [*kept, *rows]})


def print_csv(rows: Sequence[Record]) -> None:
    """One line per row on stdout; nested values get a column each, lists are written `8x8`."""
    lines = []
    for row in rows:
        line: Record = {}
        for key, value in row.items():
            if isinstance(value, dict):
                line |= {f"{key}_{name}": item for name, item in value.items()}
            elif isinstance(value, list):
                line[key] = ("/" if key in ("mean", "std") else "x").join(map(str, value))
            else:
                line[key] = value
        lines.append(line)
    writer = csv.DictWriter(sys.stdout, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
