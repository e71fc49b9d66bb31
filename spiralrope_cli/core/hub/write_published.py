"""What a file in a published layout holds, for code that was written for the published ones.

DeiT, `checkpoint.pth`: model, model_ema, epoch, args; `blocks.N.attn.rope.freqs` in each block.
DiT, `0400000.pt`: model, ema, args; `rope_embedder.freqs` once. No optimizer.
"""

from __future__ import annotations

import dataclasses
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor

from spiralrope_cli.core.config.latents import VAE_FACTOR
from spiralrope_cli.core.config.models import is_dit
from spiralrope_cli.core.config.rope import RopeConfig
from spiralrope_cli.core.hub.catalog import ROWS
from spiralrope_cli.core.hub.published import StateDict
from spiralrope_cli.core.rope import frequencies


@dataclasses.dataclass(frozen=True)
class Described:
    """A network, as far as a published file tells of it.

    Attributes:
        arch: `--arch`.
        rope: options of the rotary embedding.
        num_heads: heads per block.
        head_dim: channels per head.
        num_classes: outputs of a DeiT; classes of a DiT, without the null class.
        size: (height, width) in pixels, or of the latent.
        grid: patches as (rows, columns).
        pretrain_grid: patches that positions refer to.
        qk_norm: whether queries and keys are normalised.
    """

    arch: str
    rope: RopeConfig
    num_heads: int
    head_dim: int
    num_classes: int
    size: tuple[int, int]
    grid: tuple[int, int]
    pretrain_grid: tuple[int, int]
    qk_norm: bool = False


def published_content(
    network: Described,
    raw: StateDict,
    averaged: StateDict,
    *,
    progress: dict[str, int],
    ema: bool = False,
) -> dict[str, Any]:
    """The nested dict that `torch.save` writes.

    Args:
        network: what the weights belong to.
        raw: name -> tensor in the network's own order, without frequencies.
        averaged: likewise; the same object where there is one set alone, which the file then
            holds once, under both names.
        progress: `epoch`, counted from 0, or `step`, as far as known.
        ema: whether one set alone is the averaged one.
    """
    first = with_freqs(raw, network)
    second = first if averaged is raw else with_freqs(averaged, network)
    ema_key = "ema" if is_dit(network.arch) else "model_ema"
    args = published_args(network)
    if averaged is raw:
        args["weights"] = "ema" if ema else "model"
    return {"model": first, ema_key: second, **progress, "args": args}


def with_freqs(state: StateDict, network: Described) -> StateDict:
    """The state dict with the frequencies where published files have them."""
    if not network.rope.enabled:
        return dict(state)
    freqs = frequencies(network.rope, network.head_dim).to(torch.float32)
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        found[name] = value
        if name == "y_embedder.embedding_table.weight":
            found["rope_embedder.freqs"] = freqs
        elif name.endswith(".attn.proj.bias") and not is_dit(network.arch):
            # One buffer for each block: some loaders refuse tensors that share memory.
            found[name.replace("proj.bias", "rope.freqs")] = freqs.clone()
    return found


def published_args(network: Described) -> dict[str, Any]:
    """The options of the run by their published names, and what those do not tell."""
    rope = {
        name: value for name, value in dataclasses.asdict(network.rope).items() if name != "enabled"
    }
    height, width = network.size
    if is_dit(network.arch):
        height, width = VAE_FACTOR * height, VAE_FACTOR * width
        rope = {f"rope_{name}": value for name, value in rope.items()}
        side, classes = "image_size", "num_classes"
    else:
        side, classes = "input_size", "nb_classes"
    return {
        "model": _published_name(network.arch),
        side: height if height == width else [height, width],
        classes: network.num_classes,
        "use_rope": network.rope.enabled,
        **rope,
        "num_heads": network.num_heads,
        "grid": list(network.grid),
        "pretrain_grid": list(network.pretrain_grid),
    }


def not_expressed(network: Described) -> tuple[str, ...]:
    """What code for published files would compute otherwise, one line each."""
    rope, grid = network.rope, network.grid
    turned = rope.enabled and rope.rotate >= 2
    moved = rope.enabled and network.pretrain_grid != grid and rope.scaling == "interpolate"
    told = (
        (turned and rope.projection == "exact", "cuts off what --projection exact does not"),
        (
            moved,
            f"takes {_by(grid)} patches for the trained grid, not {_by(network.pretrain_grid)}",
        ),
        (rope.enabled and grid[0] != grid[1], f"knows square grids alone, and not {_by(grid)}"),
        (network.qk_norm, "has no normalised queries and keys"),
    )
    return tuple(f"code for published files {what}: its outputs differ" for no, what in told if no)


def _published_name(arch: str) -> str:
    folders = (PurePosixPath(row.file).parent for row in ROWS if row.arch == arch)
    return arch if is_dit(arch) else str(next(folders, arch))


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"
