"""Cached latents: shards are written atomically, and read memory-mapped.

Their format is in `shards.py`.

Legend: B batch, n images of a shard, L latent channels, (h, w) latent pixels.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from spiralrope_cli.core.data.shards import (
    METADATA_KEY,
    TENSORS,
    CachePlan,
    Shard,
    damaged,
    read_cache,
    read_shards,
)
from spiralrope_cli.core.errors import DataError
from spiralrope_cli.core.runtime import distributed
from spiralrope_cli.core.runtime.launch import cores_per_process
from spiralrope_cli.core.runtime.progress import counted
from spiralrope_cli.core.runtime.run_folder import differences
from spiralrope_cli.core.storage import atomic_write

FREE_TO_CHANGE = {"data", "vae"}
"""Paths, which may change: the digests are compared instead."""


# --- Writing


def finished_shards(folder: Path, plan: CachePlan) -> tuple[dict[int, Shard], dict[str, str]]:
    """Finished shards in a folder by number, and file -> what is wrong with it."""
    shards, wrong = read_shards(folder)
    for shard in shards.values():
        if differing := _differences(shard.plan, plan):
            raise DataError(
                f"{folder} holds latents of other options: {differing}",
                "choose another --out, or remove that folder",
            )
    return shards, wrong


def _differences(before: CachePlan, plan: CachePlan) -> str:
    """The options of two plans that differ and change latents, as text; empty if none."""
    if before.class_names != plan.class_names:
        return "other class folders"
    # Before the download the digest of a published VAE is unknown; so is the precision of a device
    # that is on another machine.
    unknown = {name for name in ("vae_sha256", "precision") if not getattr(plan, name)}
    was, now = map(dataclasses.asdict, (before, plan))
    for values in (was, now):
        for name in ("files_sha256", "vae_sha256"):
            values[name] = str(values[name])[:16]
    return differences(was, now, {*FREE_TO_CHANGE, *unknown})


def write_shard(
    folder: Path,
    plan: CachePlan,
    number: int,
    plain: Tensor,
    mirrored: Tensor,
    labels: Tensor,
    unreadable: dict[str, str],
) -> Shard:
    """Writes a shard atomically; `unreadable` is path -> reason of images that were skipped.

    Plain and mirrored are mean and standard deviation, [n, 2, L, h, w] float32; labels [n] int64.
    """
    if not (plain.isfinite().all() and mirrored.isfinite().all()):
        raise DataError(
            f"latents of shard {number} are not finite", "try --precision fp32, or another --vae"
        )
    tensors = [each.contiguous() for each in (plain, mirrored, labels)]
    shard = Shard(number=number, plan=plan, count=len(labels), unreadable=unreadable)
    shard = dataclasses.replace(shard, crc32=checksum(shard, tensors))
    metadata = {METADATA_KEY: json.dumps(dataclasses.asdict(shard))}
    # Not by save_file: its files are readable by the owner only, and it hides a full disk.
    content = save(dict(zip(TENSORS, tensors, strict=True)), metadata)
    with atomic_write(folder / shard.file, sole=True, durable=True) as beside:
        beside.write_bytes(content)
    return shard


# --- Checking


def checksum(shard: Shard, tensors: Iterable[Tensor]) -> str:
    """CRC-32 of metadata and tensors of a shard: enough to find damage, and as fast as the disk."""
    metadata = dataclasses.asdict(dataclasses.replace(shard, crc32=""))
    value = zlib.crc32(json.dumps(metadata).encode())
    for tensor in tensors:
        value = zlib.crc32(tensor.numpy().reshape(-1).data, value)
    return f"{value:08x}"


def damaged_shards(folder: Path, shards: Sequence[Shard]) -> dict[str, str]:
    """File -> what is wrong, after reading every byte. The processes of a machine split the work.

    Every process must call it, and gets the same result.
    """
    first, every = distributed.local_rank()
    mine = shards[first::every]
    total = sum(shard.num_bytes for shard in mine)
    shown = distributed.get_rank() == 0 and total > 1 << 30  # less is done at once
    wrong: dict[str, str] = {}
    with (
        ThreadPoolExecutor(cores_per_process()) as pool,
        counted("checking latents, MB", total >> 20, shown=shown) as advance,
    ):
        found = pool.map(lambda shard: checksum(shard, open_shard(folder, shard)), mine)
        for shard, crc32 in zip(mine, found, strict=True):
            advance(shard.num_bytes >> 20)
            if crc32 != shard.crc32:
                wrong[shard.file] = "is damaged: its checksum is not the one in its metadata"
    for others in distributed.all_gather_object(wrong):
        wrong.update(others)
    return dict(sorted(wrong.items()))


# --- Reading


class LatentCache:
    """The latents of a folder, memory-mapped.

    Attributes:
        metadata: options and shards.
        labels: [N] int64 class numbers.
    """

    def __init__(self, folder: Path) -> None:
        self.metadata = read_cache(folder)
        opened = (open_shard(folder, shard) for shard in self.metadata.shards)
        plain, mirrored, labels = zip(*opened, strict=True)
        self._sides: tuple[Dataset[Tensor], ...] = ConcatDataset(plain), ConcatDataset(mirrored)
        # Copied by cat: a mapped label could need a disk access each time.
        self.labels = torch.cat(labels)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def scale(self) -> float:
        """Factor of the latents, see `vae.sample_posterior`."""
        return self.metadata.plan.scale

    def verify(self) -> None:
        """Reads every byte once, and raises if a shard is damaged; every process must call it."""
        if wrong := damaged_shards(self.metadata.folder, self.metadata.shards):
            raise damaged(self.metadata.folder, wrong)

    def __reduce__(self) -> tuple[Any, ...]:
        """A spawned worker maps the files again; their contents are not sent to it."""
        return LatentCache, (self.metadata.folder,)

    def mean_std(self, numbers: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
        """Posteriors of images.

        Args:
            numbers: [B] indices in the cache.
            mirrored: [B] bool, True for the flipped image.

        Returns:
            mean and standard deviation, [B, L, h, w] float32 each, on the CPU.
        """
        shape = self.metadata.plan.latent_shape
        both = torch.empty(2, len(numbers), *shape)
        keys = zip(numbers.tolist(), mirrored.tolist(), strict=True)
        for place, (number, side) in enumerate(keys):
            both[:, place] = self._sides[side][number]
        return both[0], both[1]


def open_shard(folder: Path, shard: Shard) -> tuple[Tensor, Tensor, Tensor]:
    """The memory-mapped tensors of a shard; the mapping lives as long as they do."""
    try:
        with safe_open(folder / shard.file, "pt") as file:
            plain, mirrored, labels = (file.get_tensor(name) for name in TENSORS)
    except (SafetensorError, OSError) as error:
        raise damaged(folder, {shard.file: f"is damaged: {error}"}) from error
    return plain, mirrored, labels
