"""Measures weights on held-out images: one pass over the images for all rows that share them."""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from spiralrope_cli.core.config.evals import EvalProtocol, EvalRow, EvalRun
from spiralrope_cli.core.data.validation import ValidationImages
from spiralrope_cli.core.errors import CheckpointError
from spiralrope_cli.core.hub.source import Source
from spiralrope_cli.core.jobs import eval_report
from spiralrope_cli.core.load import build
from spiralrope_cli.core.metrics.accuracy import Accuracy, evaluate
from spiralrope_cli.core.report.page import is_stage, leave_report
from spiralrope_cli.core.runtime import distributed, report
from spiralrope_cli.core.runtime.device import autocast
from spiralrope_cli.core.runtime.job import Job, open_job
from spiralrope_cli.core.runtime.progress import counted
from spiralrope_cli.core.weights import read_weights

Batches = Iterator[tuple[Tensor, Tensor]]


def run(config: EvalRun) -> None:
    """Measures all rows and reports them from the first process; executed by every worker.

    Raises:
        CheckpointError: weights that do not fit, or that are gone since they were looked at.
        DataError: the data set is missing or damaged.
    """
    with open_job(config.machine, None) as job:
        if len(set(distributed.gathered(config.rows))) > 1:
            raise CheckpointError(
                "the machines see different weights or data sets",
                "sources and --data must lie in folders that all of them share",
            )
        figures: dict[EvalRow, Accuracy] = {}
        bad: dict[str, str] = {}
        decoded = 0
        for protocol in dict.fromkeys(row.protocol for row in config.rows):
            rows = [row for row in config.rows if row.protocol == protocol]
            images = ValidationImages(
                protocol, config.machine, job.device, job.rank, job.world_size
            )
            figures.update(measure(rows, images, job, compiled=config.machine.compile))
            decoded += images.decoded
            bad.update(images.bad.reasons)
        decoded = int(distributed.total(torch.tensor(decoded, device=job.device)).item())
        unreadable = distributed.gathered(bad)
        if job.is_first:
            report.say_unreadable(dict(ChainMap(*unreadable)))
            eval_report.finish(config, [figures[row] for row in config.rows], decoded, job)
            for folder in {Path(row.folder) for row in config.rows}:
                if is_stage(folder):
                    leave_report(folder)


def measure(
    rows: list[EvalRow], images: ValidationImages, job: Job, *, compiled: bool
) -> dict[EvalRow, Accuracy]:
    """Figures of rows of one protocol, in one pass; equal networks are asked once."""
    networks = list(dict.fromkeys(row.network for row in rows))
    by_network = {row.network: row for row in rows}
    models: dict[str, nn.Module] = {}
    for number, network in enumerate(networks):
        models[str(number)] = load(by_network[network], job.device)
        if compiled:
            models[str(number)].compile()
    what = f"{eval_report.protocol_words(images.protocol)}, {len(models)} network(s), images"
    with counted(what, images.protocol.num_val, shown=job.is_first) as advance:
        found = evaluate(
            models,
            counting(images.batches(), advance, job.world_size, images.protocol),
            job.device,
            partial(autocast, job.device, job.dtype),
        )
    return {row: found[str(networks.index(row.network))] for row in rows}


def load(row: EvalRow, device: torch.device) -> nn.Module:
    """The network of a row with its weights, exactly as planned."""
    file = Path(row.file)
    rope = dataclasses.asdict(row.rope)
    weights = read_weights(Source(row.source, file), ema=row.ema, rope=rope)
    model = row.model
    return build(weights, device, image_size=model.image_size, pretrain_grid=model.pretrain_grid)


def counting(
    batches: Batches, advance: Callable[[int], None], world_size: int, protocol: EvalProtocol
) -> Batches:
    """The same batches; what all processes have done by now follows from this one."""
    done = 0
    for images, labels in batches:
        yield images, labels
        more = min(len(labels) * world_size, protocol.num_val - done)
        done += more
        advance(more)
