"""What `dit-encode` is going to do, and whether it can."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from spiralrope_cli.core.config.datasets import class_names, list_images
from spiralrope_cli.core.config.dit_runs import full_vae_name
from spiralrope_cli.core.config.latents import CachePlan, EncodeRun, class_folder, shard_size_for
from spiralrope_cli.core.data import latents
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.hub.vae import VaeFiles, find_vae
from spiralrope_cli.core.runtime.console import say
from spiralrope_cli.core.runtime.device import pick_device, pick_precision
from spiralrope_cli.core.runtime.disk import check_space, human_size
from spiralrope_cli.core.runtime.launch import world_size
from spiralrope_cli.core.runtime.run_folder import refuse_run


@dataclass(frozen=True)
class Work:
    """What a run encodes, with what.

    Attributes:
        plan: of the cache.
        images: (path, class number) of every image.
        vae: where it is.
    """

    plan: CachePlan
    images: list[tuple[str, int]]
    vae: VaeFiles


def look_up(config: EncodeRun) -> Work:
    """Images and VAE of a run; the VAE is fetched if need be.

    Raises:
        DataError: no images.
        ConfigError, CheckpointError, FetchError: no such VAE, or none that fits.
    """
    folder = class_folder(config.data)
    images = list_images(folder)
    digest = hashlib.sha256()
    for path, _ in images:
        digest.update(os.fsencode(os.path.relpath(path, folder)) + b"\0")
    vae = find_vae(config.vae)
    device = pick_device(config.machine)
    plan = CachePlan(
        data=str(folder),
        class_names=tuple(class_names(folder)),
        num_files=len(images),
        files_sha256=digest.hexdigest(),
        image_size=config.image_size,
        vae=full_vae_name(config.vae),
        vae_sha256=vae.sha256(),
        scale=vae.scale,
        precision=str(pick_precision(config.machine.precision, device)[0]).removeprefix("torch."),
        shard_size=shard_size_for(len(images)),
    )
    return Work(plan, images, vae)


def check_and_tell(config: EncodeRun, *, speak: bool) -> None:
    """Refuses what cannot work before any worker starts, and says what will be done.

    Raises:
        DataError: the folder holds other latents.
        DiskError: the disk is too small.
    """
    work, out = look_up(config), Path(config.out)
    plan = work.plan
    refuse_run(out)
    if out.resolve().is_relative_to(plan.data):
        raise ConfigError(
            f"--out {out} lies among the class folders of {plan.data}",
            "as one of them it would be taken for a class",
        )
    here = latents.finished_shards(out, plan)
    total = plan.num_files * plan.bytes_per_image
    needed = total - sum(shard.size for shard in here.values())
    hint = "free some, or name another disk by --out"
    check_space((out, needed), what="the latents", hint=hint)
    if not speak:
        return
    height, width = plan.image_size
    channels, rows, columns = plan.latent_shape
    goes_on = f", {len(here)} are there" if here else ""
    lines = (
        f"data   {plan.data}: {plan.num_files} images, {len(plan.class_names)} classes",
        f"crop   {height}x{width} px, ADM's centre crop, plain and mirrored",
        f"VAE    {config.vae}: {work.vae.folder}, sha256 {plan.vae_sha256[:16]}, {plan.precision}",
        f"cache  {out}: {human_size(total)} in {plan.num_shards} shards{goes_on}; "
        f"{channels}x{rows}x{columns} latents, mean and deviation in float32",
        f"work   {world_size(config.machine)} process(es) x {config.batch_size} images at a time",
    )
    for line in lines:
        say(line)
