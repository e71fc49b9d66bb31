"""From options to a training run of a diffusion transformer. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from spiralrope_cli.core.config import inert, recipes
from spiralrope_cli.core.config.datasets import DataSet, find_pictures, slug_of
from spiralrope_cli.core.config.dit_runs import DiTRun, PictureConfig, full_vae_name, input_size
from spiralrope_cli.core.config.latents import LATENT_CHANNELS, Manifest, read_manifest
from spiralrope_cli.core.config.models import dit_name, dit_size
from spiralrope_cli.core.config.nested import build
from spiralrope_cli.core.config.resolve import (
    Resolved,
    StartingPoint,
    choose,
    choose_data,
    chosen_layers,
    fit_length,
    fit_name,
    fit_positions,
    merged,
)
from spiralrope_cli.core.errors import ConfigError


def resolve_dit(
    options: dict[str, Any], config_file: Path | None = None, start: StartingPoint | None = None
) -> Resolved[DiTRun]:
    """A diffusion transformer's training run from what the user gave.

    Args:
        options: field name -> value, given options alone.
        config_file: a `config.yaml` of an earlier run.
        start: the weights to start from, if any.

    Raises:
        ConfigError: an unknown key, or a value that cannot work.
        DataError: no such data set.
    """
    chosen = chosen_layers(DiTRun, options, config_file, start)
    latents, _ = choose("latents", chosen, "")
    if latents:
        latents = os.path.normpath(os.path.expanduser(latents))  # `lat` and `lat/` are one
        cache = read_manifest(Path(latents))
        data_set, data_source = of_cache(cache), "latents"
        plan = cache.plan
        chosen.insert(1, ("latents", {"image_size": plan.image_size, "vae": plan.vae}))
    else:
        data, data_source = choose_data(chosen)
        data_set = find_pictures(data)
    arch, arch_source = choose("arch", chosen, data_set.default_dit)
    arch = dit_name(arch)
    values, sources = merged(
        ("recipe", recipes.DIT),
        ("data set", data_set.dit),
        *chosen,
        ("data set", {"num_classes": data_set.num_classes}),
    )
    values["latents"] = latents
    values.update(command="dit-train", arch=arch, data=data_set.data, num_train=data_set.num_train)
    sources.update(data=data_source, arch=arch_source)
    values["vae"] = full_vae_name(values["vae"])
    pictures: PictureConfig = build(PictureConfig, values)
    if latents:
        cache.check_fits(pictures.image_size, pictures.vae)
    fit_input(values, pictures, data_set)
    if start:
        check_start(values, start)
        fit_positions(values, sources, start, "input_size")
    fit_length(values, sources, options)
    fit_name(values, sources, data_set, dit_size(arch).head_dim)
    run: DiTRun = build(DiTRun, values)
    return Resolved(run, sources, tuple(inert.dit_notes(run, data_set, set(options))))


def of_cache(cache: Manifest) -> DataSet:
    """Cached latents as a data set."""
    return DataSet(
        data=cache.plan.data,
        slug=slug_of(Path(cache.plan.data)),
        kind="latents",
        default_arch="",
        num_classes=len(cache.plan.class_names),
        num_train=cache.count,
        num_val=0,
    )


def fit_input(values: dict[str, Any], pictures: PictureConfig, data_set: DataSet) -> None:
    """What the network is given, by pictures and VAE.

    Raises:
        ConfigError: a size that does not split into patches.
    """
    values["input_size"] = input_size(values["arch"], pictures.image_size, pictures.vae)
    of_pictures = 1 if data_set.kind == "memory" else 3
    values["in_chans"] = LATENT_CHANNELS if pictures.in_latents else of_pictures


def check_start(values: dict[str, Any], start: StartingPoint) -> None:
    """Refuses options that contradict the weights to start from.

    Raises:
        ConfigError: names both.
    """
    if values["arch"] != dit_name(start.arch):
        raise ConfigError(
            f"--arch is {values['arch']}, --init {start.source} is {start.arch}",
            "leave --arch out",
        )
    if values["in_chans"] != start.model.in_chans:
        raise ConfigError(
            f"--init {start.source} takes {start.model.in_chans} channels; {values['data']} "
            f"with --vae {values['vae']} has {values['in_chans']}",
            "choose another --vae, or --data of the kind that it was trained on",
        )
    if values["qk_norm"] != getattr(start.model, "qk_norm", None):
        raise ConfigError(
            f"--qk-norm does not fit --init {start.source}", "leave it out: the weights decide"
        )
