"""What a training run would need here, and which values it could have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spiralrope_cli.core.config.dit_runs import TrainingRun
from spiralrope_cli.core.config.doctor import Checkup
from spiralrope_cli.core.config.resolve import resolve
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.models.factory import meta_inputs, model_cost, on_meta
from spiralrope_cli.core.runtime.device import pick_device, pick_precision
from spiralrope_cli.core.runtime.launch import num_local_workers, usable_cores
from spiralrope_cli.core.runtime.progress import human_size
from spiralrope_cli.core.training.checkpoint import needed_bytes

BYTES_PER_PARAMETER = 20
"""float32 weights, gradients, two moments of AdamW and the average."""


def advice(checkup: Checkup) -> dict[str, Any]:
    """Sizes, valid values and memory of the run that the options describe.

    Raises:
        ConfigError: no such run exists.
        DataError: no such data set.
    """
    options = {"nproc": 1, **checkup.options}
    resolved: Any = resolve("dit-train" if checkup.dit else "pretrain", options)
    run: TrainingRun = resolved.run
    nproc = num_local_workers(checkup.machine)
    micro, accumulation = run.split_batch(nproc)
    device = pick_device(checkup.machine)
    dtype, _ = pick_precision(checkup.machine.precision, device)
    parameters, flops = model_cost(run)
    network = on_meta(run)
    fixed = BYTES_PER_PARAMETER * parameters
    each = activation_bytes(run, network.to(dtype))
    return {
        "arch": run.arch,
        "parameters": parameters,
        "flops_per_image": flops,
        "batch_size": run.optim.batch_size,
        "nproc": nproc,
        "micro_batch_size": micro,
        "accumulation": accumulation,
        "picture_size": list(run.image_size),
        "valid_nproc": [n for n in range(1, max(8, nproc, usable_cores()) + 1) if fits(run, n)],
        "valid_batch_sizes": valid_batches(run, nproc),
        "valid_rotate": [r for r in range(run.head_dim // 8 + 1) if turns(run, r, False)],
        "valid_rotate_same_theta": [
            r for r in range(2, run.head_dim // 8 + 1) if turns(run, r, True)
        ],
        "checkpoint_bytes": needed_bytes(on_meta(run)),
        # The newest, the best, and the one that is written before an old one goes.
        "checkpoints": run.checkpoint.keep_last + run.keeps_best + 1,
        "memory": {"fixed": fixed, "per_image": each, "total": fixed + micro * each},
    }


def activation_bytes(run: TrainingRun, network: nn.Module) -> int:
    """About what one image leaves behind in the forward pass for the backward pass."""
    dtype = next(network.parameters()).dtype
    own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept: dict[int, int] = {}
    held = []  # so that no address is given out twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            held.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        network(*meta_inputs(run, 2, dtype))
    return sum(kept.values()) // 2


def fits(run: TrainingRun, nproc: int, batch_size: int | None = None) -> bool:
    """Whether a batch splits over so many processes."""
    try:
        size = batch_size or run.optim.batch_size
        optim: Any = replace(run.optim, batch_size=size)
        replace(run, optim=optim).split_batch(nproc)
    except ConfigError:
        return False
    return True


def valid_batches(run: TrainingRun, nproc: int) -> list[int]:
    """Powers of two, and the batch itself, that split over so many processes."""
    sizes = sorted({run.optim.batch_size, *(2**power for power in range(3, 14))})
    return [size for size in sizes if fits(run, nproc, size)]


def turns(run: TrainingRun, rotate: int, same_theta: bool) -> bool:
    """Whether heads of this size can have so many rotations."""
    try:
        replace(run.rope, rotate=rotate, same_theta=same_theta).check_head_dim(run.head_dim)
    except ConfigError:
        return False
    return True


def memory_notes(machine: dict[str, Any] | None, planned: dict[str, Any] | None) -> list[str]:
    """Whether a run is likely to need more memory than there is; an estimate, so no finding."""
    if not machine or not planned:
        return []
    needs, sharing = planned["memory"], planned["nproc"]
    there = machine["memory"] / sharing
    if machine["device"] == "cuda":
        there = min(gpu["memory"] for gpu in machine["gpus"])
    if needs["total"] <= there:
        return []
    most = int((there - needs["fixed"]) // needs["per_image"])
    advised = (
        f"--micro-batch-size {most} or less, or --grad-checkpointing"
        if most > 0
        else "a smaller --arch"
    )
    return [
        f"about {human_size(needs['total'])} per process may be needed, {human_size(there)} are "
        f"there: {advised}"
    ]
