"""Measures a set of images against another: from two inputs to figures with their protocol."""

from __future__ import annotations

from pathlib import Path

import torch

from spiralrope_cli.core.config.fid import FidRun
from spiralrope_cli.core.data.reference_cache import ReferenceCache, digests_beside, write_npz
from spiralrope_cli.core.errors import SpiralRopeError
from spiralrope_cli.core.jobs.score_measure import Measured, measure, measure_reference
from spiralrope_cli.core.jobs.score_plan import (
    FEATURES,
    NOTHING,
    Plan,
    find_weights,
    make_plan,
    without_unreadable,
)
from spiralrope_cli.core.jobs.score_report import describe, show
from spiralrope_cli.core.metrics.bootstrap import fid_spread
from spiralrope_cli.core.metrics.frechet import frechet_distance
from spiralrope_cli.core.metrics.kid import kernel_distance
from spiralrope_cli.core.metrics.manifold import precision_recall
from spiralrope_cli.core.runtime.console import say
from spiralrope_cli.core.runtime.device import forbid_tf32, return_freed_memory
from spiralrope_cli.core.runtime.job import open_job
from spiralrope_cli.core.runtime.run_folder import write_json


def run(config: FidRun) -> None:
    """Computes and shows the figures; executed by every worker.

    Raises:
        DataError: an input is damaged, or holds too little.
        CheckpointError: the weights are damaged, or of another network.
    """
    plan = make_plan(config)
    with open_job(config.machine, None) as job:
        forbid_tf32()
        sides = [side for side in (plan.samples, plan.reference) if side and job.is_first]
        with digests_beside(sides) as digests:
            samples = measure(config, job, plan.samples, plan.from_samples)
            return_freed_memory()  # what the other side adds would come on top of it
            weights = find_weights(config.weights)[1] if plan.needs_weights and job.is_first else ""
            protocol = config.protocol(weights) if weights else plan.samples.protocol
            if config.save_stats and job.is_first:
                # What a file of images had stored is of no one knows which images and weights.
                known = (samples.num or 0, protocol) if not plan.samples.stored else (0, "")
                save_statistics(Path(config.save_stats), samples, *known)
            reference, cache = None, None
            if plan.reference:
                if job.is_first and plan.from_reference != NOTHING:
                    how = f"{protocol}, skip_bad {config.machine.skip_bad}"
                    cache = ReferenceCache(digests[1].result(), how)
                reference = measure_reference(
                    config, job, plan.reference, plan.from_reference, cache
                )
            if job.is_first:
                return_freed_memory()
                nums = samples.num, reference.num if reference else None
                plan = without_unreadable(plan, config, *nums)
                figures = compare(config, plan, samples, reference)
                facts = [each.result() for each in digests]
                described = describe(config, plan, figures, [samples, reference], facts, weights)
                show(config, described)
                if config.facts_file:
                    write_json(Path(config.facts_file), described)


@torch.inference_mode()
def compare(
    config: FidRun, plan: Plan, samples: Measured, reference: Measured | None
) -> dict[str, float | None]:
    """The figures of the plan, by their names in the JSON."""
    figures: dict[str, float | None] = {}
    for name in ("fid", "sfid"):
        if name in plan.figures and reference:
            figures[name] = frechet_distance(*samples.gaussians[name], *reference.gaussians[name])
    if config.bootstrap and reference and samples.features is not None:
        figures["fid_std"] = fid_spread(
            samples.features, *reference.gaussians["fid"], times=config.bootstrap, seed=config.seed
        )
    if samples.inception_score:
        figures["is"], figures["is_std"] = samples.inception_score
    wanted = [name for name in FEATURES if name in plan.figures]
    if wanted and reference and samples.features is not None and reference.features is not None:
        pair = samples.features, reference.features
        if "kid" in wanted:
            figures["kid"], figures["kid_std"] = kernel_distance(
                *pair,
                num_subsets=config.kid_subsets,
                subset_size=config.kid_subset_size,
                seed=config.seed,
            )
        if set(wanted) - {"kid"}:
            both = dict(zip(("precision", "recall"), precision_recall(*pair), strict=True))
            figures.update({name: both[name] for name in wanted if name in both})
    return figures


def save_statistics(path: Path, samples: Measured, num: int, protocol: str) -> None:
    """Writes mean and covariance under the names that pytorch-fid and ADM read.

    Args:
        path: of the file.
        samples: with the statistics.
        num: of how many images they are, 0 if unknown.
        protocol: by which they were made, empty if unknown.
    """
    arrays = dict(zip(("mu", "sigma"), samples.gaussians["fid"], strict=True))
    if "sfid" in samples.gaussians:
        arrays |= dict(zip(("mu_s", "sigma_s"), samples.gaussians["sfid"], strict=True))
    try:
        write_npz(
            path,
            num_images=num,
            protocol=protocol,
            **{name: each.numpy() for name, each in arrays.items()},
        )
    except OSError as error:
        raise SpiralRopeError(f"--save-stats {path} cannot be written: {error}") from error
    say(f"statistics of SAMPLES, {num or 'an unknown number of'} images, are in {path}")
