"""A device that runs out of memory, in this process or in workers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from spiralrope_cli.core.config.recipes import micro_batch_sizes
from spiralrope_cli.core.jobs import train
from spiralrope_cli.core.runtime import distributed
from spiralrope_cli.core.runtime.distributed import open_context
from spiralrope_cli.core.training.advice import largest_that_fits, trial_steps


def short_of_memory(most, run, ctx):
    """The task of a run on a device that holds the activations of `most` images."""
    task = train.open_task(run, ctx)

    def loss(state, forward, batch):
        if len(batch.images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return task.loss(state, forward, batch)

    return dataclasses.replace(task, loss=loss)


def on_two_processes(run):
    """The second process has less memory than the first."""
    with open_context(run.machine, Path(run.out)) as ctx:
        sizes = micro_batch_sizes(run, 2)
        fits = trial_steps(run, ctx, short_of_memory((12, 5)[ctx.rank], run, ctx))
        found = distributed.all_gather_object(largest_that_fits(sizes, 24, fits))
        if ctx.is_first:
            Path("found.json").write_text(json.dumps(found))
