"""Encodes a folder of images once, for training from their latents."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from spiralrope_cli.core.config.latents import CachePlan, EncodeRun, Manifest, Shard
from spiralrope_cli.core.data import files, latents
from spiralrope_cli.core.data.adm import cropped_array
from spiralrope_cli.core.data.pictures import Unreadable, open_picture
from spiralrope_cli.core.data.validation import BadImages
from spiralrope_cli.core.diffusion.vae import Vae, load_vae
from spiralrope_cli.core.jobs.encode_plan import Work, look_up
from spiralrope_cli.core.runtime import distributed
from spiralrope_cli.core.runtime.console import console, say, say_result
from spiralrope_cli.core.runtime.disk import human_size
from spiralrope_cli.core.runtime.job import Job, open_job
from spiralrope_cli.core.runtime.progress import counted
from spiralrope_cli.core.runtime.report import say_unreadable


def run(config: EncodeRun) -> None:
    """Encodes what is missing or damaged, and writes the manifest; executed by every worker.

    Raises:
        DataError: the folder holds other latents, or an image cannot be read.
        CheckpointError: the folder is in use, or the VAE cannot be read.
    """
    out = Path(config.out)
    with open_job(config.machine, out) as job:
        shown_on = console(stderr=True, quiet=not job.is_first)
        with distributed.first_alone():  # it may have to fetch the VAE
            work = look_up(config)
        plan = work.plan
        there = latents.finished_shards(out, plan)
        wrong = latents.wrong_shards(out, list(there.values()))
        for shard in there.values():
            if readable_now(shard, config.machine.skip_bad):
                wrong[shard.file] = "was made when some images could not be read that now can"
        shards = {number: shard for number, shard in there.items() if shard.file not in wrong}
        missing = [number for number in range(plan.num_shards) if number not in shards]
        if not missing and (out / latents.MANIFEST_FILE).is_file():
            say(f"{out} is finished: all {plan.num_shards} shards are as they should be", shown_on)
            return
        for file, what in wrong.items():
            say(f"{out / file} {what}; its images are encoded again", shown_on)
        if job.is_first:
            latents.begin(out, plan, shards.values())
        distributed.barrier()
        shards.update(encode(config, job, work, missing))
        if job.is_first:
            manifest = latents.finish(out, plan, [shards[n] for n in range(plan.num_shards)])
            print_result(manifest)


def readable_now(shard: Shard, skip_bad: bool) -> bool:
    """Whether an image that was left out of a shard can be read by now.

    Raises:
        UnreadableImageError: one still cannot, and without --skip-bad none is left out.
    """
    still = [open_picture(path, lambda image: image.copy()) for path in shard.unreadable]
    bad = [each for each in still if isinstance(each, Unreadable)]
    if bad and not skip_bad:
        raise bad[0].error()
    return len(bad) < len(still)


def encode(config: EncodeRun, job: Job, work: Work, missing: list[int]) -> dict[int, Shard]:
    """The missing shards, one per process at a time; in the end all processes know of all.

    Where a signal asks for it, everybody leaves with its exit code; shards that are done stay.
    """
    vae = load_vae(work.vae.folder, job.device, job.dtype)
    mine = missing[job.rank :: job.world_size]
    to_do = sum(len(work.plan.files_of(number)) for number in missing)
    done = work.plan.num_files - to_do
    shards: dict[int, Shard] = {}
    progress = counted(
        "encoded", work.plan.num_files, shown=job.is_first, done=done, unit="images/s"
    )
    with progress as advance, contextlib.closing(image_batches(config, job, work, mine)) as batches:
        for first in range(0, len(missing), job.world_size):
            busy = len(missing[first : first + job.world_size])
            number = missing[first + job.rank] if job.rank < busy else None
            shard = None
            if number is not None:
                # The others are about as far as this process.
                pace = partial(_times, advance, busy)
                shard = encode_shard(config, job, work.plan, vae, batches, number, pace)
            # A meeting in every round: nobody waits for long, and all stop together.
            met = distributed.gathered((number, shard))
            shards.update({n: each for n, each in met if n is not None and each is not None})
            if stop := job.stop.agreed(job.device, ask_all=True):
                if job.is_first:
                    say("stopped; the shards that are done stay, the same command goes on")
                sys.exit(128 + stop)
    return shards


def _times(advance: Callable[[int], None], processes: int, images: int) -> None:
    advance(images * processes)


def image_batches(
    config: EncodeRun, job: Job, work: Work, mine: list[int]
) -> Generator[files.Loaded, None, None]:
    """The images of this process's shards, read ahead; no batch reaches into the next shard."""
    size = config.batch_size
    keys = (
        [(number, None) for number in numbers[first : first + size]]
        for numbers in map(work.plan.files_of, mine)
        for first in range(0, len(numbers), size)
    )
    crop = partial(cropped_array, size=config.image_size)
    source = files.ImageFiles(work.images, crop, grey=False)
    return files.load(source, keys, config.machine.workers, job.device.type == "cuda")


def encode_shard(
    config: EncodeRun,
    job: Job,
    plan: CachePlan,
    vae: Vae,
    batches: Iterator[files.Loaded],
    number: int,
    advance: Callable[[int], None],
) -> Shard | None:
    """Encodes and writes one shard; None where a signal came in between.

    Raises:
        UnreadableImageError: without --skip-bad.
    """
    num_files = len(plan.files_of(number))
    # They stay on the device until the shard is full: no batch waits for a copy.
    sides = torch.empty(2, num_files, 2, *plan.latent_shape, device=job.device)
    labels: list[Tensor] = []
    bad, count = BadImages(), 0
    for first in range(0, num_files, config.batch_size):
        if job.stop.signal_number:
            return None
        loaded = next(batches)
        bad.meet(loaded.unreadable, config.machine.skip_bad)
        if len(loaded.labels):
            images = loaded.images.to(job.device, non_blocking=True).float() / 127.5 - 1
            rows = slice(count, count + len(images))
            for side, seen in enumerate((images, images.flip(-1))):
                sides[side, rows] = torch.stack(vae.encode(seen), dim=1)
            labels.append(loaded.labels)
            count = rows.stop
        advance(min(config.batch_size, num_files - first))
    plain, mirrored = sides[:, :count].cpu()
    every_label = torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64)
    return latents.write_shard(Path(config.out), number, plain, mirrored, every_label, bad.reasons)


def print_result(manifest: Manifest) -> None:
    """What was left out, and on stdout what there is now."""
    say_unreadable({p: why for shard in manifest.shards for p, why in shard.unreadable.items()})
    size = human_size(sum(shard.size for shard in manifest.shards))
    say_result(
        f"{manifest.folder}: {manifest.count} images of {len(manifest.plan.class_names)} classes, "
        f"{size} in {len(manifest.shards)} shards"
    )
