"""`dit-encode`: encodes a folder of images once, for training from their latents.

What loads torch is imported where it is needed: a refusal comes without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spiralrope_cli.core.config.datasets import class_names, list_images
from spiralrope_cli.core.config.dit_runs import full_vae_name
from spiralrope_cli.core.config.latents import (
    EXACT,
    LATENT_SCALE,
    CachePlan,
    EncodeRun,
    Manifest,
    Shard,
    class_folder,
    shard_size_for,
)
from spiralrope_cli.core.config.nested import build
from spiralrope_cli.core.config.resolve import DATA_VARIABLE
from spiralrope_cli.core.config.training import TrainOptions
from spiralrope_cli.core.errors import ConfigError, DataError
from spiralrope_cli.core.hub.networks import find_vae, local_vae
from spiralrope_cli.core.runtime.launch import is_first_process, launch, world_size
from spiralrope_cli.core.runtime.progress import (
    console,
    counted,
    human_size,
    say,
    say_result,
    say_unreadable,
)
from spiralrope_cli.core.runtime.run_folder import check_space, refuse_run

if TYPE_CHECKING:
    from torch import Tensor

    from spiralrope_cli.core.data import files
    from spiralrope_cli.core.diffusion.vae import Vae
    from spiralrope_cli.core.runtime.distributed import DistContext

JOB = "spiralrope_cli.core.jobs.encode:work"
Images = list[tuple[str, int]]
"""(path, class number) of every image."""


def encode(given: dict[str, Any]) -> None:
    """Encodes the images of a folder, as far as they are not yet.

    Args:
        given: field name -> value of the options that the user gave.
    """
    own: TrainOptions = build(TrainOptions, given)
    values = {"precision": EXACT, "data": os.environ.get(DATA_VARIABLE), **given}
    if not values["data"]:
        raise DataError(
            "--data is missing",
            f"name a folder with one folder of images per class, or set {DATA_VARIABLE}",
        )
    run: EncodeRun = build(EncodeRun, values)
    plan(run, dry_run=own.dry_run)
    if not own.dry_run:
        launch(JOB, run)


def settle(config: EncodeRun, *, fetch: bool = True) -> tuple[CachePlan, Images]:
    """What the cache of a run will be of, and the images.

    Args:
        config: the run.
        fetch: a published VAE, unless it is here; otherwise the plan lacks its digest.

    Raises:
        DataError: no images.
        ConfigError, CheckpointError, FetchError: no such VAE, or none that fits.
    """
    folder = class_folder(config.data)
    vae = local_vae(config.vae)

    from spiralrope_cli.core.runtime.device import pick_device, pick_precision

    images = list_images(folder)
    digest = hashlib.sha256()
    for path, _ in images:
        digest.update(os.fsencode(os.path.relpath(path, folder)) + b"\0")
    if fetch and vae is None:
        vae = find_vae(config.vae)
    dtype, _ = pick_precision(config.machine.precision, pick_device(config.machine))
    cache = CachePlan(
        data=str(folder),
        class_names=tuple(class_names(folder)),
        num_files=len(images),
        files_sha256=digest.hexdigest(),
        image_size=config.image_size,
        vae=full_vae_name(config.vae),
        vae_sha256=vae.sha256() if vae else "",
        scale=vae.scale if vae else LATENT_SCALE,
        precision=str(dtype).removeprefix("torch."),
        shard_size=shard_size_for(len(images)),
    )
    return cache, images


def plan(config: EncodeRun, *, dry_run: bool) -> None:
    """Refuses what cannot work before any worker starts, and says what will be done.

    Args:
        config: the run.
        dry_run: fetches nothing.

    Raises:
        DataError: the folder holds other latents.
        DiskError: the disk is too small.
    """
    (cache, _), out = settle(config, fetch=not dry_run), Path(config.out)

    from spiralrope_cli.core.data import latents

    refuse_run(out)
    if out.resolve().is_relative_to(cache.data):
        raise ConfigError(
            f"--out {out} lies among the class folders of {cache.data}",
            "as one of them it would be taken for a class",
        )
    there = latents.finished_shards(out, cache)
    total = cache.num_files * cache.bytes_per_image
    needed = total - sum(shard.size for shard in there.values())
    hint = "free some, or name another disk by --out"
    check_space((out, needed), what="the latents", hint=hint)
    if not is_first_process():
        return
    vae = local_vae(config.vae)
    found = (
        f"{vae.folder}, sha256 {cache.vae_sha256[:16]}" if vae else "not here (it would be fetched)"
    )
    height, width = cache.image_size
    channels, rows, columns = cache.latent_shape
    goes_on = f", {len(there)} are there" if there else ""
    for line in (
        f"data   {cache.data}: {cache.num_files} images, {len(cache.class_names)} classes",
        f"crop   {height}x{width} px, ADM's centre crop, plain and mirrored",
        f"VAE    {config.vae}: {found}, {cache.precision}",
        f"cache  {out}: {human_size(total)} in {cache.num_shards} shards{goes_on}; "
        f"{channels}x{rows}x{columns} latents, mean and deviation in float32",
        f"work   {world_size(config.machine)} process(es) x {config.batch_size} images at a time",
    ):
        say(line)


def work(config: EncodeRun) -> None:
    """Encodes what is missing or damaged, and writes the manifest; executed by every worker.

    Raises:
        DataError: the folder holds other latents, or an image cannot be read.
        CheckpointError: the folder is in use, or the VAE cannot be read.
    """
    from spiralrope_cli.core.data import latents
    from spiralrope_cli.core.runtime import distributed
    from spiralrope_cli.core.runtime.distributed import open_context

    out = Path(config.out)
    with open_context(config.machine, out) as ctx:
        shown_on = console(stderr=True, quiet=not ctx.is_first)
        with distributed.main_process_first():  # it may have to fetch the VAE
            cache, images = settle(config)
        there = latents.finished_shards(out, cache)
        wrong = latents.wrong_shards(out, list(there.values()))
        for shard in there.values():
            if readable_now(shard, config.machine.skip_bad):
                wrong[shard.file] = "was made when some images could not be read that now can"
        shards = {number: shard for number, shard in there.items() if shard.file not in wrong}
        missing = [number for number in range(cache.num_shards) if number not in shards]
        if not missing and (out / latents.MANIFEST_FILE).is_file():
            say(f"{out} is finished: all {cache.num_shards} shards are as they should be", shown_on)
            return
        for file, what in wrong.items():
            say(f"{out / file} {what}; its images are encoded again", shown_on)
        if ctx.is_first:
            latents.begin(out, cache, shards.values())
        distributed.barrier()
        shards.update(encode_missing(config, ctx, cache, images, missing))
        if ctx.is_first:
            report(latents.finish(out, cache, [shards[n] for n in range(cache.num_shards)]))


def readable_now(shard: Shard, skip_bad: bool) -> bool:
    """Whether an image that was left out of a shard can be read by now.

    Raises:
        UnreadableImageError: one still cannot, and without --skip-bad none is left out.
    """
    from spiralrope_cli.core.data.files import Unreadable, open_picture

    still = [open_picture(path, lambda image: image.copy()) for path in shard.unreadable]
    bad = [each for each in still if isinstance(each, Unreadable)]
    if bad and not skip_bad:
        raise bad[0].error()
    return len(bad) < len(still)


def encode_missing(
    config: EncodeRun, ctx: DistContext, cache: CachePlan, images: Images, missing: list[int]
) -> dict[int, Shard]:
    """The missing shards, one per process at a time; in the end all processes know of all.

    Where a signal asks for it, everybody leaves with its exit code; shards that are done stay.
    """
    from spiralrope_cli.core.diffusion.vae import load_vae
    from spiralrope_cli.core.runtime import distributed

    vae = load_vae(find_vae(config.vae).folder, ctx.device, ctx.dtype)
    mine = missing[ctx.rank :: ctx.world_size]
    done = cache.num_files - sum(len(cache.files_of(number)) for number in missing)
    shards: dict[int, Shard] = {}
    progress = counted("encoded", cache.num_files, shown=ctx.is_first, done=done, unit="images/s")
    reading = contextlib.closing(image_batches(config, ctx, cache, images, mine))
    with progress as advance, reading as batches:
        for first in range(0, len(missing), ctx.world_size):
            busy = len(missing[first : first + ctx.world_size])
            number = missing[first + ctx.rank] if ctx.rank < busy else None
            shard = None
            if number is not None:
                # The others are about as far as this process.
                pace = partial(_times, advance, busy)
                shard = encode_shard(config, ctx, cache, vae, batches, number, pace)
            # A meeting in every round: nobody waits for long, and all stop together.
            met = distributed.all_gather_object((number, shard))
            shards.update({n: each for n, each in met if n is not None and each is not None})
            if stop := ctx.stop.agreed(ctx.device, ask_all=True):
                if ctx.is_first:
                    say("stopped; the shards that are done stay, the same command goes on")
                sys.exit(128 + stop)
    return shards


def _times(advance: Callable[[int], None], processes: int, count: int) -> None:
    advance(count * processes)


def image_batches(
    config: EncodeRun, ctx: DistContext, cache: CachePlan, images: Images, mine: list[int]
) -> Generator[files.Loaded, None, None]:
    """The images of this process's shards, read ahead; no batch reaches into the next shard."""
    from spiralrope_cli.core.data import files
    from spiralrope_cli.core.data.augment import cropped_array

    size = config.batch_size
    keys = (
        [(number, None) for number in numbers[first : first + size]]
        for numbers in map(cache.files_of, mine)
        for first in range(0, len(numbers), size)
    )
    crop = partial(cropped_array, size=config.image_size)
    source = files.ImageFiles(images, crop, grey=False)
    return files.load(source, keys, config.machine.workers, ctx.device.type == "cuda")


def encode_shard(
    config: EncodeRun,
    ctx: DistContext,
    cache: CachePlan,
    vae: Vae,
    batches: Iterator[files.Loaded],
    number: int,
    advance: Callable[[int], None],
) -> Shard | None:
    """Encodes and writes one shard; None where a signal came in between.

    Raises:
        UnreadableImageError: without --skip-bad.
    """
    import torch

    from spiralrope_cli.core.data import latents
    from spiralrope_cli.core.data.files import BadImages

    num_files = len(cache.files_of(number))
    # They stay on the device until the shard is full: no batch waits for a copy.
    sides = torch.empty(2, num_files, 2, *cache.latent_shape, device=ctx.device)
    labels: list[Tensor] = []
    bad, count = BadImages(), 0
    for first in range(0, num_files, config.batch_size):
        if ctx.stop.signal_number:
            return None
        loaded = next(batches)
        bad.meet(loaded.unreadable, config.machine.skip_bad)
        if len(loaded.labels):
            pictures = loaded.images.to(ctx.device, non_blocking=True).float() / 127.5 - 1
            rows = slice(count, count + len(pictures))
            for side, seen in enumerate((pictures, pictures.flip(-1))):
                sides[side, rows] = torch.stack(vae.encode(seen), dim=1)
            labels.append(loaded.labels)
            count = rows.stop
        advance(min(config.batch_size, num_files - first))
    plain, mirrored = sides[:, :count].cpu()
    every_label = torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64)
    return latents.write_shard(Path(config.out), number, plain, mirrored, every_label, bad.reasons)


def report(manifest: Manifest) -> None:
    """What was left out, and on stdout what there is now."""
    say_unreadable({p: why for shard in manifest.shards for p, why in shard.unreadable.items()})
    size = human_size(sum(shard.size for shard in manifest.shards))
    say_result(
        f"{manifest.folder}: {manifest.count} images of {len(manifest.plan.class_names)} classes, "
        f"{size} in {len(manifest.shards)} shards"
    )
