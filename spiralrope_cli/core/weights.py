"""Weights of any origin: their tensors, and what they belong to. `load.py` makes networks of them.

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

from safetensors import SafetensorError, safe_open
from torch import Tensor

from spiralrope_cli.core.config.dit_runs import DiTRun
from spiralrope_cli.core.config.models import (
    DEIT_SIZES,
    DIT_SIZES,
    DiTSize,
    RopeConfig,
    TransformerSize,
    deit_name,
    deit_size,
    dit_name,
    dit_size,
    is_dit,
)
from spiralrope_cli.core.config.nested import renamed
from spiralrope_cli.core.config.option import leaves
from spiralrope_cli.core.config.resolve import fit_channels
from spiralrope_cli.core.config.runs import ClassifierRun
from spiralrope_cli.core.errors import CheckpointError, ConfigError
from spiralrope_cli.core.hub.download import fetch_published, local_path
from spiralrope_cli.core.hub.published import (
    PublishedFile,
    StateDict,
    freqs_note,
    progress_in,
    read_published,
    split_freqs,
)
from spiralrope_cli.core.hub.source import Source

# What `create_model` needs beside arch and rope, of a DeiT and of a DiT.
MODEL_OPTIONS = {
    False: ("num_classes", "image_size", "patch_size", "in_chans", "pretrain_grid"),
    True: ("num_classes", "input_size", "in_chans", "pretrain_grid", "qk_norm"),
}
LATENT_SIZE = (32, 32)  # of 256 px through the VAE, where a file does not tell
SHOWN_KEYS = 4


@dataclass(frozen=True)
class Weights:
    """One set of weights and what they belong to."""

    source: Source
    file: Path
    ema: bool  # whether they are averaged ones
    arch: str  # `--arch`, or its form by numbers for sizes outside the table
    rope: RopeConfig  # as they were trained, but for what the user chose
    options: dict[str, Any]  # further arguments of `create_model`
    state: StateDict  # mapped from the disk, without frequencies
    config: dict[str, Any]  # of the run, where it is stored with them
    notes: tuple[str, ...]  # what the user should know, one line each
    progress: str  # how far they were trained, in words, or nothing

    def what(self, kind: str = "") -> str:
        """What was loaded, in words; `kind` names both sets where there are two."""
        kind = kind or ("averaged (EMA)" if self.ema else "raw")
        rope = f"rotate {self.rope.rotate}" if self.rope.enabled else "no RoPE"
        progress = f", {self.progress}" if self.progress else ""
        return f"{kind} weights of {self.arch}, {rope}{progress}"

    def summary(self) -> str:
        """What was loaded and where from, in a line."""
        return f"{self.source.given}: {self.what()}"


def fetch_source(source: Source, *, download: bool = True) -> Source:
    """The source on this machine; what is published is fetched, unless `download` is off."""
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
    return dataclasses.replace(source, place=path or fetch_published(source.row))


def read_weights(
    source: Source, *, ema: bool = False, rope: dict[str, Any] | None = None
) -> Weights:
    """One set of weights of a source that is here.

    Args:
        source: what `find_source` and `fetch_source` gave.
        ema: averaged in place of raw ones; a bare state dict has one set alone.
        rope: field name -> value, RoPE options of the user, which win over the source's.
    """
    file, chosen = source.file(ema), rope or {}
    if file.suffix != ".safetensors":
        return _from_published_layout(source, file, ema, read_published(file), chosen)
    state, metadata = _read_safetensors(file)
    if "config" in metadata:
        return _from_own_layout(source, file, ema, state, metadata, chosen)
    bare = PublishedFile(state, state, has_both=False, args={})
    return _from_published_layout(source, file, ema, bare, chosen)


def mean_std(weights: Weights, defaults: dict[str, Any], in_chans: int) -> dict[str, Any]:
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


def _from_own_layout(
    source: Source,
    file: Path,
    ema: bool,
    state: StateDict,
    metadata: dict[str, str],
    chosen: dict[str, Any],
) -> Weights:
    """Our own safetensors, of a run or exported, whose metadata holds the run's config."""
    try:
        config = json.loads(metadata["config"])
        config = renamed(config, DiTRun if is_dit(config["arch"]) else ClassifierRun)
        arch, model = config["arch"], config["model"]
        trained = RopeConfig(**config["rope"])
        options = {name: model[name] for name in MODEL_OPTIONS[is_dit(arch)] if name in model}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} does not say which model it holds: {error}") from error
    averaged = metadata.get("weights") == "ema"
    notes = _contradictions(trained, chosen, source)
    if ema and not averaged:
        notes.append(f"{file.name} holds raw weights alone; they are taken, not averaged ones")
    return Weights(
        source=source,
        file=file,
        ema=averaged,
        arch=arch,
        rope=dataclasses.replace(trained, **chosen),
        options=_as_tuples(options),
        state=state,
        config=config,
        notes=tuple(notes),
        progress=progress_in(metadata),
    )


def _from_published_layout(
    source: Source, file: Path, ema: bool, content: PublishedFile, chosen: dict[str, Any]
) -> Weights:
    """A published file or a bare state dict, in three steps: the network, its RoPE, its sizes."""
    state, freqs = split_freqs(content.ema if ema else content.raw)
    dit = _is_dit_state(file, state)
    trained = _trained_rope(source, file, state, content.args, chosen)
    rope = dataclasses.replace(trained, **chosen)
    notes = _contradictions(trained, chosen, source)
    try:
        head_dim = _head_dim(state, freqs, rope, content.args)
        arch, options = (_dit_sizes if dit else _deit_sizes)(state, head_dim, content.args)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{file} is not whole: {error} is missing or misshaped") from error
    size = dit_size(arch) if dit else deit_size(arch)
    if note := freqs_note(freqs, rope, size.head_dim):
        notes.append(f"{file.name}: {note}")
    averaged = content.args.get("weights") == "ema" or (ema and content.has_both)
    if ema and not averaged:
        notes.append(f"{file.name} holds one set of weights alone; EMA is that one")
    steps = source.row.steps if source.row else None
    return Weights(
        source=source,
        file=file,
        ema=averaged,
        arch=arch,
        rope=rope,
        options=_as_tuples(options),
        state=state,
        config={},
        notes=tuple(notes),
        progress=content.progress or (f"step {steps}" if steps else ""),
    )


def _contradictions(trained: RopeConfig, chosen: dict[str, Any], source: Source) -> list[str]:
    """A warning for each option of the user that the weights were not trained with."""
    known = leaves(RopeConfig)
    return [
        f"{' '.join(known[name].typed(value))} contradicts {source.given}, which was trained with "
        f"{' '.join(known[name].typed(getattr(trained, name)))}"
        for name, value in chosen.items()
        if getattr(trained, name) != value and name != "scaling"
    ]


def _as_tuples(options: dict[str, Any]) -> dict[str, Any]:
    """The options with tuples for the lists of a file: a config that holds them can be hashed."""
    return {n: tuple(value) if isinstance(value, list) else value for n, value in options.items()}


def _is_dit_state(file: Path, state: StateDict) -> bool:
    """Whether tensors are those of a DiT; else they are a DeiT's, or refused."""
    if "x_embedder.proj.weight" in state:
        return True
    if "cls_token" in state and "blocks.0.gamma_1" in state:
        return False
    some = ", ".join(list(state)[:SHOWN_KEYS])
    raise CheckpointError(
        f"{file} holds neither a DeiT nor a DiT of this project: "
        f"{len(state)} tensors such as {some}"
    )


def _trained_rope(
    source: Source, file: Path, state: StateDict, args: dict[str, Any], chosen: dict[str, Any]
) -> RopeConfig:
    """RoPE options of the file, of the catalogue, or of the user where nothing else knows them."""
    trained = _rope_in_args(args)
    if trained is None and source.row is not None:
        trained = source.row.rope
    # A DiT has fixed positions in place of RoPE; a DeiT's learned ones say nothing.
    if trained is None and {"x_embedder.proj.weight", "pos_embed"} <= state.keys():
        trained = {"enabled": False}
    if trained is None and not {"rotate", "enabled"} & chosen.keys():
        raise ConfigError(
            f"{file} does not say which RoPE options it was trained with",
            "give them, --rotate at least, or --no-rope: wrong ones would load without a sound",
        )
    return RopeConfig(**{"scaling": "extrapolate", **(trained or chosen)})


def _rope_in_args(args: dict[str, Any]) -> dict[str, Any] | None:
    """RoPE options of a run's `args`, by the fields of RopeConfig; None where they have none.

    DiT files put `rope_` in front of the names, DeiT files do not.
    """
    if args.get("use_rope") is False:
        return {"enabled": False}
    prefix = "rope_" if "rope_rotate" in args else ""
    if f"{prefix}rotate" not in args:
        return None
    fields = RopeConfig.__dataclass_fields__
    found = {name: args[prefix + name] for name in fields if prefix + name in args}
    return {**found, "theta": float(found.get("theta", RopeConfig.theta))}


def _head_dim(state: StateDict, freqs: list[Tensor], rope: RopeConfig, args: dict[str, Any]) -> int:
    """Channels per head: by the frequencies, the file's `num_heads`, or the tables of sizes."""
    if freqs:
        shared = rope.same_theta and rope.freqs_for == "lang"
        return 4 * len(freqs[0]) * (max(rope.rotate, 1) if shared else 1)
    dim = state["blocks.0.attn.proj.bias"].shape[0]
    if heads := args.get("num_heads"):
        return dim // int(heads)
    sizes: list[TransformerSize | DiTSize] = [*DEIT_SIZES.values(), *DIT_SIZES.values()]
    return {(size.dim, size.depth): size.head_dim for size in sizes}.get((dim, _depth(state)), 64)


def _depth(state: StateDict) -> int:
    return 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))


def _deit_sizes(
    state: StateDict, head_dim: int, args: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """`--arch`, and further arguments of `create_model`."""
    dim, weight = state["cls_token"].shape[-1], state["patch_embed.proj.weight"]
    patch = weight.shape[-1]
    rows, columns = _grid(state["pos_embed"], args)
    options = {
        "num_classes": len(state["head.weight"]),
        "image_size": (rows * patch, columns * patch),
        "patch_size": patch,
        "in_chans": weight.shape[1],
        "pretrain_grid": args.get("pretrain_grid"),
    }
    return deit_name(TransformerSize(dim, _depth(state), dim // head_dim)), options


def _dit_sizes(state: StateDict, head_dim: int, args: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """`--arch`, and further arguments of `create_model`."""
    weight, table = state["x_embedder.proj.weight"], state["y_embedder.embedding_table.weight"]
    dim, patch = weight.shape[0], weight.shape[-1]
    # With RoPE nothing in the tensors tells the latent's size, and the network takes any.
    input_size = LATENT_SIZE
    grid = _grid(state["pos_embed"], args) if "pos_embed" in state else args.get("grid")
    if grid is not None:
        input_size = (grid[0] * patch, grid[1] * patch)
    options = {
        "num_classes": len(table) - 1,
        "input_size": input_size,
        "in_chans": weight.shape[1],
        "pretrain_grid": args.get("pretrain_grid"),
        "qk_norm": any(".q_norm." in name for name in state),
    }
    return dit_name(DiTSize(dim, _depth(state), dim // head_dim, patch)), options


def _grid(pos_embed: Tensor, args: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of patches: square, unless the file's `grid` says otherwise."""
    tokens, given = pos_embed.shape[1], args.get("grid")
    if isinstance(given, (list, tuple)) and math.prod(given) == tokens:
        return int(given[0]), int(given[1])
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"the grid of {tokens} patches")
    return side, side
