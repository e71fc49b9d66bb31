"""Networks, and starting points of runs, from weights that `weights.py` has read."""

from __future__ import annotations

import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spiralrope_cli.core.config.dit_runs import DiTModelConfig
from spiralrope_cli.core.config.latents import VAE_FACTOR
from spiralrope_cli.core.config.models import RopeConfig, is_dit
from spiralrope_cli.core.config.resolve import StartingPoint, positions_at
from spiralrope_cli.core.config.runs import ModelConfig
from spiralrope_cli.core.errors import CheckpointError
from spiralrope_cli.core.hub.published import StateDict
from spiralrope_cli.core.hub.source import Source, find_source
from spiralrope_cli.core.infer import SHOWN_KEYS
from spiralrope_cli.core.models.deit import DeiT, resize_pos_embed
from spiralrope_cli.core.models.dit import DiT
from spiralrope_cli.core.models.factory import create_model
from spiralrope_cli.core.weights import Weights, fetch_source, read_weights

ALIGNMENT = 64  # bytes; of torch's own tensors on a CPU


def network_on_meta(weights: Weights, **changes: Any) -> DeiT | DiT:
    """A network of the weights' sizes without their values; changes replace arguments."""
    with torch.device("meta"):
        return create_model(weights.arch, **{"rope": weights.rope, **weights.options, **changes})


def load_model(
    source: str | Path, *, ema: bool = False, rope: RopeConfig | None = None, arch: str = ""
) -> DeiT | DiT:
    """A model in eval mode, configured by what the source says.

    Args:
        source: a run folder, a checkpoint file of either layout, or a published name, which is
            fetched if need be.
        ema: the averaged weights.
        rope: replaces the source's options; a bare state dict needs them.
        arch: says the number of heads of a bare state dict that is of no published size.

    Raises:
        CheckpointError: no weights there, damaged ones, or another model's.
        ConfigError: no such name, or a bare state dict without options.
        FetchError: published weights that cannot be had.
    """
    chosen = asdict(rope) if rope is not None else {}
    weights = read_weights(fetch_source(find_source(str(source))), ema=ema, rope=chosen, arch=arch)
    for note in weights.notes:
        warnings.warn(note, stacklevel=2)
    return build_network(weights)


def build_network(
    weights: Weights, device: torch.device | str = "cpu", **changes: Any
) -> DeiT | DiT:
    """The network with its weights, in eval mode on a device.

    Changes replace arguments of `create_model`; another image size resamples the position
    embedding.
    """
    model = network_on_meta(weights, **changes)  # initial values would be thrown away
    state = fit_state_dict(weights, model)
    model.load_state_dict(
        {name: aligned(value.to(device, torch.float32)) for name, value in state.items()},
        assign=True,
    )
    return model.requires_grad_(False).eval()


def aligned(value: Tensor) -> Tensor:
    """A tensor at an address that kernels want; one that is mapped from a file can lie anywhere."""
    # The last bit of a matmul depends on it, and no metric may depend on the layout of a file.
    return value.clone() if value.data_ptr() % ALIGNMENT else value


def load_pretrained(weights: Weights, model: DeiT | DiT) -> None:
    """Puts weights into a fresh network; a head or label table of other classes stays fresh.

    So do the fixed positions of a diffusion transformer of another size.
    """
    fresh = ("y_embedder.", "pos_embed") if isinstance(model, DiT) else ("head.",)
    state = fit_state_dict(weights, model, may_differ=fresh)
    model.load_state_dict({**model.state_dict(), **state})


def fit_state_dict(
    weights: Weights, model: DeiT | DiT, may_differ: tuple[str, ...] = ()
) -> StateDict:
    """The weights' tensors as a network takes them, the position embedding resampled to its grid.

    Names that begin as those in `may_differ` are left out where their shapes differ; what else is
    missing, unexpected or reshaped is refused.
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
        "reshaped": [name for name in expected if name in reshaped - fresh],
    }
    if any(differing.values()):
        listed = (f"{len(n)} {what} ({_few(n)})" for what, n in differing.items() if n)
        raise CheckpointError(f"{weights.file} does not fit {weights.arch}: {'; '.join(listed)}")
    return {name: value for name, value in state.items() if name not in fresh}


def _few(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
    return ", ".join(names[:SHOWN_KEYS]) + more


def at_size(weights: Weights, size: tuple[int, int], rope: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `create_model` for another size, by the rule that finetuning has.

    Args:
        weights: as read with those options.
        size: of a DeiT's image or a DiT's latent, (height, width).
        rope: field name -> value, the options that the user gave.
    """
    scaling, grid = positions_at(as_starting_point(weights), size, rope.get("scaling"))
    name = "input_size" if is_dit(weights.arch) else "image_size"
    return {name: size, "pretrain_grid": grid, "rope": replace(weights.rope, scaling=scaling)}


def starting_point(
    source: Source,
    rope: dict[str, Any],
    *,
    arch: str = "",
    dit: bool = False,
    download: bool = True,
) -> tuple[StartingPoint, tuple[str, ...]]:
    """What a run starts from, for its resolution, and notes for the user.

    Args:
        source: from `find_source`; published weights are fetched if need be.
        rope: field name -> value, options of the user, which win over the source's.
        arch: `--arch` of the user, empty for none.
        dit: whether they must be those of a diffusion transformer, or of a classifier.
        download: whether published weights that are not here are fetched.
    """
    here = fetch_source(source, download=download)
    weights = read_weights(here, ema=True, rope=rope, arch=arch)
    if is_dit(weights.arch) != dit:
        raise CheckpointError(
            f"{source.given} holds {weights.arch}, "
            + ("a classifier" if dit else "a diffusion transformer, and no classifier"),
            "finetune starts from those" if dit else "dit-train --init-from starts from those",
        )
    of_run = weights.config if weights.source.run else {}
    images = weights.config.get("images", {})
    if dit and not images:
        height, width = weights.options["input_size"]
        images = {"image_size": (VAE_FACTOR * height, VAE_FACTOR * width)}
    start = replace(
        as_starting_point(weights),
        data=str(of_run.get("data", "")),
        images={name: images[name] for name in ("image_size", "vae") if name in images},
    )
    return start, weights.notes


def as_starting_point(weights: Weights) -> StartingPoint:
    """What weights are, without what made them."""
    return StartingPoint(
        source=str(Path(weights.source.given)),  # the same with a slash at its end
        arch=weights.arch,
        rope=weights.rope,
        model=DiTModelConfig(class_dropout_prob=0.0, **weights.options)
        if is_dit(weights.arch)
        else ModelConfig(drop_path=0.0, **weights.options),
    )
