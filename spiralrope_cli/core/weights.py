"""Weights of any origin: their tensors, and what they belong to. `load.py` makes networks of them.

Sizes come from the shapes of the tensors, RoPE options from what was stored beside them: a wrong
`rotate` would load without a sound.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors import SafetensorError

from spiralrope_cli.core.checksum import DamagedError, read_safetensors
from spiralrope_cli.core.config.dit_runs import DiTRun
from spiralrope_cli.core.config.models import RopeConfig, deit_size, dit_size, is_dit
from spiralrope_cli.core.config.nested import renamed
from spiralrope_cli.core.config.option import leaves
from spiralrope_cli.core.config.resolve import fit_channels
from spiralrope_cli.core.config.runs import ClassifierRun
from spiralrope_cli.core.errors import CheckpointError
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
from spiralrope_cli.core.infer import (
    check_arch,
    deit_options,
    dit_options,
    has_null_label,
    infer_arch,
    is_dit_state,
    trained_rope,
)

LABELS = "y_embedder.embedding_table.weight"
# What `create_model` needs beside arch and rope, of a DeiT and of a DiT.
MODEL_OPTIONS = {
    False: ("num_classes", "image_size", "patch_size", "in_chans", "pretrain_grid"),
    True: ("num_classes", "input_size", "in_chans", "pretrain_grid", "qk_norm"),
}


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
    source: Source, *, ema: bool = False, rope: dict[str, Any] | None = None, arch: str = ""
) -> Weights:
    """One set of weights of a source that is here.

    Args:
        source: what `find_source` and `fetch_source` gave.
        ema: averaged in place of raw ones; a bare state dict has one set alone.
        rope: field name -> value, RoPE options of the user, which win over the source's.
        arch: `--arch`, which says the number of heads where the source does not; empty for none.

    Raises:
        CheckpointError: weights of another network, damaged ones, or some that are not finite.
        ConfigError: options that the source does not tell are missing, or another `arch`.
    """
    file, chosen = source.file(ema), rope or {}
    state, metadata = _read_safetensors(file) if file.suffix == ".safetensors" else ({}, {})
    if "config" in metadata:
        weights = _from_own_layout(source, file, ema, state, metadata, chosen)
    else:
        bare = PublishedFile(state, state, has_both=False, args={})
        content = bare if state else read_published(file)
        weights = _from_published_layout(source, file, ema, content, chosen, arch)
    if arch:
        check_arch(arch, weights.arch, source.given)
    bad = [name for name, value in weights.state.items() if not value.isfinite().all()]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise CheckpointError(
            f"weights are not finite in {file}: {bad[0]}{more}",
            "take an earlier checkpoint, or other weights",
        )
    return weights


def mean_std(weights: Weights, defaults: dict[str, Any], in_chans: int) -> dict[str, Any]:
    """Mean and std that the weights were trained with, else those of the data set's defaults."""
    known = {**defaults, **weights.config.get("augment", {})}
    values = {"mean": tuple(known["mean"]), "std": tuple(known["std"]), "in_chans": in_chans}
    fit_channels(values)
    return {name: values[name] for name in ("mean", "std")}


def _read_safetensors(file: Path) -> tuple[StateDict, dict[str, str]]:
    try:
        return read_safetensors(file)
    except (SafetensorError, OSError, DamagedError) as error:
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
    source: Source,
    file: Path,
    ema: bool,
    content: PublishedFile,
    chosen: dict[str, Any],
    arch: str,
) -> Weights:
    """A published file or a bare state dict, in three steps: the network, its RoPE, its sizes.

    `arch` is the user's, empty for none.
    """
    state, freqs = split_freqs(content.ema if ema else content.raw)
    dit = is_dit_state(file, state)
    trained = trained_rope(source, file, state, content.args, chosen)
    rope = dataclasses.replace(trained, **chosen)
    notes = _contradictions(trained, chosen, source)
    try:
        arch = infer_arch(file, state, freqs, rope, content.args, arch, notes)
        options = (dit_options if dit else deit_options)(file, state, content.args, notes)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{file} is not whole: {error} is missing or misshaped") from error
    known = {"class_dropout_prob": content.args.get("class_dropout_prob")}
    if dit and not has_null_label(len(state[LABELS]), content.args):
        state = {**state, LABELS: F.pad(state[LABELS], (0, 0, 0, 1))}
        known = {"class_dropout_prob": 0}
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
        config={"model": known} if known["class_dropout_prob"] is not None else {},
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
