"""What two processes do for the tests of `--shard` and DDP; workers import it by its name."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounter
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from spiralrope_cli.core.data import batches
from spiralrope_cli.core.jobs import train
from spiralrope_cli.core.runtime.distributed import open_context
from spiralrope_cli.core.training import classification, diffusion, fid, loop
from spiralrope_cli.core.training.step import train_step

COLLECTIVES = {
    **{"all_reduce": "reduce", "broadcast": "broadcast"},
    **dict.fromkeys(("all_gather_into_tensor", "all_gather_single"), "gather"),
    **dict.fromkeys(("reduce_scatter_tensor", "reduce_scatter_single"), "scatter"),
}


def train_and_listen(run, runs, listened):
    """Trains runs one after the other, then writes `events.json` of the others."""
    diffusion.STEPS = 2
    # Three batches: the second process has one less.
    batches.EVAL_BATCH = classification.EVAL_BATCH = 128
    # Three images of a FID, too.
    fid.default_batch_size = lambda size: 1
    train.report = lambda out: None
    for number, each in enumerate((*runs, *listened)):
        # Each has keys of its own in the store of the launcher.
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
        if each in runs:
            train.work(each)
        else:
            listen(each)


def listen(run):
    """Two steps with compiled blocks: what was sent, and when which block had its gradients."""
    events, graphs = [], CompileCounter()
    torch._dynamo.reset()
    compile_module = torch.nn.Module.compile
    torch.nn.Module.compile = lambda module: compile_module(module, backend=graphs)
    with open_context(run.machine, Path(run.out)) as ctx:
        task = train.open_task(run, ctx)
        state, forward = loop.build_state(run, ctx, 0, None)
        if not run.machine.shard:  # as DDP does in C++
            forward.register_comm_hook(None, allreduce_hook)
        for number, block in enumerate(state.model.blocks):
            block.gamma_1.register_post_accumulate_grad_hook(
                lambda parameter, number=number: events.append(number)
            )

        def spied(name):
            collective = getattr(dist, name)

            def call(*given, **more):
                events.append(COLLECTIVES[name])
                return collective(*given, **more)

            return call

        kept = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}
        for name in kept:
            setattr(dist, name, spied(name))
        steps = task.data.train_steps(0, 2)
        for micro_batches in steps:
            events.clear()  # the first step still decides what DDP reduces together
            train_step(state, forward, micro_batches, partial(task.loss, state))
        for name, collective in kept.items():
            setattr(dist, name, collective)
        found = {"events": events, "graphs": graphs.frame_count}
        if ctx.is_first:
            Path(run.out, "events.json").write_text(json.dumps(found))
        del forward
    torch.nn.Module.compile = compile_module
