"""What a run starts from: the weights of its source, and how they fit it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from spiralrope_cli.core.config.dit_runs import DiTModelConfig, TrainingRun
from spiralrope_cli.core.config.latents import VAE_FACTOR
from spiralrope_cli.core.config.models import is_dit
from spiralrope_cli.core.config.resolve import StartingPoint, fit_positions
from spiralrope_cli.core.config.runs import ModelConfig
from spiralrope_cli.core.errors import CheckpointError
from spiralrope_cli.core.hub.source import Source, find_source
from spiralrope_cli.core.weights import Weights, here, read_weights


def starting_point(
    source: Source, rope: dict[str, Any], *, dit: bool = False
) -> tuple[StartingPoint, tuple[str, ...]]:
    """What a run starts from, for its resolution, and notes for the user.

    Args:
        source: from `find_source`; published weights are fetched if need be.
        rope: field name -> value, options of the user, which win over the source's.
        dit: whether they must be those of a diffusion transformer, or of a classifier.

    Raises:
        CheckpointError: no weights there, or those of another kind of network.
        ConfigError: a bare state dict without RoPE options.
    """
    weights = read_weights(here(source), ema=True, rope=rope)
    if is_dit(weights.arch) != dit:
        raise CheckpointError(
            f"{source.given} holds {weights.arch}, "
            + ("a classifier" if dit else "a diffusion transformer, and no classifier"),
            "finetune starts from those" if dit else "dit-train --init starts from those",
        )
    of_run = weights.config if weights.source.run else {}
    pictures = weights.config.get("pictures", {})
    if dit and not pictures:
        height, width = weights.options["input_size"]
        pictures = {"image_size": (VAE_FACTOR * height, VAE_FACTOR * width)}
    start = replace(
        described(weights),
        data=str(of_run.get("data", "")),
        pictures={name: pictures[name] for name in ("image_size", "vae") if name in pictures},
    )
    return start, weights.notes


def described(weights: Weights) -> StartingPoint:
    """What weights are, without what made them."""
    return StartingPoint(
        source=str(Path(weights.source.given)),  # the same with a slash at its end
        arch=weights.arch,
        rope=weights.rope,
        model=DiTModelConfig(label_dropout=0.0, **weights.options)
        if is_dit(weights.arch)
        else ModelConfig(drop_path=0.0, **weights.options),
    )


def at_size(weights: Weights, size: tuple[int, int], rope: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `create_model` for another size, by the rule that finetuning has.

    Args:
        weights: as read with those options.
        size: of a DeiT's image or a DiT's latent, (height, width).
        rope: field name -> value, the options that the user gave.

    Returns:
        the size by its name, `pretrain_grid` and `rope`.
    """
    start = described(weights)
    name = "input_size" if is_dit(weights.arch) else "image_size"
    values: dict[str, Any] = {
        name: size,
        "scaling": weights.rope.scaling,
        "pretrain_grid": start.model.pretrain_grid,
    }
    origin = "option" if "scaling" in rope else "source"
    fit_positions(values, {"scaling": origin}, start, name)
    scaling = values.pop("scaling")
    return {**values, "rope": replace(weights.rope, scaling=scaling)}


def starting_weights(run: TrainingRun) -> Weights:
    """The averaged weights that a run starts from."""
    return read_weights(here(find_source(run.source)), ema=True, rope=asdict(run.rope))
