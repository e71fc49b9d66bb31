"""Networks with weights, and initial weights of runs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spiralrope_cli.core.config.datasets import class_difference
from spiralrope_cli.core.config.dit_runs import VAE_FACTOR, DiTModelConfig
from spiralrope_cli.core.config.models import RopeConfig, is_dit
from spiralrope_cli.core.config.runs import ModelConfig
from spiralrope_cli.core.errors import CheckpointError
from spiralrope_cli.core.hub.published import StateDict
from spiralrope_cli.core.hub.source import Source, find_source
from spiralrope_cli.core.infer import MIXED_FREQS, SHOWN_KEYS
from spiralrope_cli.core.models.deit import DeiT, resize_pos_embed
from spiralrope_cli.core.models.dit import DiT
from spiralrope_cli.core.models.factory import create_model
from spiralrope_cli.core.resolve import StartingPoint, positions_at
from spiralrope_cli.core.weights import Weights, fetch_source, read_weights

ALIGNMENT = 64  # bytes, as torch allocates tensors on a CPU


def network_on_meta(weights: Weights, **changes: Any) -> DeiT | DiT:
    """The network of the weights on the meta device; `changes` replace arguments."""
    with torch.device("meta"):
        return create_model(weights.arch, **{"rope": weights.rope, **weights.options, **changes})


def load_model(
    source: str | Path, *, ema: bool = False, rope: RopeConfig | None = None, arch: str = ""
) -> DeiT | DiT:
    """A model with its weights, in eval mode on the CPU.

    Args:
        source: run folder, checkpoint file, published name, or `hf:OWNER/NAME[/FILE][@REVISION]`;
            weights on the Hub are downloaded if needed.
        ema: EMA weights, not raw ones.
        rope: replaces the RoPE options of the source; required for a plain state dict.
        arch: gives the number of heads of a plain state dict that is not of a published size.

    Returns:
        a network with float32 parameters that do not require gradients.

    Raises:
        CheckpointError: there are no weights, they are damaged, or of another model.
        ConfigError: unknown name, or a plain state dict without `rope`.
        FetchError: the download failed.
    """
    chosen = asdict(rope) if rope is not None else {}
    given = fetch_source(find_source(str(source)))
    weights = read_weights(given, ema=ema, rope=chosen, arch=arch)
    for note in weights.notes:
        warnings.warn(note, stacklevel=2)
    return build_network(weights)


def build_network(
    weights: Weights, device: torch.device | str = "cpu", **changes: Any
) -> DeiT | DiT:
    """The network with its weights, in eval mode on a device.

    `changes` replace arguments of `create_model`; for another image size the position embedding is
    resampled.
    """
    model = network_on_meta(weights, **changes)  # no random init: it would be overwritten
    state = fit_state_dict(weights, model)
    model.load_state_dict(
        {name: aligned(value.to(device, torch.float32)) for name, value in state.items()},
        assign=True,
    )
    return model.requires_grad_(False).eval()


def aligned(value: Tensor) -> Tensor:
    """Copies a tensor if its memory is not aligned, as memory-mapped tensors may be."""
    # The last bit of a matmul depends on the alignment; metrics must not depend on the file layout.
    return value.clone() if value.data_ptr() % ALIGNMENT else value


def load_pretrained(weights: Weights, model: DeiT | DiT, class_names: Sequence[str] = ()) -> None:
    """Loads weights into a new network.

    A head or label table for other classes keeps its random init; the fixed positions of a DiT of
    another size are kept too, and learned frequencies that the weights lack. `class_names` are
    those of the data.
    """
    of_classes = "y_embedder." if isinstance(model, DiT) else "head."
    fresh = (of_classes, "pos_embed") if isinstance(model, DiT) else (of_classes,)
    of_model, of_weights = (
        {n: v for n, v in state.items() if n == MIXED_FREQS}
        for state in (model.state_dict(), weights.state)
    )
    if of_model.keys() != of_weights.keys():  # another kind of RoPE
        others = {n: v for n, v in weights.state.items() if n not in of_weights}
        weights = replace(weights, state={**others, **of_model})
    state = fit_state_dict(weights, model, may_differ=fresh)
    if class_difference(weights.class_names, class_names):
        state = {name: value for name, value in state.items() if not name.startswith(of_classes)}
    model.load_state_dict({**model.state_dict(), **state})


def fit_state_dict(
    weights: Weights, model: DeiT | DiT, may_differ: tuple[str, ...] = ()
) -> StateDict:
    """The state dict for a network, with the position embedding resampled to its grid.

    Raises if tensors are missing, unexpected or of another shape; names with a prefix in
    `may_differ` are left out instead if their shape differs.
    """
    state = dict(weights.state)
    if isinstance(model, DeiT) and "pos_embed" in state:
        rows, columns = weights.options["image_size"]
        patch = weights.options["patch_size"]
        old_grid = rows // patch, columns // patch
        state["pos_embed"] = resize_pos_embed(state["pos_embed"], old_grid, model.grid)
    expected = model.state_dict()
    common = expected.keys() & state.keys()
    reshaped = {name for name in common if state[name].shape != expected[name].shape}
    fresh = {name for name in reshaped if name.startswith(may_differ)}
    differing = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": [name for name in expected if name in reshaped - fresh],
    }
    if any(differing.values()):
        listed = (f"{len(n)} {what} ({_few(n)})" for what, n in differing.items() if n)
        kinds = any(MIXED_FREQS in names for names in differing.values())
        message = f"{weights.file} does not fit {weights.arch}: {'; '.join(listed)}"
        raise CheckpointError(f"{message}: leave --rope-kind out" if kinds else message)
    return {name: value for name, value in state.items() if name not in fresh}


def _few(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
    return ", ".join(names[:SHOWN_KEYS]) + more


def at_size(weights: Weights, size: tuple[int, int], rope: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `create_model` for another size of images or latents, as in finetuning.

    `rope` are the given RoPE options, with which the weights were read.
    """
    scaling, grid = positions_at(as_starting_point(weights), size, rope.get("scaling"))
    name = "input_size" if is_dit(weights.arch) else "image_size"
    return {name: size, "pretrain_grid": grid, "rope": replace(weights.rope, scaling=scaling)}


def starting_point(
    source: Source,
    rope: dict[str, Any],
    *,
    ema: bool = True,
    arch: str = "",
    dit: bool = False,
    download: bool = True,
) -> tuple[StartingPoint, tuple[str, ...]]:
    """Initial weights of a run, and notes for the user; for the arguments see `read_weights`.

    `download`: whether to download weights on the Hub, if they are newer there.
    """
    source = fetch_source(source, download="newest" if download else "never")
    weights = read_weights(source, ema=ema, rope=rope, arch=arch, dit=dit)
    of_run = weights.config if weights.source.run else {}
    images = weights.config.get("images", {})
    if dit and not images:
        height, width = weights.options["input_size"]
        images = {"image_size": (VAE_FACTOR * height, VAE_FACTOR * width)}
    start = replace(
        as_starting_point(weights),
        data=str(of_run.get("data", "")),
        images={name: images[name] for name in ("image_size", "vae") if name in images},
        class_names=weights.class_names,
    )
    return start, weights.notes


def as_starting_point(weights: Weights) -> StartingPoint:
    """Architecture, RoPE options and sizes of weights."""
    return StartingPoint(
        source=str(Path(weights.source.given)),  # without a slash at the end
        arch=weights.arch,
        rope=weights.rope,
        model=DiTModelConfig(class_dropout_prob=0.0, **weights.options)
        if is_dit(weights.arch)
        else ModelConfig(drop_path=0.0, **weights.options),
    )
