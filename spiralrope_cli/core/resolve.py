"""Resolves options to a run, in layers; a later one overrides an earlier one.

Recipe, data set, initial weights, cached latents, config file, options. It looks at the data, and
loads no torch.
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from spiralrope_cli.core.config import recipes
from spiralrope_cli.core.config.datasets import DataSet, slug_of
from spiralrope_cli.core.config.dit_runs import (
    LATENT_CHANNELS,
    RUN_KINDS,
    DiTModelConfig,
    DiTRun,
    ImageConfig,
    TrainingRun,
    full_vae_name,
    input_size,
)
from spiralrope_cli.core.config.models import (
    RopeConfig,
    Scaling,
    arch_name,
    check_rotate,
    deit_size,
    dit_size,
)
from spiralrope_cli.core.config.option import build, flat_values, idle_lines, leaves, read_values
from spiralrope_cli.core.config.recipes import fit_channels
from spiralrope_cli.core.config.runs import ModelConfig
from spiralrope_cli.core.config.training import RUNS_FOLDER
from spiralrope_cli.core.data.shards import CacheMetadata, read_cache
from spiralrope_cli.core.data.splits import find_data_set, find_train_set
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.runtime.launch import world_size
from spiralrope_cli.core.runtime.run_folder import micro_batch_so_far, read_config, steps_on_disk
from spiralrope_cli.core.storage import CONFIG_FILE

DATA_VARIABLE = "SPIRALROPE_DATA"
NOT_FROM_FILE = {"command", "out", "num_train", "num_val", "num_classes", "class_names", "resume"}
"""Fields of a config file that a repeated run determines again."""

Layer = tuple[str, dict[str, Any]]
"""Origin of values, and field name -> value."""


FIXED_BY_SOURCE = {
    *("arch", "patch_size", "in_chans", "pretrain_grid", "qk_norm", "source"),
    *(RopeConfig.__dataclass_fields__.keys() - {"scaling"}),
}
"""Fields that initial weights decide, not a config file."""


@dataclass(frozen=True)
class StartingPoint:
    """Initial weights of a run."""

    source: str  # as the user named them
    arch: str
    rope: RopeConfig  # as trained
    model: ModelConfig | DiTModelConfig
    data: str = ""  # data set of their run, if known
    images: dict[str, Any] = field(default_factory=dict)  # image_size, vae of a DiT, if known
    class_names: tuple[str, ...] = ()  # by class number, if known

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the network's input."""
        if isinstance(self.model, ModelConfig):
            return self.model.image_size
        return self.model.input_size

    @property
    def grid(self) -> tuple[int, int]:
        if isinstance(self.model, ModelConfig):
            return self.model.grid
        return self.model.grid(self.arch)

    def fields(self) -> dict[str, Any]:
        """Field name -> value, for the fields that they decide."""
        values = {**dataclasses.asdict(self.rope), **dataclasses.asdict(self.model)}
        for name in ("drop_path", "class_dropout_prob"):  # options of training, not of weights
            values.pop(name, None)
        if self.rope.rope_kind != "spiral":
            del values["rotate"]
        values.update(self.images, source=self.source, arch=self.arch)
        return {**values, "data": self.data} if self.data else values


@dataclass(frozen=True)
class Resolved:
    """A run, and the origin of each value.

    Attributes:
        run: complete and checked.
        sources: field name -> `option`, `config file`, `latents`, `source`, `data set`, `recipe`,
            `environment`, `fit` to the run, `default`.
        warnings: what was fitted, has no effect or does not count, one line each.
    """

    run: Any  # ClassifierRun or DiTRun
    sources: dict[str, str]
    warnings: tuple[str, ...]


def resolve(
    command: str,
    options: dict[str, Any],
    *,
    config_file: str = "",
    name: str = "",
    start: StartingPoint | None = None,
) -> Resolved:
    """Resolves a run of `pretrain`, `finetune` or `dit-train`.

    `options` are only those that the user gave; `config_file` is of an earlier run, or empty.
    """
    kind, dit = RUN_KINDS[command], command == "dit-train"
    of_start: Layer = ("source", start.fields() if start else {})
    file: Layer = ("config file", values_of_file(kind, config_file, start))
    default = default_data()
    given = {**default[1], **of_start[1], **file[1], **options}
    cache: CacheMetadata | None = None
    of_latents: Layer = ("latents", {})
    if dit and given.get("latents"):
        cache = read_cache(Path(given["latents"]))
        data_set = cached_data_set(cache)
        of_latents = ("latents", {"image_size": cache.plan.image_size, "vae": cache.plan.vae})
    else:
        data_set = (find_train_set if dit else find_data_set)(given["data"])
    arch = given.get("arch", data_set.default_dit if dit else data_set.default_arch)
    arch = arch_name(dit_size(arch)) if dit else checked_deit(arch)
    layers: list[Layer] = [
        ("data set", {"arch": arch}),
        ("recipe", recipes.recipe(command, arch, data_set.num_classes)),
        ("data set", data_set.defaults_of(command)),
        of_start,
        of_latents,
        file,
        ("option", options),
        ("data set", {"num_classes": data_set.num_classes, "class_names": data_set.class_names}),
    ]
    merged = {name: value for _, layer in layers for name, value in layer.items()}
    sources = {name: origin for origin, layer in layers for name in layer}
    sources["data"] = "latents" if cache else sources.get("data", default[0])
    values = read_values(leaves(kind), merged)
    rope_kind = values.get("rope_kind", RopeConfig.rope_kind)
    check_rotate(options, rope_kind)
    if rope_kind != "spiral":
        values["rotate"], sources["rotate"] = 0, "default"
    values.update(command=command, arch=arch, data=data_set.data)
    values.update(num_train=data_set.num_train, num_val=data_set.num_val)
    if dit:
        fit_input(values, data_set, cache)
        if start:
            check_start(values, start)
    else:
        fit_channels(values)
    if start:
        fit_positions(values, sources, start, "input_size" if dit else "image_size")
    if "epochs" in options and "max_steps" not in options:  # which win over those of a file
        values["max_steps"], sources["max_steps"] = 0, "option"
    fitted = recipes.fit_to_run(values, sources)
    rotation = f"r{values['rotate']}" if rope_kind == "spiral" else rope_kind
    if not values.get("enabled", RopeConfig.enabled):
        rotation = "norope"
    # No date in the name, so that the same command finds its own folder.
    values.setdefault("out", named_folder(command, arch, slug_of(data_set.data), rotation, name))
    run = build(kind, values)
    if not dit:
        run.augment.check_data(data_set)
    inert = [*run.rope.inert_options(set(options)), *run.optim.inert_options()]
    inert += [*data_set.inert_options(), *run.inert_options()]
    if dit and sources["rotate"] == "recipe" and run.rope.enabled and rope_kind == "spiral":
        fitted.append("RoPE is axial by default, as published: --rotate 2 gives four directions")
    notes = (*data_set.notes, *fitted, *idle_lines(kind, inert, options))
    return Resolved(run, sources, notes)


def checked_deit(arch: str) -> str:
    """The name, as given; raises if it is no DeiT."""
    deit_size(arch)
    return arch


def as_begun(resolved: Resolved) -> Resolved:
    """The run with the micro-batch, if it splits, and the EMA warm-up of its folder, unless given.

    Earlier versions had no such warm-up.
    """
    run, file = resolved.run, Path(resolved.run.out) / CONFIG_FILE
    if not (file.is_file() and steps_on_disk(file.parent)):
        return resolved
    before, sources = read_config(file, type(run)), dict(resolved.sources)
    kept = {}
    if sources["ema_warmup"] == "recipe":
        kept["ema_warmup"] = before.get("ema_warmup")
    if "micro_batch_size" not in sources and (
        size := micro_batch_so_far(run, world_size(run.machine))
    ):
        kept["micro_batch_size"] = size
    run = build(type(run), {**flat_values(run), **kept})
    return replace(resolved, run=run, sources={**sources, **dict.fromkeys(kept, "config file")})


def default_data() -> Layer:
    if variable := os.environ.get(DATA_VARIABLE):
        return "environment", {"data": variable}
    return "default", {"data": "digits"}


def cached_data_set(cache: CacheMetadata) -> DataSet:
    """The data set of cached latents."""
    return DataSet(
        data=cache.plan.data,
        kind="latents",
        default_arch="",
        class_names=cache.plan.class_names,
        num_train=cache.count,
        num_val=0,
    )


def values_of_file(
    kind: type[TrainingRun], config_file: str, start: StartingPoint | None
) -> dict[str, Any]:
    """Values of a config file; raises if its run has initial weights but none are given."""
    from_file = read_config(Path(config_file), kind) if config_file else {}
    if from_file.get("source") and not start:
        again = "dit-train --init-from" if kind is DiTRun else "finetune"
        raise ConfigError(
            f"--config {config_file} is of a run with initial weights {from_file['source']}",
            f"spiralrope {again} {from_file['source']} --config {config_file}",
        )
    fixed = NOT_FROM_FILE | (FIXED_BY_SOURCE if start else set())
    if from_file.get("rope_kind", "spiral") != "spiral":
        check_rotate(from_file, from_file["rope_kind"])
        fixed = fixed | {"rotate"}
    return {key: value for key, value in from_file.items() if key not in fixed}


def fit_input(values: dict[str, Any], data_set: DataSet, cache: CacheMetadata | None) -> None:
    """Sets input size and channels of a DiT, from image size and VAE."""
    values["vae"] = full_vae_name(values["vae"])
    images: ImageConfig = build(ImageConfig, values)
    if cache:
        cache.check_fits(images.image_size, images.vae)
    values["input_size"] = input_size(values["arch"], images.image_size, images.vae)
    channels = 1 if data_set.kind == "memory" else 3
    values["in_chans"] = LATENT_CHANNELS if images.in_latents else channels


def check_start(values: dict[str, Any], start: StartingPoint) -> None:
    """Raises if options contradict the initial weights."""
    if values["in_chans"] != start.model.in_chans:
        raise ConfigError(
            f"--init-from {start.source} takes {start.model.in_chans} channels; {values['data']} "
            f"with --vae {values['vae']} has {values['in_chans']}",
            "use --vae and --data of the kind that it was trained with",
        )
    if values["qk_norm"] != getattr(start.model, "qk_norm", None):
        raise ConfigError(
            f"--qk-norm does not fit --init-from {start.source}", "leave it out: the weights decide"
        )


def positions_at(
    start: StartingPoint, size: tuple[int, int], scaling: Scaling | None
) -> tuple[Scaling, tuple[int, int] | None]:
    """Scaling and `pretrain_grid` of a network of another size than its weights were trained with.

    Positions are interpolated unless the user says otherwise (`scaling`, or None). The scaling of
    the weights is not used: published weights have `extrapolate`, without effect at their own size.
    """
    if size == start.size:
        return scaling or start.rope.scaling, start.model.pretrain_grid
    return scaling or "interpolate", start.model.pretrain_grid or start.grid


def fit_positions(
    values: dict[str, Any], sources: dict[str, str], start: StartingPoint, size: str
) -> None:
    """Sets scaling and pretrain_grid; `size` is the field of the network's size."""
    chosen, now = None if sources["scaling"] == "source" else values["scaling"], tuple(values[size])
    values["scaling"], values["pretrain_grid"] = positions_at(start, now, chosen)
    if chosen is None and now != start.size:
        sources["scaling"] = "default"


def named_folder(*words: str) -> str:
    """A folder in runs/, named by the words that are not empty."""
    return str(Path(RUNS_FOLDER) / re.sub(r"[^\w.-]+", "-", "-".join(filter(None, words))))
