"""Statistics of SAMPLES or REFERENCE: Inception features in batches, summed over processes.

Legend: N images, D features.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import ChainMap
from collections.abc import Callable, Collection, Generator, Iterable
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from spiralrope_cli.core.config.fid import FidRun
from spiralrope_cli.core.data.image_sets import FolderInput, ImageInput, Side
from spiralrope_cli.core.data.images import (
    LARGEST_BATCH,
    FilesOfAnySize,
    ImageBatch,
    image_batches,
    in_order,
    note_unreadable,
    num_bytes,
)
from spiralrope_cli.core.data.loader import PREFETCH, read_ahead
from spiralrope_cli.core.data.npz import POOL_SIZE, SPATIAL_SIZE, ReferenceCache, read_statistics
from spiralrope_cli.core.errors import CheckpointError, DataError
from spiralrope_cli.core.metrics.inception import NUM_CLASSES, Features, InceptionFeatures
from spiralrope_cli.core.metrics.scores import (
    InceptionScore,
    Moments,
    fid_spread,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from spiralrope_cli.core.runtime import distributed
from spiralrope_cli.core.runtime.device import autocast
from spiralrope_cli.core.runtime.distributed import DistContext
from spiralrope_cli.core.runtime.launch import num_loaders
from spiralrope_cli.core.runtime.progress import counted, say_unreadable

ARRAYS = {
    "fid": ("mean", "covariance"),
    "sfid": ("mean", "covariance"),
    "features": ("features",),
}
"""Part of the statistics of a side -> names of its arrays, also in the cache."""
IN_FLIGHT = 1 << 31
"""Bytes of pixels that processes decode ahead of a GPU."""
LOOKED_AT = 32
"""Images whose headers say how large the images are."""
OF_PART = {"fid": "pool", "features": "pool", "sfid": "spatial", "is": "logits"}
"""Part -> name of the features that it is computed from."""


@dataclass
class Measured:
    """Statistics of one side; complete on the first process only."""

    num: int | None  # number of images; None if unknown
    num_unreadable: int = 0  # images that were skipped
    num_differing: int = 0  # images that the two readings see differently
    # `fid` and `sfid`: mean [D] and covariance [D, D], float64, on the CPU.
    # `features`: pool features [N, 2048], float32, in the order of the images.
    stats: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    inception_score: tuple[float, float | None] | None = None  # mean and standard deviation
    from_cache: tuple[str, ...] = ()  # parts that were read from the cache


def measure_side(
    run: FidRun,
    ctx: DistContext,
    side: Side,
    network: Callable[[], InceptionFeatures],
    cache: ReferenceCache | None = None,
) -> Measured:
    """Statistics of a side: from the cache or computed from its images, and those in its file.

    Every process must call this; `cache` is given on the first one only. `network` builds the
    extractor, and is called only if images have to be read.
    """
    kept = cache.load(side.needed) if cache else {}
    if distributed.all_gather_object(bool(kept))[0]:  # the first process has them
        result = Measured(side.num, from_cache=side.needed)
        for part, arrays in kept.items():
            result.num, result.num_unreadable = int(arrays["num"]), int(arrays["bad"])
            result.num_differing = int(arrays["differing"])
            result.stats[part] = tuple(torch.from_numpy(arrays[name]) for name in ARRAYS[part])
    elif side.needed and side.images is not None:
        result = _measure_images(run, ctx, side, side.images, network())
        if cache:
            for part in side.needed:
                tensors = (each.cpu().numpy() for each in result.stats[part])
                named = dict(zip(ARRAYS[part], tensors, strict=True))
                counts = {"num": result.num or 0, "bad": result.num_unreadable}
                cache.store(part, **counts, differing=result.num_differing, **named)
    else:
        result = Measured(side.num)
    for part in side.stored if ctx.is_first else ():
        if part in run.select or run.save_stats:
            mean, covariance = read_statistics(Path(side.path), part)
            result.stats[part] = torch.from_numpy(mean), torch.from_numpy(covariance)
    return result


def _measure_images(
    run: FidRun, ctx: DistContext, side: Side, images: ImageInput, network: InceptionFeatures
) -> Measured:
    """Statistics of images; each process reads a contiguous part of them."""
    num = side.num or 0
    mine = range(num * ctx.rank // ctx.world_size, num * (ctx.rank + 1) // ctx.world_size)
    sums = Sums(side.needed, mine, num, ctx.device)
    opened = opened_images(run, ctx, images, mine)
    unreadable: dict[str, str] = {}
    differing = 0
    with (
        contextlib.closing(opened) as batches,
        contextlib.closing(in_features(batches, network, side.needed, ctx)) as measured,
        counted(side.role, num, shown=ctx.is_first) as advance,
        torch.inference_mode(),
    ):
        for batch, features in measured:
            note_unreadable(batch.unreadable, run.machine.skip_bad, unreadable)
            differing += batch.num_differing
            if features:
                sums.add(batch.numbers, features)
            advance((len(batch.numbers) + len(batch.unreadable)) * ctx.world_size)
        result = sums.merged()
        result.num_differing = sum(distributed.all_gather_object(differing))
    unreadable = dict(ChainMap(*distributed.all_gather_object(unreadable)))
    if ctx.is_first:
        say_unreadable(unreadable)
    # Refuse too few images, and features that are NaN.
    asked = run.num_samples if side.role == "SAMPLES" else 0
    if (result.num or 0) < max(2, asked):
        raise DataError(
            (f"--num-samples {run.num_samples}: " if run.num_samples else "")
            + f"only {result.num} image(s) of {side.role} {side.path} could be read",
            "make more, or ask for fewer" if run.num_samples else "2 or more are needed",
        )
    sample = [stats[0].sum().item() for stats in result.stats.values()]
    sample += result.inception_score[:1] if result.inception_score else ()
    if not all(map(math.isfinite, sample)):
        raise CheckpointError(
            f"features of {side.role} are not finite",
            f"the weights in {run.weights} are damaged, or are not those of this network",
        )
    return result


def opened_images(
    run: FidRun, ctx: DistContext, images: ImageInput, mine: range
) -> Generator[ImageBatch, None, None]:
    """Batches of a part of the images, decoded ahead: by threads, or by processes beside a GPU.

    The processes have at most about `IN_FLIGHT` bytes of pixels ahead, however large the images.
    """
    on_gpu, size = ctx.device.type == "cuda", run.batch_size
    if on_gpu and isinstance(images, FolderInput):
        looked_at = mine[:: max(1, len(mine) // LOOKED_AT)]
        largest = max((num_bytes(images, range(n, n + 1)) for n in looked_at), default=0)
        ahead = IN_FLIGHT // max(1, size * largest)
        if size * largest < LARGEST_BATCH:
            parts = (list(mine[first : first + size]) for first in range(0, len(mine), size))
            workers = min(num_loaders(run.machine, ctx.device.type), ahead)
            return read_ahead(
                FilesOfAnySize(images.files, run.images),
                parts,
                workers,
                pin_memory=True,
                prefetch=min(PREFETCH, ahead // max(1, workers)),
            )
    cores = torch.get_num_threads() if ctx.device.type == "cpu" else 1
    threads = run.machine.workers
    return image_batches(
        images, mine, -(-size // cores), threads=threads, pin_memory=on_gpu, reading=run.images
    )


def in_features(
    batches: Iterable[ImageBatch],
    network: InceptionFeatures,
    parts: Collection[str],
    ctx: DistContext,
) -> Generator[tuple[ImageBatch, Features | None], None, None]:
    """Batches with their features; None if no image of a batch could be read.

    On a CPU each core computes whole batches. This is faster than several threads per layer, and
    the rounding does not depend on the number of cores.
    """

    @torch.inference_mode()
    def compute(batch: ImageBatch) -> tuple[ImageBatch, Features | None]:
        if not batch.numbers:
            return batch, None
        groups = [group.to(ctx.device, non_blocking=True) for group in batch.groups]
        with autocast(ctx.device, ctx.dtype):
            return batch, network(groups, {OF_PART[part] for part in parts})

    if ctx.device.type != "cpu":
        yield from map(compute, batches)
        return
    cores, ended = torch.get_num_threads(), threading.Event()
    tasks = (partial(compute, batch) for batch in batches)

    def check(*_: object) -> None:
        if ended.is_set():  # a batch takes seconds; Ctrl-C does not wait for the rest of it
            raise CancelledError

    with contextlib.ExitStack() as stack:
        # set_num_threads(1) in a thread also affects the process.
        stack.callback(torch.set_num_threads, cores)
        for stage in (network.stem, *network.stages.values()):
            stack.enter_context(stage.register_forward_pre_hook(check))
        yield from in_order(tasks, cores, cores, partial(torch.set_num_threads, 1), ended)


class Sums:
    """Sums over the images of one process; `mine` are their indices in the set."""

    def __init__(
        self, parts: Collection[str], mine: range, num_images: int, device: torch.device
    ) -> None:
        self.mine = mine
        sizes = {"fid": POOL_SIZE, "sfid": SPATIAL_SIZE}
        self.moments = {name: Moments(sizes[name], device) for name in sizes if name in parts}
        self.score = InceptionScore(num_images, NUM_CLASSES, device) if "is" in parts else None
        self.features = (
            torch.empty(len(mine), POOL_SIZE, device=device) if "features" in parts else None
        )
        self.read = torch.zeros(len(mine), dtype=torch.bool)

    def add(self, numbers: list[int], features: Features) -> None:
        """Adds the features of a batch; `numbers` are its indices in the set."""
        places = torch.tensor(numbers)
        self.read[places - self.mine.start] = True
        for name, moments in self.moments.items():
            moments.add(features[OF_PART[name]])
        if self.score:
            self.score.add(places, features["logits"])
        if self.features is not None:
            places = (places - self.mine.start).to(self.features.device, non_blocking=True)
            self.features[places] = features["pool"]

    def merged(self) -> Measured:
        """The sums over all processes."""
        num = sum(distributed.all_gather_object(int(self.read.sum())))
        result = Measured(
            num, num_unreadable=sum(distributed.all_gather_object(len(self.mine))) - num
        )
        for name, moments in self.moments.items():
            moments.merge_processes()
            if moments.count >= 2:
                result.stats[name] = moments.mean.cpu(), moments.covariance().cpu()
        result.inception_score = self.score.result() if self.score else None
        if self.features is not None:
            whole = bool(self.read.all())
            read = self.features if whole else self.features[self.read.to(self.features.device)]
            features = distributed.gather_rows(read)
            if features is not None:
                result.stats["features"] = (features,)
        return result


@torch.inference_mode()
def compare(
    run: FidRun, metrics: Collection[str], samples: Measured, reference: Measured | None = None
) -> dict[str, float | None]:
    """Metrics of samples against reference, by their names in the JSON."""
    values: dict[str, float | None] = {}
    if samples.inception_score:
        values["is"], values["is_std"] = samples.inception_score
    if reference is None:
        return values
    for name in ("fid", "sfid"):
        if name in metrics:
            values[name] = frechet_distance(*samples.stats[name], *reference.stats[name])
    if run.bootstrap:
        (features,) = samples.stats["features"]
        values["fid_std"] = fid_spread(
            features, *reference.stats["fid"], times=run.bootstrap, seed=run.seed
        )
    if "features" not in samples.stats or "features" not in reference.stats:
        return values
    (features,), (features2,) = (side.stats["features"] for side in (samples, reference))
    features2 = features2.to(features.device)
    if "kid" in metrics:
        values["kid"], values["kid_std"] = kernel_distance(
            features,
            features2,
            num_subsets=run.kid_subsets,
            subset_size=run.kid_subset_size,
            seed=run.seed,
        )
    if "precision" in metrics or "recall" in metrics:
        both = zip(("precision", "recall"), precision_recall(features, features2), strict=True)
        values |= {name: value for name, value in both if name in metrics}
    return values
