"""Settles a run of sampling before any worker starts, and says what it will do."""

from __future__ import annotations

import dataclasses
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from spiralrope_cli.core.config.diffusion import GuidanceConfig
from spiralrope_cli.core.config.dit_runs import NO_VAE, input_size
from spiralrope_cli.core.config.latents import LATENT_CHANNELS, VAE_FACTOR, VAE_NAMES
from spiralrope_cli.core.config.models import is_dit
from spiralrope_cli.core.config.resolve import RUNS_FOLDER
from spiralrope_cli.core.config.rope import RopeConfig
from spiralrope_cli.core.config.runs import MachineConfig
from spiralrope_cli.core.config.samples import (
    DEFAULTS,
    SAMPLING_VAE,
    SampleRun,
    decoder_of,
    num_samples,
)
from spiralrope_cli.core.data.sample_files import FACTS_FILE, PART_FILE, SampleFiles, read_facts
from spiralrope_cli.core.errors import CheckpointError, ConfigError
from spiralrope_cli.core.hub.files import digest_like
from spiralrope_cli.core.hub.source import Source, find_source
from spiralrope_cli.core.hub.vae import find_vae
from spiralrope_cli.core.runtime import disk
from spiralrope_cli.core.runtime.console import console, say
from spiralrope_cli.core.runtime.device import pick_device, pick_precision
from spiralrope_cli.core.runtime.run_folder import differences, refuse_run
from spiralrope_cli.core.weights import Weights, here, read_weights
from spiralrope_cli.version import __version__

BATCH_BYTES = 64 * 3 * 256 * 256
"""Pixels of a batch by default: 64 images of 256 px; at most MAX_BATCH of smaller ones."""

MAX_BATCH = 100


def settle(source: Source, options: Mapping[str, Any]) -> tuple[SampleRun, Weights]:
    """The complete run.

    Args:
        source: from `find_source`; published weights are fetched if need be.
        options: field name -> value, given options alone.

    Raises:
        CheckpointError: no diffusion transformer.
        ConfigError: a value that cannot work.
    """
    chosen = dict(options)
    of_rope = {name: chosen.pop(name) for name in RopeConfig.__dataclass_fields__ if name in chosen}
    ema = chosen.pop("ema", True)
    weights = read_weights(here(source), ema=ema, rope=of_rope)
    if not is_dit(weights.arch):
        raise CheckpointError(
            f"{source.given} holds {weights.arch}, a classifier, which draws nothing",
            "dit-sample takes a diffusion transformer; eval takes classifiers",
        )
    config = weights.config
    pictures = config.get("pictures", {})
    channels = weights.options["in_chans"]
    trained_vae = pictures.get("vae", SAMPLING_VAE if channels == LATENT_CHANNELS else NO_VAE)
    vae = chosen.pop("vae", decoder_of(trained_vae))
    if vae == trained_vae and vae not in (NO_VAE, *VAE_NAMES) and not Path(vae).is_dir():
        raise ConfigError(
            f"{source.given} was trained through the VAE {vae}, which is not there",
            "--vae names its folder, or one like it",
        )
    if (vae == NO_VAE) and channels not in (1, 3):
        raise ConfigError(
            f"--vae none: {source.given} draws {channels} channels, which only "
            "a VAE turns into pictures",
            "use --vae mse, ema or a folder",
        )
    if vae != NO_VAE and channels != LATENT_CHANNELS:
        raise ConfigError(
            f"--vae {vae}: {source.given} draws pixels, {channels} channel(s)",
            "use --vae none",
        )
    factor = 1 if vae == NO_VAE else VAE_FACTOR
    own = tuple(factor * side for side in weights.options["input_size"])
    image_size = chosen.pop("image_size", own)
    input_size(weights.arch, image_size, vae)
    if image_size != own and not weights.rope.enabled:
        raise ConfigError(
            f"--image-size {'x'.join(map(str, image_size))}: without RoPE these weights draw "
            f"{'x'.join(map(str, own))} alone",
        )
    machine_names = MachineConfig.__dataclass_fields__
    machine = MachineConfig(**{n: chosen.pop(n) for n in list(chosen) if n in machine_names})
    guide_names = GuidanceConfig.__dataclass_fields__
    guidance = GuidanceConfig(**{n: chosen.pop(n) for n in list(chosen) if n in guide_names})
    values = {**DEFAULTS, "num": num_samples(config.get("data", "")), **chosen}
    pixels = 3 * image_size[0] * image_size[1]
    values.setdefault("batch_size", max(1, min(MAX_BATCH, BATCH_BYTES // pixels)))
    values.setdefault("png", False)
    values.setdefault("classes", ())
    name = values.pop("name", None)
    values.setdefault("out", str(Path(RUNS_FOLDER) / _folder(source, values, guidance, ema, name)))
    run = SampleRun(
        source=source.given,
        file=str(weights.file),
        ema=ema,
        rope=of_rope,
        guidance=guidance,
        num_classes=weights.options["num_classes"],
        vae=vae,
        image_size=image_size,
        sha256=digest_like(weights.file, "sha256")[1],
        vae_sha256="" if vae == NO_VAE else find_vae(vae).sha256(),
        machine=machine,
        **values,
    )
    return run, weights


def weights_of(run: SampleRun) -> Weights:
    """The weights of a settled run: of that very file, whatever its run has saved since."""
    source = dataclasses.replace(find_source(run.source), place=Path(run.file))
    return read_weights(source, ema=run.ema, rope=run.rope)


def _folder(
    source: Source, values: dict[str, Any], guidance: GuidanceConfig, ema: bool, name: str | None
) -> str:
    stem = source.run.resolve().name if source.run else Path(source.given).stem
    parts = ["dit-sample", stem, f"{values['sampler']}{values['steps']}"]
    parts += [f"cfg{guidance.cfg_scale:g}"] if guidance.cfg_scale != 1 else []
    parts += [] if ema else ["raw"]
    parts += [name] if name else []
    return re.sub(r"[^\w.-]+", "-", "-".join(parts))


def facts_of(run: SampleRun, weights: Weights) -> dict[str, Any]:
    """What makes the images, for every file that holds some."""
    device = pick_device(run.machine)
    dtype, _ = pick_precision(run.machine.precision, device)
    return {
        "made_by": f"spiralrope {__version__} dit-sample",
        "source": run.source,
        "sha256": run.sha256,
        "weights": "ema" if weights.ema else "raw",
        "trained": weights.progress,
        "arch": weights.arch,
        "data": weights.config.get("data", ""),
        "num_classes": run.num_classes,
        "rope": dataclasses.asdict(weights.rope),
        "num": run.num,
        "steps": run.steps,
        "sampler": run.sampler,
        **dataclasses.asdict(run.guidance),
        "cfg_interval": list(run.guidance.cfg_interval),
        "classes": list(run.classes),
        "seed": run.seed,
        "vae": run.vae,
        "vae_sha256": run.vae_sha256,
        "image_size": list(run.image_size),
        "precision": str(dtype).removeprefix("torch."),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


FREE_TO_DIFFER = ("made_by", "source", "versions", "trained", "data", "num_classes")
"""What may change between two runs that go on with the same images, or follows from the weights."""


def check_same(run: SampleRun, facts: dict[str, Any]) -> bool:
    """Whether all that is asked for is there already.

    Raises:
        CheckpointError: the folder holds other images.
    """
    folder = Path(run.out)
    refuse_run(folder)
    files = SampleFiles(folder, run.num, run.image_size)
    before = read_facts(folder)
    if before is None:
        if files.npz.exists():
            raise CheckpointError(
                f"{files.npz} is there, and no {FACTS_FILE} says what made it",
                "give this run another --name or --out",
            )
        return False
    digests = [str(each.get("sha256"))[:12] for each in (before, facts)]
    if digests[0] != digests[1]:
        raise CheckpointError(
            f"{folder} holds samples of other weights: sha256 {digests[0]}, now {digests[1]}",
            "give this run another --name or --out",
        )
    if differing := differences(before, facts, FREE_TO_DIFFER):
        raise CheckpointError(
            f"{folder} holds other samples: {differing}",
            "repeat those options, or give this run another --name or --out",
        )
    return files.finished(run.png)


def check_space(run: SampleRun) -> None:
    """Refuses a run whose files would not fit on the disk.

    Raises:
        DiskError: too little is free.
    """
    folder = Path(run.out)
    begun = folder / PART_FILE
    here_already = begun.stat().st_blocks * 512 if begun.exists() else 0
    drawn = SampleFiles(folder, run.num, run.image_size).npz.exists()
    needed = 0 if drawn else run.num_bytes - here_already
    needed += run.num_bytes if run.png else 0
    what = f"{run.num} images and what is made of them"
    hint = "use fewer images (--num), or another --out"
    disk.check_space((folder, needed), what=what, hint=hint)


def say_plan(run: SampleRun, weights: Weights, world_size: int) -> None:
    """What will be drawn, on stderr."""
    shown_on = console(stderr=True)
    guidance = run.guidance
    height, width = run.image_size
    guided = "none"
    if guidance.cfg_scale != 1:
        low, high = guidance.cfg_interval
        channels = "all channels" if guidance.cfg_channels == "all" else "3 channels"
        guided = f"{guidance.cfg_scale:g} on {channels}, timesteps {low} to {high}"
    files = SampleFiles(Path(run.out), run.num, run.image_size)
    drawn = run.num - len(files.missing()) if (files.folder / FACTS_FILE).exists() else 0
    there = f"; {drawn} are there" if drawn else ""
    classes = ",".join(map(str, run.classes)) if run.classes else f"drawn from {run.num_classes}"
    for name, text in (
        ("samples", f"{run.out}"),
        ("weights", weights.summary()),
        ("images", f"{run.num} of {height}x{width} px, VAE {run.vae}; classes {classes}{there}"),
        ("sampler", f"{run.sampler}, {run.steps} steps, guidance {guided}, seed {run.seed}"),
        ("batch", f"{run.batch_size} at a time in {world_size} process(es)"),
    ):
        shown_on.print(Text.assemble(" ", (f"{name:<8}", "bold"), " ", text), soft_wrap=True)
    notes = list(weights.notes)
    if guidance.cfg_scale == 1 and guidance != GuidanceConfig():
        notes.append("--cfg-channels and --cfg-interval have no effect: --cfg-scale is 1")
    for note in notes:
        say(f"note: {note}")
