"""Cached latents: shards that are written whole or not at all, and read mapped from the disk.

FOLDER/00000.safetensors         `plain` and `mirrored` [n, 2, L, h, w] float32, `labels` [n] int64;
                                 of the dimension of 2, the first is the posterior's mean and the
                                 second its standard deviation, not scaled
FOLDER/manifest.json             what it is, and size and checksum of each shard; written last
FOLDER/unfinished/               until then: plan.json, and 00000.json for each shard that is done

Legend: B batch, n images of a shard, L latent channels, (h, w) latent pixels.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import errno
import itertools
import json
import os
import shutil
import zlib
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spiralrope_cli.core.atomic import atomic_write, write_whole
from spiralrope_cli.core.config.latents import (
    MANIFEST_FILE,
    CachePlan,
    Manifest,
    Shard,
    damaged,
    load_manifest,
    plan_from,
    read_manifest,
    wrong_sizes,
)
from spiralrope_cli.core.errors import DataError
from spiralrope_cli.core.runtime import distributed
from spiralrope_cli.core.runtime.launch import cores_per_process
from spiralrope_cli.core.runtime.progress import counted
from spiralrope_cli.core.runtime.run_folder import differences

UNFINISHED, PLAN_FILE = "unfinished", "plan.json"
FORMAT = 1
PLAIN, MIRRORED, LABELS = "plain", "mirrored", "labels"
CHUNK = 1 << 22
AHEAD = 2
"""Batches that are read while the network is busy."""

SAY_ABOVE = 1 << 30
"""Bytes whose check takes long enough to show its progress."""

FREE_TO_CHANGE = {"data", "vae"}
"""Names of what is known better by its digest: the folders may have moved."""


# --- Writing


def finished_shards(folder: Path, plan: CachePlan) -> dict[int, Shard]:
    """Shards of this plan that lie in a folder, finished or not, by number; not yet checked.

    Raises:
        DataError: the folder holds latents made after another plan.
    """
    records = folder / UNFINISHED
    if (folder / MANIFEST_FILE).is_file():
        manifest = load_manifest(folder)
        before, shards = manifest.plan, manifest.shards
    elif (records / PLAN_FILE).is_file():
        before, shards = _unfinished(records)
    else:
        return {}
    if differing := _differences(before, plan):
        raise DataError(
            f"{folder} holds latents of other options: {differing}",
            "choose another --out, or remove that folder",
        )
    return {int(Path(shard.file).stem): shard for shard in shards}


def _unfinished(records: Path) -> tuple[CachePlan, tuple[Shard, ...]]:
    """Plan and shards of an interrupted run; a damaged record's images are encoded again."""
    path = records / PLAN_FILE
    try:
        plan = plan_from(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        hint = f"remove {records}; all images are then encoded again"
        raise DataError(f"{path} cannot be read, or is of another version", hint) from error
    shards = []
    for record in sorted(records.glob("[0-9]*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            shards.append(Shard(**json.loads(record.read_text())))
    return plan, tuple(shards)


def _differences(before: CachePlan, plan: CachePlan) -> str:
    """In what another plan would make other latents, or nothing."""
    if before.class_names != plan.class_names:
        return "other class folders"
    free = FREE_TO_CHANGE if plan.vae_sha256 else {*FREE_TO_CHANGE, "vae_sha256"}
    was, now = map(dataclasses.asdict, (before, plan))
    for values in (was, now):
        for name in ("files_sha256", "vae_sha256"):
            values[name] = str(values[name])[:16]
    return differences(was, now, free)


def begin(folder: Path, plan: CachePlan, kept: Iterable[Shard]) -> None:
    """Makes a folder ready for the missing shards; one process alone may call it."""
    records = folder / UNFINISHED
    records.mkdir(parents=True, exist_ok=True)
    for shard in kept:
        _record(folder, shard)
    write_whole(records / PLAN_FILE, json.dumps(dataclasses.asdict(plan)), durable=True)
    (folder / MANIFEST_FILE).unlink(missing_ok=True)


def write_shard(
    folder: Path,
    number: int,
    plain: Tensor,
    mirrored: Tensor,
    labels: Tensor,
    unreadable: dict[str, str],
) -> Shard:
    """Writes a shard, which has its name only when it is whole and on the disk.

    Args:
        folder: of the cache.
        number: of the shard.
        plain: [n, 2, L, h, w] float32, mean and deviation.
        mirrored: the same of the mirrored pictures.
        labels: [n] int64.
        unreadable: path -> reason of what was left out.

    Raises:
        DataError: a latent is not finite.
        OSError: the disk is full.
    """
    if not (plain.isfinite().all() and mirrored.isfinite().all()):
        raise DataError(
            f"latents of shard {number} are not finite", "try --precision fp32, or another --vae"
        )
    path = folder / f"{number:05d}.safetensors"
    tensors = {PLAIN: plain, MIRRORED: mirrored, LABELS: labels}
    with atomic_write(path, sole=True, durable=True) as beside:
        try:
            save_file({name: each.contiguous() for name, each in tensors.items()}, beside)
        except SafetensorError as error:
            # It tells the system's error as text alone.
            full = "No space left" in str(error) or "os error 28" in str(error)
            number_of = errno.ENOSPC if full else errno.EIO
            raise OSError(number_of, str(error), str(beside)) from error
        shutil.copymode(folder / UNFINISHED / PLAN_FILE, beside)  # else it is for its owner alone
        shard = Shard(
            file=path.name,
            count=len(labels),
            size=beside.stat().st_size,
            crc32=crc32_of(beside),
            unreadable=unreadable,
        )
    _record(folder, shard)
    return shard


def finish(folder: Path, plan: CachePlan, shards: Sequence[Shard]) -> Manifest:
    """Writes the manifest, which makes the cache whole; one process alone may call it.

    Raises:
        DataError: no image of the set could be read.
    """
    manifest = Manifest(folder, plan, tuple(shards))
    if not manifest.count:
        raise DataError(f"none of the {plan.num_files} images in {plan.data} can be read")
    content = {"format": FORMAT, "count": manifest.count, **dataclasses.asdict(plan)}
    content["shards"] = [dataclasses.asdict(shard) for shard in shards]
    write_whole(folder / MANIFEST_FILE, json.dumps(content, indent=1), durable=True)
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    return manifest


def _record(folder: Path, shard: Shard) -> None:
    name = Path(shard.file).with_suffix(".json")
    text = json.dumps(dataclasses.asdict(shard))
    write_whole(folder / UNFINISHED / name, text, durable=True)


# --- Checking


def crc32_of(path: Path) -> str:
    """Checksum of a file: it is there to find damage, and keeps up with the disk."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def wrong_shards(folder: Path, shards: Sequence[Shard]) -> dict[str, str]:
    """File -> what is wrong, by every byte; the processes of a machine share the reading.

    All processes must call it, and all get the same answer.
    """
    wrong = wrong_sizes(folder, tuple(shards))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    mine = [shard for shard in shards if shard.file not in wrong]
    mine = mine[distributed.rank() % local :: local]
    total = sum(shard.size for shard in mine)
    shown = distributed.rank() == 0 and total > SAY_ABOVE
    with (
        ThreadPoolExecutor(cores_per_process()) as pool,
        counted("checking latents, MB", total >> 20, shown=shown) as advance,
    ):
        found = pool.map(crc32_of, (folder / shard.file for shard in mine))
        for shard, crc32 in zip(mine, found, strict=True):
            advance(shard.size >> 20)
            if crc32 != shard.crc32:
                wrong[shard.file] = "is damaged: its checksum is not that of the manifest"
    for others in distributed.all_gather_object(wrong):
        wrong.update(others)
    return dict(sorted(wrong.items()))


# --- Reading


class LatentCache:
    """The latents of a folder, mapped: what is read costs no memory that stays.

    Args:
        folder: of the cache.

    Attributes:
        manifest: what it is of.
        labels: [N] int64 class numbers.

    Raises:
        DataError: no whole cache, or a shard is missing, truncated or no safetensors file.
    """

    def __init__(self, folder: Path) -> None:
        self.manifest = read_manifest(folder)
        opened = [_open(folder, shard, self.manifest.plan) for shard in self.manifest.shards]
        self._sides = [(plain, mirrored) for plain, mirrored, _ in opened]
        # Copied: a view would need its page of the disk for every look at a label.
        self.labels = torch.cat([labels for _, _, labels in opened])
        counts = [shard.count for shard in self.manifest.shards]
        self._ends = list(itertools.accumulate(counts))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def scale(self) -> float:
        """What latents are multiplied by, see `draw`."""
        return self.manifest.plan.scale

    def verify(self) -> None:
        """Reads every byte once; for the start of a training run, by all its processes.

        Raises:
            DataError: names the shard that is damaged.
        """
        if wrong := wrong_shards(self.manifest.folder, self.manifest.shards):
            raise damaged(self.manifest.folder, wrong)

    def mean_std(
        self, numbers: Tensor, mirrored: Tensor, *, pin_memory: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The posteriors of some images.

        Args:
            numbers: [B] places in the cache.
            mirrored: [B], whether the mirrored picture's are wanted.
            pin_memory: whether they will be copied to a GPU.

        Returns:
            mean and standard deviation, [B, L, h, w] float32 each, on the CPU.
        """
        shape = self.manifest.plan.latent_shape
        both = torch.empty(2, len(numbers), *shape, pin_memory=pin_memory)
        for place, (number, side) in enumerate(
            zip(numbers.tolist(), mirrored.tolist(), strict=True)
        ):
            shard = bisect.bisect_right(self._ends, number)
            row = number - (self._ends[shard - 1] if shard else 0)
            both[:, place] = self._sides[shard][side][row]
        return both[0], both[1]

    def batches(
        self, keys: Iterable[tuple[Tensor, Tensor]], device: torch.device
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """`mean_std` of each (numbers, mirrored) on a device, read ahead in a thread."""
        pin = device.type == "cuda"
        waiting: deque[Future[tuple[Tensor, Tensor]]] = deque()
        with ThreadPoolExecutor(1) as reader:
            for numbers, mirrored in keys:
                waiting.append(reader.submit(self.mean_std, numbers, mirrored, pin_memory=pin))
                if len(waiting) > AHEAD:
                    yield _on(device, waiting.popleft())
            while waiting:
                yield _on(device, waiting.popleft())


def _on(device: torch.device, read: Future[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    mean, std = read.result()
    return mean.to(device, non_blocking=True), std.to(device, non_blocking=True)


def _open(folder: Path, shard: Shard, plan: CachePlan) -> tuple[Tensor, Tensor, Tensor]:
    """The mapped tensors of a shard; the map stays as long as they do, the file is closed."""
    shape = (shard.count, 2, *plan.latent_shape)
    try:
        with safe_open(folder / shard.file, "pt") as file:
            tensors = [file.get_tensor(name) for name in (PLAIN, MIRRORED, LABELS)]
    except (SafetensorError, OSError) as error:
        raise damaged(folder, {shard.file: f"is damaged: {error}"}) from error
    if [tuple(each.shape) for each in tensors] != [shape, shape, (shard.count,)]:
        raise damaged(folder, {shard.file: "holds other latents than the manifest says"})
    return tensors[0], tensors[1], tensors[2]
