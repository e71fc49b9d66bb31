"""`dit-encode`: encodes a folder of images once, to train from cached latents.

Modules that load torch are imported inside functions, so that usage errors are fast.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spiralrope_cli.core.config.datasets import BUILT_IN, numbering_note
from spiralrope_cli.core.config.dit_runs import LATENT_SCALE, full_vae_name
from spiralrope_cli.core.config.models import format_size
from spiralrope_cli.core.config.option import build
from spiralrope_cli.core.config.samples import EXACT, EncodeRun
from spiralrope_cli.core.config.training import TrainOptions
from spiralrope_cli.core.data.listing import place_in
from spiralrope_cli.core.data.shards import CachePlan, Shard, shard_file, shard_size_for
from spiralrope_cli.core.data.splits import data_root, train_split
from spiralrope_cli.core.errors import ConfigError, DataError
from spiralrope_cli.core.hub.source import VaeFiles, find_vae, local_vae
from spiralrope_cli.core.resolve import DATA_VARIABLE
from spiralrope_cli.core.runtime.launch import (
    check_space,
    is_first_process,
    launch,
    say_notes,
    world_size,
)
from spiralrope_cli.core.runtime.progress import (
    console,
    counted,
    human_size,
    say,
    say_result,
    say_unreadable,
)
from spiralrope_cli.core.runtime.slurm import Remaining
from spiralrope_cli.core.storage import refuse_own

if TYPE_CHECKING:
    from spiralrope_cli.core.data.loader import Batch
    from spiralrope_cli.core.diffusion.vae import Vae
    from spiralrope_cli.core.runtime.distributed import DistContext


@dataclass(frozen=True)
class EncodePlan:
    """Arguments of `work`."""

    run: EncodeRun
    cache: CachePlan
    images: Sequence[tuple[str, int]]  # (path, class number) of each image
    vae: VaeFiles | None  # None for a published VAE before the download
    notes: tuple[str, ...]  # for the user


def encode(given: dict[str, Any]) -> Remaining:
    """Encodes the images of a folder that are not encoded yet."""
    own: TrainOptions = build(TrainOptions, given)
    values = {"precision": EXACT, "data": os.environ.get(DATA_VARIABLE), **given}
    if not values["data"]:
        raise DataError(
            "--data is missing",
            f"give a folder with one folder of images per class, or set ${DATA_VARIABLE}",
        )
    run: EncodeRun = build(EncodeRun, values)
    own.check_folder(run.out, "a folder of latents")
    settled = settle(run, fetch=not own.dry_run)
    plan(settled)
    if not own.dry_run:
        launch(work, settled.run, settled)
    return Remaining(settled.run.out)


def settle(run: EncodeRun, *, fetch: bool = True) -> EncodePlan:
    """Plan of the cache; without `fetch` a published VAE and its digest may be missing."""
    folder, vae = data_folder(run.data), local_vae(run.vae)

    from spiralrope_cli.core.runtime.device import PRECISION_WORDS, planned_precision

    split = train_split(folder)
    if Path(run.out).resolve().is_relative_to(split.path):
        raise ConfigError(
            f"--out {run.out} is inside {split.path}, so it would count as a class folder",
            "choose another --out",
        )
    digest = hashlib.sha256()
    for path, _ in split.images:
        digest.update(os.fsencode(place_in(split.path, path)) + b"\0")
    if fetch and vae is None:
        vae = find_vae(run.vae)
    precision = planned_precision(run.machine, dry_run=not fetch)
    cache = CachePlan(
        data=str(split.path),
        class_names=split.class_names,
        num_files=len(split.images),
        files_sha256=digest.hexdigest(),
        image_size=run.image_size,
        vae=full_vae_name(run.vae),
        vae_sha256=vae.sha256() if vae else "",
        scale=vae.scale if vae else LATENT_SCALE,
        precision=PRECISION_WORDS.get(precision, ""),
        shard_size=shard_size_for(len(split.images)),
    )
    notes = (*split.notes, *numbering_note(cache.class_names))
    return EncodePlan(run, cache, split.images, vae, notes)


def data_folder(data: str) -> Path | str:
    """The folder, or the stream, that `data` names; its images are not looked at."""
    if data in BUILT_IN:
        raise DataError(
            f"--data {data} is too small for a VAE",
            "spiralrope dit-train trains on its pixels; dit-encode takes image folders",
        )
    root = data_root(data)
    if isinstance(root, str):
        return root
    if not root.is_dir():
        raise DataError(
            f"--data {data} is not a folder", "it must hold one folder of images per class"
        )
    refuse_own(root, f"--data {data}")
    return root.resolve()


def plan(settled: EncodePlan) -> None:
    """Checks the plan before any worker starts, and prints it."""
    run, cache, vae, out = settled.run, settled.cache, settled.vae, Path(settled.run.out)

    from spiralrope_cli.core.data.latents import finished_shards

    there, _ = finished_shards(out, cache)
    total = cache.num_files * cache.bytes_per_image
    needed = total - sum(shard.num_bytes for shard in there.values())
    hint = "free some, or use --out on another disk"
    check_space((out, needed), what="the latents", hint=hint)
    if not is_first_process():
        return
    found = f"{vae.folder}, sha256 {cache.vae_sha256[:16]}" if vae else "to be downloaded"
    channels, rows, columns = cache.latent_shape
    goes_on = f", {len(there)} are finished" if there else ""
    for line in (
        f"data   {cache.data}: {cache.num_files} images, {len(cache.class_names)} classes",
        f"crop   {format_size(cache.image_size)} px, ADM's centre crop, plain and flipped",
        f"VAE    {run.vae}: {found}, {cache.precision}",
        f"cache  {out}: {human_size(total)} in {cache.num_shards} shards{goes_on}; "
        f"{channels}x{rows}x{columns} latents, mean and standard deviation in float32",
        f"batch  {world_size(run.machine)} process(es) x {run.batch_size} images",
    ):
        say(line)
    say_notes(settled.notes)


def work(run: EncodeRun, plan: EncodePlan) -> None:
    """Encodes missing and damaged shards; every worker runs this."""
    from spiralrope_cli.core.data.latents import damaged_shards, finished_shards
    from spiralrope_cli.core.runtime.distributed import open_context

    cache, out = plan.cache, Path(run.out)
    with open_context(run.machine, out) as ctx:
        shown_on = console(stderr=True, quiet=not ctx.is_first)
        shards, wrong = finished_shards(out, cache)
        wrong |= damaged_shards(out, list(shards.values()))
        for shard in shards.values():
            if readable_now(shard, run.machine.skip_bad):
                wrong[shard.file] = "lacks images that could not be read before, but can be now"
        good = {number: shard for number, shard in shards.items() if shard.file not in wrong}
        missing = [number for number in range(cache.num_shards) if number not in good]
        reasons = {number: wrong.get(shard_file(number), "is missing") for number in missing}
        for reason in dict.fromkeys(reasons.values()) if shards or wrong else ():
            first, *others = [number for number in missing if reasons[number] == reason]
            more = f" (and {len(others)} more)" if others else ""
            say(f"{out / shard_file(first)} {reason}{more}; encoding again", shown_on)
        good |= encode_missing(plan, ctx, missing)
        if not any(shard.count for shard in good.values()):
            raise DataError(f"none of the {cache.num_files} images in {cache.data} can be read")
        if not missing:
            say(f"{out} is finished: all {cache.num_shards} shards are correct", shown_on)
        elif ctx.is_first:
            report(plan, [good[number] for number in range(cache.num_shards)])


def readable_now(shard: Shard, skip_bad: bool) -> bool:
    """Whether a skipped image of a shard can be read now."""
    from spiralrope_cli.core.data.images import Unreadable, as_trained, open_image

    still = [open_image(path, as_trained) for path in shard.unreadable]
    bad = [each for each in still if isinstance(each, Unreadable)]
    if bad and not skip_bad:
        raise bad[0].error()  # without --skip-bad no image may be skipped
    return len(bad) < len(still)


def encode_missing(plan: EncodePlan, ctx: DistContext, missing: list[int]) -> dict[int, Shard]:
    """Encodes the missing shards, one per process at a time; returns them on all processes.

    A thread writes each shard while the device computes the next. After a signal all processes
    exit; finished shards are kept.
    """
    if not missing:
        return {}

    from spiralrope_cli.core.data.augment import cropped_array
    from spiralrope_cli.core.data.loader import BatchIndices, ImageFiles, load
    from spiralrope_cli.core.diffusion.vae import load_vae
    from spiralrope_cli.core.runtime.distributed import all_gather_object

    run, cache, size = plan.run, plan.cache, plan.run.batch_size
    vae = load_vae((plan.vae or find_vae(run.vae)).folder, ctx.device, ctx.dtype)
    # All batches of this process, for reading ahead; a batch never spans two shards.
    to_read = (
        BatchIndices(list(numbers[first : first + size]), [])
        for numbers in map(cache.files_of, missing[ctx.rank :: ctx.world_size])
        for first in range(0, len(numbers), size)
    )
    files = ImageFiles(plan.images, partial(cropped_array, size=run.image_size))
    reading = load(files, run.machine, ctx.device, {}, to_read)
    done = cache.num_files - sum(len(cache.files_of(number)) for number in missing)
    progress = counted("encoded", cache.num_files, shown=ctx.is_first, done=done, unit="images/s")
    shards: dict[int, Shard] = {}
    written: Future[Shard] | None = None
    with (
        ThreadPoolExecutor(1, "writer") as writer,
        progress as advance,
        contextlib.closing(reading) as batches,
    ):
        for first in range(0, len(missing) + ctx.world_size, ctx.world_size):
            together = missing[first : first + ctx.world_size]
            write = None
            if ctx.rank < len(together):
                number, busy = together[ctx.rank], len(together)
                write = encode_shard(plan, ctx, vae, batches, number, busy, advance)
            # One collective per round, so that no process waits long, and all stop together.
            shard = written.result() if written else None  # of the round before
            shards.update({each.number: each for each in all_gather_object(shard) if each})
            written = writer.submit(write) if write else None
            if stop := ctx.stop.agreed(ctx.device, ask_all=True):
                if ctx.is_first:
                    say("stopped; finished shards are kept, the same command resumes")
                sys.exit(128 + stop)
    return shards


def encode_shard(
    plan: EncodePlan,
    ctx: DistContext,
    vae: Vae,
    batches: Iterator[Batch],
    number: int,
    busy: int,
    advance: Callable[[int], None],
) -> Callable[[], Shard] | None:
    """Encodes one shard, while `busy` processes do so; returns what writes it, None after a signal.

    Only the writing waits for the device.
    """
    import torch

    from spiralrope_cli.core.data import latents

    run, cache, num_files = plan.run, plan.cache, len(plan.cache.files_of(number))
    # Kept on the device until the shard is complete, so that no batch waits for a copy.
    sides = [torch.empty(2, 0, 2, *cache.latent_shape, device=ctx.device)]
    labels = [torch.empty(0, dtype=torch.int64, device=ctx.device)]
    unreadable: dict[str, str] = {}
    for first in range(0, num_files, run.batch_size):
        if ctx.stop.signal_number:
            return None
        batch = next(batches)
        unreadable |= {bad.path: bad.reason for bad in batch.unreadable}
        if len(batch.labels):
            images = batch.images / 127.5 - 1
            both = [torch.stack(vae.encode(seen), dim=1) for seen in (images, images.flip(-1))]
            sides.append(torch.stack(both).float())
            labels.append(batch.labels)
        # The other processes are about as far as this one.
        advance(busy * min(run.batch_size, num_files - first))

    def write() -> Shard:
        plain, mirrored = torch.cat(sides, dim=1).cpu()
        tensors = plain, mirrored, torch.cat(labels).cpu()
        return latents.write_shard(Path(run.out), cache, number, *tensors, unreadable)

    return write


def report(plan: EncodePlan, shards: list[Shard]) -> None:
    """Prints skipped images, and on stdout the size of the cache."""
    say_unreadable({path: why for shard in shards for path, why in shard.unreadable.items()})
    say_result(
        f"{plan.run.out}: {sum(shard.count for shard in shards)} images of "
        f"{len(plan.cache.class_names)} classes, "
        f"{human_size(sum(shard.num_bytes for shard in shards))} in {len(shards)} shards"
    )
