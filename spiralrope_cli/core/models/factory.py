from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from spiralrope_cli.core.config.dit_runs import TrainingRun
from spiralrope_cli.core.config.models import RopeConfig, deit_size, dit_size, is_dit
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.models.deit import DeiT
from spiralrope_cli.core.models.dit import DiT

OF_BOTH = ("rope", "num_classes")
OF_DEIT = ("image_size", "patch_size", "in_chans", "pretrain_grid", "drop_path")
OF_DIT = ("input_size", "in_chans", "pretrain_grid", "label_dropout", "qk_norm")


def create_model(
    arch: str, *, rope: RopeConfig | None = None, num_classes: int = 1000, **options: Any
) -> DeiT | DiT:
    """A network by name, with random weights.

    Args:
        arch: `deit-ti` to `deit-l`, or `dit-ti2` to `dit-xl8` (the same as `DiT-XL/8`; the digit
            is the patch side); sizes by numbers too: `deit-WIDTHxDEPTHxHEADS`,
            `dit-WIDTHxDEPTHxHEADS-PATCH`.
        rope: options of the rotary embedding; by default `RopeConfig()`.
        num_classes: outputs of a DeiT; classes of a DiT, without the null class.
        options: for a DeiT image_size, patch_size, in_chans, pretrain_grid, drop_path;
            for a DiT input_size, in_chans, pretrain_grid, label_dropout, qk_norm.

    Raises:
        ConfigError: unknown name, option of the other network, or sizes that do not fit.
    """
    rope = rope if rope is not None else RopeConfig()
    known = OF_DIT if is_dit(arch) else OF_DEIT
    for name in options:
        if name not in known:
            raise ConfigError(
                f"{arch} has no option {name}", f"it has {', '.join(OF_BOTH + known)}"
            )
    if not is_dit(arch):
        return DeiT(*deit_size(arch), rope=rope, num_classes=num_classes, **options)
    dim, depth, heads, patch = dit_size(arch)
    return DiT(dim, depth, heads, rope=rope, patch_size=patch, num_classes=num_classes, **options)


def model_of(run: TrainingRun) -> DeiT | DiT:
    """The network of a run, with random weights."""
    options = asdict(run.model)
    if "class_dropout_prob" in options:
        options["label_dropout"] = options.pop("class_dropout_prob")
    return create_model(run.arch, rope=run.rope, **options)


def compile_blocks(model: DeiT | DiT) -> None:
    """Compiles each block in place; parameter names do not change.

    All blocks share one graph, so the time is that of one block. Cosines and sines are an argument
    of the block: computed inside, they would break the graph, or become a constant of it, which
    another model would then use too.
    """
    for block in model.blocks:
        block.compile()


def meta_inputs(run: TrainingRun, batch_size: int, dtype: torch.dtype) -> list[Tensor]:
    """Inputs on meta: images [B, channels, H, W]; for a DiT also timesteps, labels [B]."""
    images = torch.empty(batch_size, *run.input_shape, device="meta", dtype=dtype)
    integers = torch.empty(batch_size, device="meta", dtype=torch.int64)
    return [images, *[integers] * run.num_conditions]


def model_cost(run: TrainingRun) -> tuple[int, int]:
    """Number of parameters, and FLOPs of one forward pass on one image."""
    with torch.device("meta"):  # shapes without memory
        network = model_of(run)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*meta_inputs(run, 1, torch.float32))
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops()
