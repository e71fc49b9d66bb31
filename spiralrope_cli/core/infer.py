"""Architecture and options of weights without a config.

Width, depth and patch size follow from the shapes of the tensors. The number of heads and the RoPE
options do not: they are in the file, in the catalogue, or given by the user.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from spiralrope_cli.core.config.models import (
    DEIT_SIZES,
    DIT_SIZES,
    RopeConfig,
    TransformerSize,
    arch_name,
    size_of,
)
from spiralrope_cli.core.errors import CheckpointError, ConfigError
from spiralrope_cli.core.hub.published import StateDict
from spiralrope_cli.core.hub.source import Source

LATENT_SIZE = (32, 32)  # for 256 px; used if a file does not have it
SHOWN_KEYS = 4
MIXED_FREQS = "rope.freqs"
"""Learned frequencies, [2, depth, H, D/2]."""


def is_dit_state(file: Path, state: StateDict) -> bool:
    """True for a DiT, False for a DeiT; raises for anything else."""
    if "x_embedder.proj.weight" in state:
        return True
    if "cls_token" in state and "blocks.0.gamma_1" in state:
        return False
    some = ", ".join(list(state)[:SHOWN_KEYS])
    raise CheckpointError(
        f"{file} is not a DeiT or DiT of this project: {len(state)} tensors such as {some}",
        "a DiT has x_embedder.proj.weight; a DeiT has cls_token and blocks.0.gamma_1",
    )


def trained_rope(
    source: Source, file: Path, state: StateDict, args: dict[str, Any], chosen: dict[str, Any]
) -> RopeConfig:
    """RoPE options of the file or the catalogue; if neither has them, those of the user."""
    trained = _rope_in_args(args)
    if trained is None and source.published is not None:
        trained = source.published.rope
    # A DiT has pos_embed only without RoPE. A DeiT always has one.
    if trained is None and {"x_embedder.proj.weight", "pos_embed"} <= state.keys():
        trained = {"enabled": False}
    if MIXED_FREQS in state:
        trained = {**(trained or {}), "rope_kind": "mixed", "rotate": 0}
    if trained is None and not {"rotate", "enabled", "rope_kind"} & chosen.keys():
        raise ConfigError(
            f"{file} does not contain its RoPE options",
            "give at least --rotate, or --no-rope; wrong values would load without an error",
        )
    return RopeConfig(**{"scaling": "extrapolate", **(trained or chosen)})


def _rope_in_args(args: dict[str, Any]) -> dict[str, Any] | None:
    """RoPE options in published `args`, by the fields of RopeConfig; None if there are none.

    In DiT files the names have the prefix `rope_`.
    """
    if args.get("use_rope") is False:
        return {"enabled": False}
    prefix = "rope_" if "rope_rotate" in args else ""
    if f"{prefix}rotate" not in args:
        return None
    fields = RopeConfig.__dataclass_fields__
    found = {name: args[prefix + name] for name in fields if prefix + name in args}
    return {**found, "theta": float(found.get("theta", RopeConfig.theta))}


def infer_arch(
    file: Path,
    state: StateDict,
    freqs: list[Tensor],
    rope: RopeConfig,
    args: dict[str, Any],
    given: str,
    notes: list[str],
) -> str:
    """The architecture of a state dict without frequencies; an assumption is added to `notes`.

    The number of heads is from the RoPE frequencies, learned or not, `num_heads` of the file,
    `--arch`, or the published size with the same width and depth, in this order. `freqs` are those
    of the file, one value per four channels of a head.
    """
    dit = "x_embedder.proj.weight" in state
    dim = state["blocks.0.attn.proj.bias"].shape[0]
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    patch = state["x_embedder.proj.weight"].shape[-1] if dit else 0
    rest = 0
    if MIXED_FREQS in state:
        heads = state[MIXED_FREQS].shape[2]
    elif freqs:
        shared = rope.same_theta and rope.freqs_for == "lang"
        heads, rest = divmod(dim, 4 * len(freqs[0]) * (max(rope.rotate, 1) if shared else 1))
    elif stated := args.get("num_heads"):
        heads, rest = int(stated), dim % int(stated)
    elif given:
        heads = size_of(given).heads
    else:
        sizes = (DIT_SIZES if dit else DEIT_SIZES).values()
        heads = {(size.dim, size.depth): size.heads for size in sizes}.get((dim, depth), 0)
        if not heads:
            numbers = f"dit-{dim}x{depth}xHEADS-{patch}" if dit else f"deit-{dim}x{depth}xHEADS"
            raise ConfigError(
                f"{file} does not contain the number of heads ({depth} blocks of width {dim})",
                f"give --arch {numbers}; a wrong number would load without an error",
            )
        arch = arch_name(TransformerSize(dim, depth, heads, patch))
        notes.append(
            f"{file.name} does not contain the number of heads; {heads} is used, as in {arch} "
            "(--arch changes it)"
        )
    if rest:
        raise ValueError(f"a whole number of heads in its width of {dim}")
    return arch_name(TransformerSize(dim, depth, heads, patch))


def deit_options(
    file: Path, state: StateDict, args: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
    """Arguments of `create_model` besides arch and rope; assumptions are added to `notes`."""
    weight = state["patch_embed.proj.weight"]
    patch = weight.shape[-1]
    rows, columns = _grid(state["pos_embed"], args)
    if not args:
        notes.append(f"{file.name} does not contain its grid; {rows}x{columns} patches are used")
    return {
        "num_classes": len(state["head.weight"]),
        "image_size": (rows * patch, columns * patch),
        "patch_size": patch,
        "in_chans": weight.shape[1],
        "pretrain_grid": args.get("pretrain_grid"),
    }


def dit_options(
    file: Path, state: StateDict, args: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
    """Arguments of `create_model` besides arch and rope; assumptions are added to `notes`."""
    weight, table = state["x_embedder.proj.weight"], state["y_embedder.embedding_table.weight"]
    patch = weight.shape[-1]
    # With RoPE the tensors do not contain the latent size, and the network takes any size.
    input_size = LATENT_SIZE
    grid = _grid(state["pos_embed"], args) if "pos_embed" in state else args.get("grid")
    if grid is not None:
        input_size = (grid[0] * patch, grid[1] * patch)
    elif not args:
        rows, columns = input_size
        notes.append(
            f"{file.name} does not contain the size of training; {rows}x{columns} latents are "
            "used: positions at other sizes are interpolated to it (--scaling changes this)"
        )
    if not args:
        notes.append(f"{file.name}: the last of its {len(table)} labels is taken as the null label")
    return {
        "num_classes": len(table) - has_null_label(len(table), args),
        "input_size": input_size,
        "in_chans": weight.shape[1],
        "pretrain_grid": args.get("pretrain_grid"),
        "qk_norm": any(".q_norm." in name for name in state),
    }


def has_null_label(labels: int, args: dict[str, Any]) -> bool:
    """Whether a table of labels has the null label; the original code adds it to drop labels."""
    return args.get("num_classes") != labels


def _grid(pos_embed: Tensor, args: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of patches: `grid` of the file, or a square."""
    tokens, given = pos_embed.shape[1], args.get("grid")
    if isinstance(given, (list, tuple)) and math.prod(given) == tokens:
        return int(given[0]), int(given[1])
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"the grid of {tokens} patches")
    return side, side
