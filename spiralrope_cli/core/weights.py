"""Weights of any SOURCE: tensors, architecture and RoPE options. `load.py` builds networks.

Sizes are taken from the shapes of the tensors. RoPE options must be stored with them or given:
with a wrong `rotate` the weights would load without an error.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from safetensors import SafetensorError

from spiralrope_cli.core.config.datasets import BUILT_IN
from spiralrope_cli.core.config.dit_runs import DiTRun
from spiralrope_cli.core.config.models import RopeConfig, arch_name, is_dit, override_rope, size_of
from spiralrope_cli.core.config.option import leaves, renamed
from spiralrope_cli.core.config.recipes import fit_channels
from spiralrope_cli.core.config.runs import ClassifierRun
from spiralrope_cli.core.config.training import MOST_OF_FIRST
from spiralrope_cli.core.errors import CheckpointError, ConfigError, first_line
from spiralrope_cli.core.hub.download import fetch_published, local_path
from spiralrope_cli.core.hub.published import (
    ZIP_MAGIC,
    PublishedFile,
    StateDict,
    freqs_note,
    head_of,
    plain_names,
    progress_in,
    read_published,
    split_freqs,
)
from spiralrope_cli.core.hub.source import Source
from spiralrope_cli.core.infer import (
    deit_options,
    dit_options,
    has_null_label,
    infer_arch,
    is_dit_state,
    trained_rope,
)
from spiralrope_cli.core.storage import DamagedError, parse, read_safetensors

Download = Literal["newest", "missing", "never"]
LABELS = "y_embedder.embedding_table.weight"
# Arguments of `create_model` besides arch and rope: of a DeiT (False), of a DiT (True).
MODEL_OPTIONS = {
    False: ("num_classes", "image_size", "patch_size", "in_chans", "pretrain_grid"),
    True: ("num_classes", "input_size", "in_chans", "pretrain_grid", "qk_norm"),
}


@dataclass(frozen=True)
class Weights:
    """One set of weights, raw or EMA."""

    source: Source
    file: Path
    ema: bool
    arch: str
    rope: RopeConfig  # as trained, with the options of the user
    options: dict[str, Any]  # further arguments of `create_model`
    state: StateDict  # memory-mapped, without frequencies
    config: dict[str, Any]  # config of the run, if stored with them
    notes: tuple[str, ...]  # for the user, one line each
    progress: str  # such as `step 2200`; empty if unknown

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class number, of the run that trained them; empty where nobody knows."""
        built_in = BUILT_IN.get(str(self.config.get("data")))  # earlier versions stored no names
        names = self.config.get("class_names", built_in.class_names if built_in else ())
        return tuple(map(str, names))

    def what(self, kind: str = "") -> str:
        """Description; `kind` replaces raw or EMA."""
        kind = kind or ("averaged (EMA)" if self.ema else "raw")
        progress = f", {self.progress}" if self.progress else ""
        return f"{kind} weights of {self.arch}, {self.rope.name}{progress}"

    def summary(self) -> str:
        """Source and description, in one line."""
        return f"{self.source.given}: {self.what()}"


def fetch_source(source: Source, *, download: Download = "newest") -> Source:
    """The source with its file; weights on the Hub are downloaded.

    `download` is `newest` where a command begins: workers must read what its plan has read.
    """
    row = source.published
    if row is None or source.place is not None:
        return source
    if row.kind not in ("deit", "dit", "network"):
        raise CheckpointError(
            f"{source.given} is not a DeiT or DiT: {row.what}",
            "spiralrope fetch --list shows all published names",
        )
    # Published names stay as they are.
    newest = download == "newest" and row.listed
    path = None if newest else local_path(row)
    if path is None and download == "never":
        raise CheckpointError(
            f"the weights of {source.given} are not downloaded, and --dry-run does not download",
            f"spiralrope fetch {source.given} downloads them",
        )
    return dataclasses.replace(source, place=path or fetch_published(row))


def read_weights(
    source: Source,
    *,
    ema: bool = False,
    rope: dict[str, Any] | None = None,
    arch: str = "",
    dit: bool | None = None,
    verify: bool = True,
) -> Weights:
    """Reads one set of weights.

    Args:
        source: from `find_source` or `fetch_source`.
        ema: EMA weights, not raw ones; a plain state dict has one set only.
        rope: field name -> value, RoPE options that override those of the source.
        arch: `--arch`, which gives the number of heads if the source does not; empty: not given.
        dit: whether they must be those of a DiT, or of a classifier; None: of either.
        verify: whether to compare checksums and to look for values that are not finite; workers
            do not, because the plan has.
    """
    source, chosen = fetch_source(source, download="missing"), rope or {}
    file = source.file(ema)
    head = head_of(file)
    named_safetensors = file.suffix == ".safetensors"
    if named_safetensors and head.startswith(ZIP_MAGIC):  # torch.load goes by the suffix too
        raise CheckpointError(f"{file} is a file of torch.save", "name it .pth")
    is_safetensors = named_safetensors or head[8:9] == b"{"
    state, metadata = _read_safetensors(file, verify) if is_safetensors else ({}, {})
    state = plain_names(state)
    if "config" in metadata:
        weights = _from_own_layout(source, file, ema, state, metadata, chosen)
    else:
        bare = PublishedFile(state, state, has_both=False, args={})
        content = bare if is_safetensors else read_published(file, verify=verify)
        weights = _from_published_layout(source, file, ema, content, chosen, arch)
    if arch and arch_name(arch) != arch_name(weights.arch):
        message = f"--arch is {arch}, but {source.given} is {weights.arch}"
        raise ConfigError(message, "leave --arch out")
    if dit not in (None, is_dit(weights.arch)):
        kinds = "a classifier, not a DiT" if dit else "a DiT, not a classifier"
        raise CheckpointError(
            f"{source.given} holds {weights.arch}, {kinds}",
            "eval, finetune and plot attention take classifiers; dit-sample and dit-train "
            "--init-from take DiTs",
        )
    state = weights.state if verify else {}
    if bad := [name for name, value in state.items() if not value.isfinite().all()]:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise CheckpointError(
            f"weights are not finite in {file}: {bad[0]}{more}",
            "take an earlier checkpoint, or other weights",
        )
    return weights


def mean_std(weights: Weights, defaults: dict[str, Any], in_chans: int) -> dict[str, Any]:
    """Mean and std of the training, else those of the data set."""
    known = {**defaults, **weights.config.get("augment", {})}
    values = {"mean": tuple(known["mean"]), "std": tuple(known["std"]), "in_chans": in_chans}
    fit_channels(values)
    return {name: values[name] for name in ("mean", "std")}


def _read_safetensors(file: Path, verify: bool) -> tuple[StateDict, dict[str, str]]:
    try:
        return read_safetensors(file, verify=verify)
    except (SafetensorError, OSError, DamagedError) as error:
        raise CheckpointError(f"{file} cannot be read: {first_line(error)}") from error


def _from_own_layout(
    source: Source,
    file: Path,
    ema: bool,
    state: StateDict,
    metadata: dict[str, str],
    chosen: dict[str, Any],
) -> Weights:
    """Safetensors of a run, or exported; the config is in the metadata."""
    try:
        config = parse(metadata["config"])
        config = renamed(config, DiTRun if is_dit(config["arch"]) else ClassifierRun)
        arch, model = config["arch"], config["model"]
        trained = RopeConfig(**config["rope"])
        options = {name: model[name] for name in MODEL_OPTIONS[is_dit(arch)] if name in model}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} has no valid config of a model: {error}") from error
    averaged = metadata.get("weights") == "ema"
    notes = _contradictions(trained, chosen, source)
    if ema and not averaged:
        notes.append(f"{file.name} holds only raw weights; they are used instead of EMA weights")
    optim, steps = config.get("optim", {}), int(metadata.get("step", "0"))
    decay = 0 if optim.get("ema_warmup") else optim.get("ema_decay", 0)
    if averaged and decay and (fraction := decay**steps) > MOST_OF_FIRST:
        notes.append(
            f"{fraction:.0%} of the EMA weights in {file} are still the first ones: "
            f"{steps} steps were few for a decay of {decay:g}; the raw ones are trained (--no-ema)"
        )
    return Weights(
        source=source,
        file=file,
        ema=averaged,
        arch=arch,
        rope=override_rope(trained, chosen),
        options=_as_tuples(options),
        state=state,
        config=config,
        notes=tuple(notes),
        progress=progress_in(metadata),
    )


def _from_published_layout(
    source: Source, file: Path, ema: bool, content: PublishedFile, chosen: dict[str, Any], arch: str
) -> Weights:
    """A published file or a plain state dict, in three steps: network, RoPE options, sizes.

    `arch` is that of the user; empty: not given.
    """
    state, freqs = split_freqs(content.ema if ema else content.raw)
    dit = is_dit_state(file, state)
    trained = trained_rope(source, file, state, content.args, chosen)
    rope = override_rope(trained, chosen)
    notes = _contradictions(trained, chosen, source)
    try:
        arch = infer_arch(file, state, freqs, rope, content.args, arch, notes)
        options = (dit_options if dit else deit_options)(file, state, content.args, notes)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"{file} is incomplete: {error} is missing or has a wrong shape"
        ) from error
    known = {"class_dropout_prob": content.args.get("class_dropout_prob")}
    if dit and not has_null_label(len(state[LABELS]), content.args):
        state = {**state, LABELS: F.pad(state[LABELS], (0, 0, 0, 1))}
        known = {"class_dropout_prob": 0}
    if note := freqs_note(freqs, rope, size_of(arch).head_dim):
        notes.append(f"{file.name}: {note}")
    averaged = content.args.get("weights") == "ema" or (ema and content.has_both)
    if ema and not averaged:
        notes.append(f"{file.name} holds only one set of weights; it is used as EMA weights")
    config: dict[str, Any] = {}  # what an export of ours has of its run's
    if known["class_dropout_prob"] is not None:
        config["model"] = known
    if isinstance(names := content.args.get("class_names"), list):
        config["class_names"] = names
    steps = source.published.steps if source.published else None
    return Weights(
        source=source,
        file=file,
        ema=averaged,
        arch=arch,
        rope=rope,
        options=_as_tuples(options),
        state=state,
        config=config,
        notes=tuple(notes),
        progress=content.progress or (f"step {steps}" if steps else ""),
    )


def _contradictions(trained: RopeConfig, chosen: dict[str, Any], source: Source) -> list[str]:
    """A warning for each given RoPE option that differs from training."""
    known = leaves(RopeConfig)
    return [
        f"{' '.join(known[name].typed(value))} contradicts {source.given}, which was trained with "
        f"{' '.join(known[name].typed(getattr(trained, name)))}"
        for name, value in chosen.items()
        if getattr(trained, name) != value and name != "scaling"
    ]


def _as_tuples(options: dict[str, Any]) -> dict[str, Any]:
    """Replaces lists by tuples, so that configs with these values are hashable."""
    return {n: tuple(value) if isinstance(value, list) else value for n, value in options.items()}
