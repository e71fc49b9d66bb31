"""Measures the images of one side: features in batches, summed up over all processes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from spiralrope_cli.core.config.fid import FidRun
from spiralrope_cli.core.data.image_sets import ImageBatch, image_batches
from spiralrope_cli.core.data.inputs import (
    POOL_SIZE,
    SPATIAL_SIZE,
    ImageInput,
    Side,
    read_statistics,
)
from spiralrope_cli.core.data.reference_cache import ReferenceCache
from spiralrope_cli.core.errors import CheckpointError, DataError
from spiralrope_cli.core.hub.published import load_safely
from spiralrope_cli.core.jobs.score_plan import NOTHING, Wanted
from spiralrope_cli.core.metrics.inception import (
    NUM_CLASSES,
    Features,
    InceptionFeatures,
    build_extractor,
)
from spiralrope_cli.core.metrics.inception_score import InceptionScore
from spiralrope_cli.core.metrics.moments import Moments
from spiralrope_cli.core.runtime import distributed, report
from spiralrope_cli.core.runtime.console import say
from spiralrope_cli.core.runtime.device import autocast
from spiralrope_cli.core.runtime.job import Job
from spiralrope_cli.core.runtime.progress import counted
from spiralrope_cli.core.runtime.threads import in_order


@dataclass
class Measured:
    """What is known of one side; on all but the first process it is not complete.

    Attributes:
        num: images that were measured; None where nobody knows.
        num_unreadable: images that were left out.
        gaussians: `fid` and `sfid` -> mean [D] and covariance [D, D], float64, on the CPU.
        inception_score: mean and standard deviation.
        features: [N, 2048] float32, in the order of the images.
        from_cache: parts that an earlier run had computed.
    """

    num: int | None
    num_unreadable: int = 0
    gaussians: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    inception_score: tuple[float, float | None] | None = None
    features: Tensor | None = None
    from_cache: tuple[str, ...] = ()


class Sums:
    """What one process gathers from its part of the images.

    Args:
        wanted: what of it.
        part: its images.
        num_images: of all processes.
        device: where features are computed.
    """

    def __init__(self, wanted: Wanted, part: range, num_images: int, device: torch.device) -> None:
        self.part = part
        self.moments: dict[str, Moments] = {}
        if wanted.fid:
            self.moments["fid"] = Moments(POOL_SIZE, device)
        if wanted.sfid:
            self.moments["sfid"] = Moments(SPATIAL_SIZE, device)
        self.score = (
            InceptionScore(num_images, NUM_CLASSES, device) if wanted.inception_score else None
        )
        self.features = (
            torch.empty(len(part), POOL_SIZE, device=device) if wanted.features else None
        )
        self.read = torch.zeros(len(part), dtype=torch.bool)

    def add(self, numbers: list[int], features: Features) -> None:
        """Takes in the features of some images, by their places in the set."""
        places = torch.tensor(numbers)
        self.read[places - self.part.start] = True
        if "fid" in self.moments and features.pool is not None:
            self.moments["fid"].add(features.pool)
        if "sfid" in self.moments and features.spatial is not None:
            self.moments["sfid"].add(features.spatial)
        if self.score and features.logits is not None:
            self.score.add(places, features.logits)
        if self.features is not None and features.pool is not None:
            places = (places - self.part.start).to(self.features.device, non_blocking=True)
            self.features[places] = features.pool

    def merged(self) -> Measured:
        """The sums over all processes."""
        num = sum(distributed.gathered(int(self.read.sum())))
        result = Measured(num, num_unreadable=sum(distributed.gathered(len(self.part))) - num)
        for name, moments in self.moments.items():
            moments.merge_processes()
            if moments.count >= 2:
                result.gaussians[name] = moments.mean.cpu(), moments.covariance().cpu()
        result.inception_score = self.score.result() if self.score else None
        if self.features is not None:
            whole = bool(self.read.all())
            mine = self.features if whole else self.features[self.read.to(self.features.device)]
            result.features = distributed.gathered_rows(mine)
        return result


def measure(config: FidRun, job: Job, side: Side, wanted: Wanted) -> Measured:
    """What is wanted of the images of a side, and what it has stored.

    Raises:
        UnreadableImageError: an image cannot be decoded, and `skip_bad` is off.
        DataError: an input is damaged, or holds too little.
        CheckpointError: the weights are damaged, or of another network.
    """
    result = Measured(side.num)
    if wanted != NOTHING and side.images is not None:
        result = _measure_images(config, job, side, side.images, wanted)
    needed = [name for name in side.stored if name in config.select or config.save_stats]
    for name in needed if job.is_first else ():
        mean, covariance = read_statistics(side.path, name)
        result.gaussians[name] = torch.from_numpy(mean), torch.from_numpy(covariance)
    return result


@functools.lru_cache(maxsize=1)
def _load_once(weights: Path, device: torch.device) -> InceptionFeatures:
    """The network, the same for both sides."""
    return build_extractor(load_safely(weights), weights).to(device)


def _measure_images(
    config: FidRun, job: Job, side: Side, images: ImageInput, wanted: Wanted
) -> Measured:
    num = side.num or 0
    part = range(num * job.rank // job.world_size, num * (job.rank + 1) // job.world_size)
    sums = Sums(wanted, part, num, job.device)
    network = _load_once(Path(config.weights), job.device)
    cores = torch.get_num_threads() if job.device.type == "cpu" else 1
    opened = image_batches(
        images,
        part,
        -(-config.batch_size // cores),
        threads=config.machine.workers,
        pin_memory=job.device.type == "cuda",
    )
    unreadable: dict[str, str] = {}
    with (
        contextlib.closing(opened) as batches,
        contextlib.closing(in_features(batches, network, wanted, job)) as measured,
        counted(side.role, num, shown=job.is_first) as advance,
        torch.inference_mode(),
    ):
        for batch, features in measured:
            for bad in batch.unreadable:
                if not config.machine.skip_bad:
                    raise bad.error()
                unreadable[bad.path] = bad.reason
            if features:
                sums.add(batch.numbers, features)
            advance((len(batch.numbers) + len(batch.unreadable)) * job.world_size)
        result = sums.merged()
    reasons = {path: why for each in distributed.gathered(unreadable) for path, why in each.items()}
    if job.is_first:
        report.say_unreadable(reasons)
    if (result.num or 0) < max(2, config.num if side.role == "SAMPLES" else 0):
        asked = f"--num {config.num}: " if config.num else ""
        raise DataError(
            f"{asked}only {result.num} image(s) of {side.role} {side.path} could be read",
            "2 or more are needed" if not asked else "make more, or ask for fewer",
        )
    checked = [mean for mean, _ in result.gaussians.values()]
    checked += [torch.tensor(result.inception_score[0])] if result.inception_score else []
    checked += [] if result.features is None else [result.features.sum()]
    if not all(bool(each.isfinite().all()) for each in checked):
        raise CheckpointError(
            f"features of {side.role} are not finite",
            f"the weights in {config.weights} are damaged, or are not those of this network",
        )
    return result


def in_features(
    batches: Iterable[ImageBatch], extractor: InceptionFeatures, wanted: Wanted, job: Job
) -> Generator[tuple[ImageBatch, Features | None], None, None]:
    """Batches with their features; None where nothing of a batch could be read.

    On a CPU every core works on batches of its own: that is faster than to share each layer out,
    and rounding does not depend on how many cores there are.
    """

    @torch.inference_mode()
    def compute(batch: ImageBatch) -> tuple[ImageBatch, Features | None]:
        if not batch.numbers:
            return batch, None
        groups = [group.to(job.device, non_blocking=True) for group in batch.groups]
        with autocast(job.device, job.dtype):
            features = extractor(
                groups,
                pool=wanted.fid or wanted.features,
                spatial=wanted.sfid,
                logits=wanted.inception_score,
            )
        return batch, features

    if job.device.type != "cpu":
        yield from map(compute, batches)
        return
    cores = torch.get_num_threads()
    tasks = (partial(compute, batch) for batch in batches)
    try:
        yield from in_order(tasks, cores, cores, partial(torch.set_num_threads, 1))
    finally:
        torch.set_num_threads(cores)  # a part of the setting is the process's, not the thread's


def measure_reference(
    config: FidRun, job: Job, side: Side, wanted: Wanted, cache: ReferenceCache | None
) -> Measured:
    """The same, but parts that an earlier run kept are not computed again, and new ones are kept.

    Args:
        config: of the run.
        job: this process.
        side: the reference.
        wanted: what of it.
        cache: on the first process, if anything is wanted.
    """
    kept = {part: cache.load(part) for part in wanted.parts} if cache else {}
    found = tuple(part for part, arrays in kept.items() if arrays)
    found = distributed.gathered(found)[0]  # what the first process has
    missing = Wanted(
        fid=wanted.fid and "fid" not in found,
        sfid=wanted.sfid and "sfid" not in found,
        inception_score=False,
        features=wanted.features and "features" not in found,
    )
    result = measure(config, job, side, missing)
    if cache:
        _keep(cache, result, missing)
    for part, arrays in kept.items():
        if arrays:
            result.num, result.num_unreadable = (int(arrays[key]) for key in ("num", "bad"))
            if part == "features":
                result.features = torch.from_numpy(arrays["features"]).to(job.device)
            else:
                result.gaussians[part] = tuple(  # type: ignore[assignment]
                    torch.from_numpy(arrays[key]) for key in ("mean", "covariance")
                )
    result.from_cache = found
    return result


def _keep(cache: ReferenceCache, result: Measured, parts: Wanted) -> None:
    for part in parts.parts:
        if part == "features" and result.features is not None:
            arrays = {"features": result.features.cpu().numpy()}
        else:
            mean, covariance = result.gaussians[part]
            arrays = {"mean": mean.numpy(), "covariance": covariance.numpy()}
        problem = cache.store(part, num=result.num or 0, bad=result.num_unreadable, **arrays)
        if problem:
            say(f"warning: {problem}")
