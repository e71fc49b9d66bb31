"""`fid`: metrics of SAMPLES against REFERENCE, with their protocol.

Torch is imported in `work` only, so that usage errors are fast.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from spiralrope_cli import __version__
from spiralrope_cli.core.config.fid import EXTRACTOR, FidRun
from spiralrope_cli.core.config.option import build, idle_lines
from spiralrope_cli.core.data import npz
from spiralrope_cli.core.data.image_sets import (
    FolderInput,
    Side,
    digest_of,
    digests_beside,
    inspect_side,
)
from spiralrope_cli.core.errors import ConfigError, DataError
from spiralrope_cli.core.hub.catalog import find_row
from spiralrope_cli.core.hub.source import find_inception
from spiralrope_cli.core.report.results import of_scores, print_table
from spiralrope_cli.core.resolve import named_folder
from spiralrope_cli.core.runtime.launch import launch, say_notes, world_size
from spiralrope_cli.core.runtime.progress import say, say_result
from spiralrope_cli.core.runtime.run_folder import differences, read_json, write_json
from spiralrope_cli.core.runtime.slurm import Remaining
from spiralrope_cli.core.storage import NPZ_FILE

if TYPE_CHECKING:
    from spiralrope_cli.core.metrics.features import Measured
    from spiralrope_cli.core.metrics.inception import InceptionFeatures

NEIGHBOURHOOD = 4
"""Smallest number of images for Precision and Recall: one, and its neighbours."""
USUAL_COUNT = 50_000
"""Number of samples in papers."""
OF_FEATURES = ("batch_size", "device", "nproc", "precision", "skip_bad", "weights", "workers")
"""Options that have no effect if no image is read."""


def score(given: dict[str, Any]) -> Remaining:
    """Runs `fid`; `given` is field name -> value."""
    run: FidRun = build(FidRun, given)
    if run.machine.precision == "tf32":
        run = with_known_tf32(run)
    say_notes(idle_lines(FidRun, run.inert_options(), given))
    plan = settle(run)
    say_notes(
        f"{side.path}: files that are no images are left out{side.images.others}"
        for side in plan.sides
        if isinstance(side.images, FolderInput) and side.images.others
    )
    idle = dict.fromkeys(() if plan.run.weights else OF_FEATURES, "no image is read")
    # Saved statistics have a protocol, which `--images` has to repeat.
    if not any(isinstance(side.images, FolderInput) or side.protocol for side in plan.sides):
        idle["images"] = "no image file is read"
    say_notes(idle_lines(FidRun, idle.items(), given))
    if run.dry_run:
        for side in plan.sides:
            say(f"{side.role:<9}  {side.path}: {side.words}")
        say(f"METRICS    {', '.join(plan.metrics)}, {world_size(plan.run.machine)} process(es)")
    else:
        launch(work, plan.run, plan)
    samples = Path(run.samples)
    stem = samples.absolute().parent.name if samples.name == NPZ_FILE else samples.stem
    return Remaining(named_folder("fid", stem))


@dataclass(frozen=True)
class Plan:
    """Arguments of `work`."""

    run: FidRun  # with the path of the weights; empty if no image is read
    weights_sha256: str  # empty without weights
    sides: tuple[Side, ...]  # SAMPLES, and REFERENCE if given
    left_out: dict[str, str]  # metric -> why it cannot be computed

    @property
    def metrics(self) -> list[str]:
        """Selected metrics that can be computed."""
        return [name for name in self.run.select if name not in self.left_out]


# ---- settle
def with_known_tf32(run: FidRun) -> FidRun:
    """The run in fp32 where the device has no TF32: its statistics are of fp32."""
    from spiralrope_cli.core.runtime.device import pick_device, pick_precision

    precision, reason = pick_precision("tf32", pick_device(run.machine))
    say_notes([reason] if precision == "fp32" else [])
    return replace(run, machine=replace(run.machine, precision=cast(Any, precision)))


def settle(run: FidRun) -> Plan:
    """Checks inputs before any image is read, and finds the weights."""
    sides = [inspect_side(run.samples, "SAMPLES", run.num_samples)]
    if run.reference:
        sides.append(inspect_side(run.reference, "REFERENCE"))
    left_out = check_possible(run, sides)
    metrics = set(run.select).difference(left_out)
    has_images = sides[0].images is not None
    if run.save_stats and not has_images:
        raise ConfigError(f"--save-stats: {sides[0].path} already holds statistics, no images")
    if run.bootstrap and not ("fid" in metrics and has_images):
        raise DataError("--bootstrap needs the images of SAMPLES, and a REFERENCE for the FID")
    wanted = metrics | ({"features"} if run.bootstrap else set())
    if run.save_stats:
        wanted |= {"fid"} | {"sfid"}.intersection(run.select)
    sides[0] = replace(sides[0], needed=needed_parts(sides[0], wanted))
    sides[1:] = [replace(side, needed=needed_parts(side, metrics - {"is"})) for side in sides[1:]]
    used = [(side, name) for side in sides for name in side.stored if name in metrics]
    for side, name in used:
        npz.read_statistics(Path(side.path), name)  # raises if it is not a covariance
    protocols = {side.role: side.protocol for side, _ in used if side.protocol}
    sha256 = ""
    if any(side.needed for side in sides):
        path, sha256 = find_inception(run.weights)
        run = replace(run, weights=str(path))
        protocols["this run"] = run.protocol(sha256)
    else:
        nproc = 1 if run.machine.nnodes == 1 else run.machine.nproc
        run = replace(run, weights="", machine=replace(run.machine, nproc=nproc))
    if len(set(protocols.values())) > 1:
        raise DataError(
            "statistics with different protocols cannot be compared",
            "; ".join(f"{who}: {protocol}" for who, protocol in protocols.items()),
        )
    return Plan(run, sha256, tuple(sides), left_out)


def needed_parts(side: Side, wanted: Collection[str]) -> tuple[str, ...]:
    """Parts to compute from the images of a side: some of `fid`, `sfid`, `is`, `features`."""
    if side.images is None:
        return ()
    parts = [name for name in ("fid", "sfid") if name in wanted and name not in side.stored]
    parts += ["is"] if "is" in wanted else []
    # Other metrics need the features of each image, not only sums.
    each_image = {"features", "kid", "precision", "recall"}
    return (*parts, "features") if each_image & set(wanted) else tuple(parts)


def check_possible(run: FidRun, sides: Sequence[Side]) -> dict[str, str]:
    """Metric -> why it cannot be computed; raises if no selected metric can be."""
    reasons = {name: _obstacle(name, run, sides) for name in run.select}
    left_out = {name: reason for name, reason in reasons.items() if reason}
    if len(left_out) == len(reasons) and run.reference:
        name, reason = next(iter(left_out.items()))
        raise DataError(f"no metric of --select can be computed; {name}: {reason}")
    return left_out


def _obstacle(metric: str, run: FidRun, sides: Sequence[Side]) -> str:
    """Why a metric cannot be computed; empty if it can."""
    if metric == "is":
        return "" if sides[0].images is not None else "SAMPLES holds no images"
    if not run.reference:
        return "there is no REFERENCE"
    least = {"kid": run.kid_subset_size, "precision": NEIGHBOURHOOD, "recall": NEIGHBOURHOOD}
    for side in sides:
        if side.images is None and metric not in side.stored:
            names = f"no {' and '.join(npz.STATISTICS['sfid'][:2])}, and "
            return f"{side.role} holds {names if metric == 'sfid' else ''}no images"
        if side.images is not None and (side.num or 0) < least.get(metric, 2):
            option = " (--kid-subset-size)" if metric == "kid" else ""
            return f"{side.role} has {side.num} images, but {least[metric]} are needed{option}"
    return ""


def earlier_result(run: FidRun) -> dict[str, Any]:
    """The result of an earlier run, if samples, reference and weights are the same."""
    samples, path = Path(run.samples), Path(run.result_file)
    found = read_json(path)
    if not found or not samples.exists() or path.stat().st_mtime < samples.stat().st_mtime:
        return {}
    reference, protocol = (found.get(part) or {} for part in ("reference", "protocol"))
    before = {
        "images": protocol.get("images", FidRun.images),
        "weights": protocol.get("weights_sha256"),
        "reference": reference.get("sha256"),
    }
    now = {
        "images": run.images,
        "weights": find_inception(run.weights)[1],
        "reference": digest_of(inspect_side(run.reference, "REFERENCE")),
    }
    return {} if differences(before, now, ()) else found


# ---- work
def work(run: FidRun, plan: Plan) -> None:
    """Computes and reports the metrics; every worker runs this."""
    from spiralrope_cli.core.metrics.features import compare, measure_side
    from spiralrope_cli.core.runtime.device import allow_tf32, return_freed_memory
    from spiralrope_cli.core.runtime.distributed import open_context

    sha256, samples = plan.weights_sha256, plan.sides[0]
    protocol = run.protocol(sha256) if sha256 else samples.protocol
    with open_context(run.machine, None) as ctx:
        allow_tf32(ctx.precision == "tf32")
        # Without tensor cores, GPUs convolve planes faster than channels.
        planes = (ctx.device.type, ctx.precision) == ("cuda", "fp32")
        network = functools.partial(_load_once, Path(run.weights), str(ctx.device), planes)
        with digests_beside(list(plan.sides) if ctx.is_first else []) as digests:
            measured = [measure_side(run, ctx, samples, network)]
            return_freed_memory()  # else the peak would include the memory of both sides
            if run.save_stats and ctx.is_first:
                # Statistics stored beside images may be of other images and weights.
                known = (0, "") if samples.stored else (measured[0].num or 0, protocol)
                npz.save_statistics(Path(run.save_stats), measured[0].stats, *known)
            for side in plan.sides[1:]:
                cache = None
                if ctx.is_first and side.needed:
                    how = f"{protocol}, skip_bad {run.machine.skip_bad}"
                    cache = npz.ReferenceCache(digests[1].result(), how)
                measured.append(measure_side(run, ctx, side, network, cache))
            if ctx.is_first:
                return_freed_memory()
                # Unreadable images may have left too few for some metrics.
                read = [replace(s, num=m.num) for s, m in zip(plan.sides, measured, strict=True)]
                plan = replace(plan, left_out=check_possible(run, read))
                allow_tf32(False)  # distances are in fp32 at least
                values = compare(run, plan.metrics, *measured)
                result = describe(plan, values, measured, [each.result() for each in digests])
                report(run, result)
                if run.result_file:
                    write_json(Path(run.result_file), result)


@functools.lru_cache(maxsize=1)
def _load_once(weights: Path, device: str, planes: bool) -> InceptionFeatures:
    """The network, the same for both sides."""
    from spiralrope_cli.core.hub.published import load_safely
    from spiralrope_cli.core.metrics.inception import build_extractor

    return build_extractor(load_safely(weights), weights, planes=planes).to(device)


# ---- report
def describe(
    plan: Plan,
    values: dict[str, float | None],
    measured: Sequence[Measured],
    digests: Sequence[str],
) -> dict[str, Any]:
    """The JSON: metrics, inputs and protocol."""
    from spiralrope_cli.core.metrics.scores import SPLIT_SIZE

    run, sha256 = plan.run, plan.weights_sha256
    keys = ("fid", "fid_std", "sfid", "is", "is_std", "kid", "kid_std", "precision", "recall")
    result: dict[str, Any] = {key: values.get(key) for key in keys}
    result |= {"samples": None, "reference": None}
    for side, found, digest in zip(plan.sides, measured, digests, strict=True):
        result[side.role.lower()] = {
            "path": str(side.path),
            "holds": side.words,
            "count": found.num,
            "unreadable": found.num_unreadable,
            "read_differently": found.num_differing,
            "stored_statistics": list(side.stored),
            "from_cache": list(found.from_cache),
            "sha256": digest,
        }
    result["protocol"] = {
        "extractor": EXTRACTOR,
        "weights": run.weights or None,
        "weights_sha256": sha256 or None,
        "weights_published": sha256.startswith(find_row("inception").sha256) if sha256 else None,
        "images": run.images,
        "resize": "bilinear of TensorFlow 1, to 299x299",
        "precision": run.machine.precision,
        "is_split_size": SPLIT_SIZE,
        "kid_subsets": run.kid_subsets,
        "kid_subset_size": run.kid_subset_size,
        "neighbours": NEIGHBOURHOOD - 1,
        "bootstrap": run.bootstrap,
        "seed": run.seed,
        "spiralrope": __version__,
    }
    return result | {"left_out": plan.left_out, "warnings": _warnings(plan, result)}


def _warnings(plan: Plan, result: dict[str, Any]) -> list[str]:
    """Reasons not to compare the metrics with those of papers."""
    how = {
        "as-pil": "as other FID tools do, not as in training (--images as-trained)",
        "as-trained": "as in training, not as other FID tools do",
    }
    lines = [
        f"{number:,} image(s) of {side.role} with transparency or 16-bit grey are read "
        + how[plan.run.images]
        for side in plan.sides
        if (number := result[side.role.lower()]["read_differently"])
    ]
    biased = {"fid", "sfid"}.intersection(plan.metrics)
    for side in plan.sides if biased else ():
        count, is_samples = result[side.role.lower()]["count"], side.role == "SAMPLES"
        # Statistics stored beside images may be of more images than these.
        if count is None or (side.images is not None and biased <= set(side.stored)):
            if is_samples:
                lines.append("the number of images behind the statistics of SAMPLES is unknown")
            continue
        if is_samples and count < USUAL_COUNT:
            lines.append(
                f"{count:,} samples are fewer than the {USUAL_COUNT:,} of papers: FID and sFID "
                "are biased upwards"
            )
        if count <= npz.POOL_SIZE:
            lines.append(
                f"{count:,} images of {side.role} are not more than the {npz.POOL_SIZE} features: "
                "their covariance is singular"
            )
    count, protocol = result["samples"]["count"], result["protocol"]
    split_size = protocol["is_split_size"]
    if protocol["weights_published"] is False:
        lines.append("the weights are not the published ones: do not compare with papers")
    if protocol["precision"] != "fp32":
        lines.append(f"features are in {protocol['precision']}: papers use fp32")
    if "is" in plan.metrics and count is not None and count < split_size:
        lines.append(f"the Inception Score is of one split of {count:,} images, not {split_size:,}")
    return lines


def report(run: FidRun, result: dict[str, Any]) -> None:
    """Prints JSON or a table on stdout."""
    if run.as_json:
        print(json.dumps(result, indent=2, allow_nan=False))  # noqa: T201 - rich would wrap it
        return
    for role in ("samples", "reference"):
        if side := result[role]:
            say_result(f"{role.upper():<9}  {side['path']}")
            bad = side["unreadable"]
            bad = f", {side['count']:,} measured and {bad:,} unreadable" if bad else ""
            say_result(f"           {side['holds']}{bad}, sha256 {side['sha256'][:16]}")
            if side["from_cache"]:
                say_result("           statistics from the cache")
    protocol = result["protocol"]
    if weights := protocol["weights_sha256"]:
        say_result(f"FEATURES   {EXTRACTOR}, {protocol['precision']}, sha256 {weights[:16]}")
    print_table(of_scores(result))
    for line in result["warnings"]:
        say(f"warning: {line}")
