"""One set of weights of any origin, and what they belong to.

Sizes come from the shapes of the tensors, RoPE options from what was stored beside them: a wrong
`rotate` would load without a sound.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from spiralrope_cli.core.config.models import (
    DiTSize,
    TransformerSize,
    deit_name,
    deit_size,
    dit_name,
    dit_size,
    is_dit,
)
from spiralrope_cli.core.config.option import leaves
from spiralrope_cli.core.config.resolve import fit_channels
from spiralrope_cli.core.config.rope import RopeConfig
from spiralrope_cli.core.errors import CheckpointError, ConfigError
from spiralrope_cli.core.hub.download import fetch, local_path
from spiralrope_cli.core.hub.published import (
    PublishedFile,
    StateDict,
    depth_of,
    freqs_note,
    head_dim_of,
    progress_in,
    read_published,
    rope_from_args,
    without_freqs,
)
from spiralrope_cli.core.hub.source import Source

MODEL_OPTIONS = {
    False: ("num_classes", "image_size", "patch_size", "in_chans", "pretrain_grid"),
    True: ("num_classes", "input_size", "in_chans", "pretrain_grid", "qk_norm"),
}
"""What `create_model` needs beside arch and rope, of a DeiT and of a DiT."""

SHOWN_KEYS = 4
LATENT_SIZE = (32, 32)
"""Of 256 px through the VAE, where a file does not tell."""


@dataclass(frozen=True)
class Weights:
    """One set of weights and what they belong to.

    Attributes:
        source: where they come from.
        file: the file that holds them.
        ema: whether they are averaged ones.
        arch: `--arch`, or its form by numbers for sizes outside the table.
        rope: the options they were trained with, or those of the user in their place.
        options: further arguments of `create_model`.
        state: name -> tensor, mapped from the disk, without frequencies.
        config: the run's config where it is stored beside them, else empty.
        notes: what the user should know, one line each.
        progress: how far they were trained, in words, or nothing.
    """

    source: Source
    file: Path
    ema: bool
    arch: str
    rope: RopeConfig
    options: dict[str, Any]
    state: StateDict
    config: dict[str, Any]
    notes: tuple[str, ...]
    progress: str

    def what(self, kind: str = "") -> str:
        """What was loaded, in words; another kind is named where there is more than one set."""
        kind = kind or ("averaged (EMA)" if self.ema else "raw")
        rope = f"rotate {self.rope.rotate}" if self.rope.enabled else "no RoPE"
        progress = f", {self.progress}" if self.progress else ""
        return f"{kind} weights of {self.arch}, {rope}{progress}"

    def summary(self) -> str:
        """What was loaded and where from, in a line."""
        return f"{self.source.given}: {self.what()}"


def here(source: Source, *, download: bool = True) -> Source:
    """The source on this machine; what is published is fetched, after its size was said.

    Args:
        source: as `find_source` gave it.
        download: whether it may be fetched; a dry run takes only what is here.

    Raises:
        CheckpointError: published, but no network's weights, or not here and not to be fetched.
        FetchError: it cannot be had.
    """
    if source.row is None or source.place is not None:
        return source
    if source.row.kind not in ("deit", "dit"):
        raise CheckpointError(
            f"{source.given} is {source.row.what}, and no weights of a DeiT or DiT",
            "spiralrope fetch --list shows what is what",
        )
    path = local_path(source.row)
    if path is None and not download:
        raise CheckpointError(
            f"the weights of {source.given} are not here, and --dry-run fetches none",
            f"spiralrope fetch {source.given} brings them",
        )
    return dataclasses.replace(source, place=path or fetch(source.row))


def read_weights(
    source: Source, *, ema: bool = False, rope: dict[str, Any] | None = None
) -> Weights:
    """One set of weights of a source that is here.

    Args:
        source: what `find_source` and `here` gave.
        ema: averaged in place of raw ones; a bare state dict has one set alone.
        rope: field name -> value, RoPE options of the user, which win over the source's.

    Raises:
        CheckpointError: damaged, or no DeiT and no DiT.
        ConfigError: a bare state dict without RoPE options.
    """
    file, rope = source.file(ema), rope or {}
    if file.suffix == ".safetensors":
        state, metadata = _read_safetensors(file)
        if "config" in metadata:
            return _of_ours(source, file, ema, state, metadata, rope)
        content = PublishedFile(state, state, False, {})
    else:
        content = read_published(file)
    return _of_published(source, file, ema, content, rope)


def colours(weights: Weights, defaults: dict[str, Any], in_chans: int) -> dict[str, Any]:
    """Mean and std that the weights were trained with, else those of the data set's defaults."""
    known = {**defaults, **weights.config.get("augment", {})}
    values = {"mean": tuple(known["mean"]), "std": tuple(known["std"]), "in_chans": in_chans}
    fit_channels(values)
    return {name: values[name] for name in ("mean", "std")}


def _read_safetensors(file: Path) -> tuple[StateDict, dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            return {name: opened.get_tensor(name) for name in opened.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{file} cannot be read: {reason}") from error


def _of_ours(
    source: Source,
    file: Path,
    ema: bool,
    state: StateDict,
    metadata: dict[str, str],
    rope: dict[str, Any],
) -> Weights:
    try:
        config = json.loads(metadata["config"])
        arch, model = config["arch"], config["model"]
        trained = RopeConfig(**config["rope"])
        options = {name: model[name] for name in MODEL_OPTIONS[is_dit(arch)] if name in model}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} does not say which model it holds: {error}") from error
    used, notes = _override(trained, rope, source)
    averaged = metadata.get("weights") == "ema"
    if ema and not averaged:
        notes = (*notes, f"{file.name} holds raw weights alone; they are taken, not averaged ones")
    return Weights(
        source=source,
        file=file,
        ema=averaged,
        arch=arch,
        rope=used,
        options=_as_tuples(options),
        state=state,
        config=config,
        notes=notes,
        progress=progress_in(metadata),
    )


def _of_published(
    source: Source, file: Path, ema: bool, content: PublishedFile, rope: dict[str, Any]
) -> Weights:
    state, freqs = without_freqs(content.ema if ema else content.raw)
    dit = "x_embedder.proj.weight" in state
    if not dit and ("cls_token" not in state or "blocks.0.gamma_1" not in state):
        some = ", ".join(list(state)[:SHOWN_KEYS])
        raise CheckpointError(
            f"{file} holds neither a DeiT nor a DiT of this project: {len(state)} tensors "
            f"such as {some}"
        )
    trained = rope_from_args(content.args)
    if trained is None and source.row is not None and source.row.rope is not None:
        trained = source.row.rope
    if trained is None and dit and "pos_embed" in state:
        trained = {"enabled": False}
    if trained is None and not {"rotate", "enabled"} & rope.keys():
        raise ConfigError(
            f"{file} does not say which RoPE options it was trained with",
            "give them, --rotate at least, or --no-rope: wrong ones would load without a sound",
        )
    notes: tuple[str, ...] = ()
    said = RopeConfig(**{"scaling": "extrapolate", **(trained or rope)})
    used, notes = _override(said, rope, source)
    try:
        options, arch, head_dim = (_dit_sizes if dit else _deit_sizes)(state, freqs, used, content)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{file} is not whole: {error} is missing or misshaped") from error
    if note := freqs_note(freqs, used, head_dim):
        notes = (*notes, f"{file.name}: {note}")
    averaged = content.args.get("weights") == "ema" or (ema and content.has_both)
    if ema and not averaged:
        notes = (*notes, f"{file.name} holds one set of weights alone; EMA is that one")
    steps = source.row.steps if source.row else None
    return Weights(
        source=source,
        file=file,
        ema=averaged,
        arch=arch,
        rope=used,
        options=_as_tuples(options),
        state=state,
        config={},
        notes=notes,
        progress=content.progress or (f"step {steps}" if steps else ""),
    )


def _override(
    trained: RopeConfig, chosen: dict[str, Any], source: Source
) -> tuple[RopeConfig, tuple[str, ...]]:
    """The options with the user's in place, and a warning for each that contradicts."""
    known = leaves(RopeConfig)
    against = [
        f"{' '.join(known[name].typed(value))} contradicts {source.given}, which was trained with "
        f"{' '.join(known[name].typed(getattr(trained, name)))}"
        for name, value in chosen.items()
        if getattr(trained, name) != value and name != "scaling"
    ]
    return dataclasses.replace(trained, **chosen), tuple(against)


def _as_tuples(options: dict[str, Any]) -> dict[str, Any]:
    """The options with tuples for the lists of a file: a config that holds them can be hashed."""
    return {n: tuple(value) if isinstance(value, list) else value for n, value in options.items()}


def _side(tokens: int, given: Any) -> tuple[int, int]:
    """Rows and columns of a grid: square, unless the file's `grid` says otherwise."""
    if isinstance(given, (list, tuple)) and math.prod(given) == tokens:
        return int(given[0]), int(given[1])
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"the grid of {tokens} patches")
    return side, side


def _deit_sizes(
    state: StateDict, freqs: list[torch.Tensor], rope: RopeConfig, content: PublishedFile
) -> tuple[dict[str, Any], str, int]:
    dim, depth = state["cls_token"].shape[-1], depth_of(state)
    head_dim = head_dim_of(state, freqs, rope, content.args)
    arch = deit_name(TransformerSize(dim, depth, dim // head_dim))
    weight = state["patch_embed.proj.weight"]
    patch = weight.shape[-1]
    rows, columns = _side(state["pos_embed"].shape[1], content.args.get("grid"))
    options = {
        "num_classes": len(state["head.weight"]),
        "image_size": (rows * patch, columns * patch),
        "patch_size": patch,
        "in_chans": weight.shape[1],
        "pretrain_grid": content.args.get("pretrain_grid"),
    }
    return options, arch, deit_size(arch).head_dim


def _dit_sizes(
    state: StateDict, freqs: list[torch.Tensor], rope: RopeConfig, content: PublishedFile
) -> tuple[dict[str, Any], str, int]:
    weight, table = state["x_embedder.proj.weight"], state["y_embedder.embedding_table.weight"]
    dim, depth, patch = weight.shape[0], depth_of(state), weight.shape[-1]
    head_dim = head_dim_of(state, freqs, rope, content.args)
    arch = dit_name(DiTSize(dim, depth, dim // head_dim, patch))
    # With RoPE nothing in the tensors tells the latent's size, and the network takes any.
    input_size = LATENT_SIZE
    if "pos_embed" in state:
        rows, columns = _side(state["pos_embed"].shape[1], content.args.get("grid"))
        input_size = (rows * patch, columns * patch)
    elif (grid := content.args.get("grid")) is not None:
        input_size = (grid[0] * patch, grid[1] * patch)
    options = {
        "num_classes": len(table) - 1,
        "input_size": input_size,
        "in_chans": weight.shape[1],
        "pretrain_grid": content.args.get("pretrain_grid"),
        "qk_norm": any(".q_norm." in name for name in state),
    }
    return options, arch, dit_size(arch).head_dim
