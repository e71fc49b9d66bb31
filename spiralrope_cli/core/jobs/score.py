"""`fid`: measures a set of images against another, from two inputs to figures with their protocol.

Torch is loaded in `work` alone, so that what is wrong with the inputs is told at once.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Column, Table

from spiralrope_cli import __version__
from spiralrope_cli.core.config.evals import EXTRACTOR, LABELS, FidRun, fid_notes
from spiralrope_cli.core.config.nested import build
from spiralrope_cli.core.config.option import idle_lines
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.data import npz
from spiralrope_cli.core.data.image_sets import Side, digest_of, digests_beside, look_at
from spiralrope_cli.core.errors import ConfigError, DataError
from spiralrope_cli.core.hub.catalog import find
from spiralrope_cli.core.hub.networks import find_inception
from spiralrope_cli.core.runtime.launch import is_first_process, launch
from spiralrope_cli.core.runtime.progress import console, say, say_result
from spiralrope_cli.core.runtime.run_folder import differences, read_json, write_json

if TYPE_CHECKING:
    from spiralrope_cli.core.metrics.features import Measured
    from spiralrope_cli.core.metrics.inception import InceptionFeatures

JOB = "spiralrope_cli.core.jobs.score:work"
FEATURES = ("kid", "precision", "recall")
"""Figures that need the features of every image, not only sums over them."""
NEIGHBOURHOOD = 4
"""Images that Precision and Recall need: one, and its neighbours."""
USUAL_COUNT = 50_000
"""Samples behind the figures of papers."""
OF_FEATURES = {"weights", "batch_size", "skip_bad", "nproc", "device", "precision", "workers"}
"""Options without effect where both sides hold statistics alone."""


def score(given: dict[str, Any]) -> None:
    """Measures one set of images, against another if there is one.

    Args:
        given: field name -> value of the options that the user gave.
    """
    run: FidRun = build(FidRun, given)
    say_notes(fid_notes(run, given))
    plan = settle(run)
    say_notes(idle_options(plan, given))
    launch(JOB, plan)


@dataclass(frozen=True)
class Plan:
    """What `work` does.

    Attributes:
        run: with the path of the weights; without weights where no image is looked at.
        weights_sha256: of those weights.
        samples: the one side.
        reference: the other, if there is one.
        figures: those that can be computed.
        left_out: figure -> why it cannot.
    """

    run: FidRun
    weights_sha256: str
    samples: Side
    reference: Side | None
    figures: tuple[str, ...]
    left_out: dict[str, str]

    @property
    def machine(self) -> MachineConfig:
        """Where it is executed."""
        return self.run.machine

    @property
    def out(self) -> str:
        """Where it leaves something behind."""
        return self.run.out


def settle(run: FidRun) -> Plan:
    """Checks all that can be checked before any image is looked at, and finds the weights.

    Raises:
        DataError: a side is missing, damaged or too small, or allows nothing of what was asked.
        FetchError: there are no weights.
    """
    samples = look_at(Path(run.samples).expanduser(), "SAMPLES", run.num)
    reference = look_at(Path(run.reference).expanduser(), "REFERENCE") if run.reference else None
    figures, left_out = possible(run, samples, reference)
    if run.save_stats and samples.images is None:
        raise ConfigError(f"--save-stats: {samples.path} already is a file of statistics")
    saved = {"fid", *({"sfid"} & set(run.select))} if run.save_stats else set()
    if run.bootstrap and not ("fid" in figures and samples.images):
        raise DataError("--bootstrap draws images of SAMPLES, and there are none to measure")
    samples = with_needed(samples, saved.union(figures), features=bool(run.bootstrap))
    reference = reference and with_needed(reference, set(figures) - {"is"})
    holders = [
        side for side in (samples, reference) if side and not set(side.stored).isdisjoint(figures)
    ]
    for side in holders:
        for figure in side.stored:
            if figure in figures:
                npz.read_statistics(side.path, figure)
    if samples.needed or (reference and reference.needed):
        path, sha256 = find_inception(run.weights)
        run = replace(run, weights=str(path))
    else:
        sha256 = ""
        nproc = 1 if run.machine.nnodes == 1 else run.machine.nproc
        run = replace(run, weights="", machine=replace(run.machine, nproc=nproc))
    protocols = {side.role: side.protocol for side in holders if side.protocol}
    if sha256:
        protocols["this run"] = run.protocol(sha256)
    if len(set(protocols.values())) > 1:
        raise DataError(
            "statistics that were made differently cannot be compared",
            "; ".join(f"{who}: {protocol}" for who, protocol in protocols.items()),
        )
    return Plan(run, sha256, samples, reference, figures, left_out)


def with_needed(side: Side, figures: Collection[str], features: bool = False) -> Side:
    """A side that knows what its images must be looked at for."""
    if side.images is None:
        return side
    parts = [name for name in ("fid", "sfid") if name in figures and name not in side.stored]
    parts += ["is"] if "is" in figures else []
    parts += ["features"] if features or not set(FEATURES).isdisjoint(figures) else []
    return replace(side, needed=tuple(parts))


def possible(
    run: FidRun, samples: Side, reference: Side | None
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The figures that can be computed, and why the others cannot.

    Raises:
        DataError: that leaves nothing of what was asked.
    """
    reasons = {figure: _obstacle(figure, run, samples, reference) for figure in run.select}
    figures = tuple(figure for figure, reason in reasons.items() if not reason)
    left_out = {figure: reason for figure, reason in reasons.items() if reason}
    if not figures and reference:
        figure, reason = next(iter(left_out.items()))
        raise DataError(f"nothing of --select can be computed; {figure}: {reason}")
    return figures, left_out


def _obstacle(figure: str, run: FidRun, samples: Side, reference: Side | None) -> str:
    """Why a figure cannot be computed, empty where it can."""
    if figure == "is":
        return "" if samples.images is not None else "SAMPLES holds no images"
    if reference is None:
        return "there is no REFERENCE"
    least = {"kid": run.kid_subset_size, "precision": NEIGHBOURHOOD, "recall": NEIGHBOURHOOD}
    for side in (samples, reference):
        if side.images is None and figure not in side.stored:
            names = (
                f"no {' and '.join(npz.STATISTICS[figure][:2])}, and " if figure == "sfid" else ""
            )
            return f"{side.role} holds {names}no images"
        if side.images is not None and (side.num or 0) < least.get(figure, 2):
            option = " (--kid-subset-size)" if figure == "kid" else ""
            return f"{side.role} has {side.num} images, and {least[figure]} are needed{option}"
    return ""


def idle_options(plan: Plan, given: Collection[str]) -> list[str]:
    """One line for every option that was given and does nothing, as no image is looked at."""
    idle = () if plan.run.weights else sorted(OF_FEATURES)
    return idle_lines(FidRun, [(name, "no image is looked at") for name in idle], given)


def say_notes(lines: list[str]) -> None:
    """What the user should know before it starts, from the process that speaks for all."""
    for line in lines if is_first_process() else ():
        say(f"note: {line}")


def already(run: FidRun) -> dict[str, Any]:
    """The facts that an earlier run left, if of these samples, this reference and these weights."""
    samples, result = Path(run.samples), Path(run.facts_file)
    found = read_json(result)
    if not found or not samples.exists() or result.stat().st_mtime < samples.stat().st_mtime:
        return {}
    reference, protocol = (found.get(part) or {} for part in ("reference", "protocol"))
    before = {"reference": reference.get("sha256"), "weights": protocol.get("weights_sha256")}
    now = {
        "weights": find_inception(run.weights)[1],
        "reference": digest_of(look_at(Path(run.reference).expanduser(), "REFERENCE")),
    }
    return {} if differences(before, now, ()) else found


def work(plan: Plan) -> None:
    """Measures, compares and reports; executed by every worker.

    Raises:
        DataError: an input is damaged, or holds too little.
        CheckpointError: the weights are damaged, or of another network.
    """
    from spiralrope_cli.core.metrics.features import compare, measure
    from spiralrope_cli.core.runtime.device import forbid_tf32, return_freed_memory
    from spiralrope_cli.core.runtime.distributed import open_context

    run = plan.run
    with open_context(run.machine, None) as ctx:
        forbid_tf32()
        network = functools.partial(_load_once, Path(run.weights), str(ctx.device))
        sides = [side for side in (plan.samples, plan.reference) if side and ctx.is_first]
        with digests_beside(sides) as digests:
            samples = measure(run, ctx, plan.samples, network)
            return_freed_memory()  # what the other side adds would come on top of it
            sha256 = plan.weights_sha256
            protocol = run.protocol(sha256) if sha256 else plan.samples.protocol
            if run.save_stats and ctx.is_first:
                # What a file of images had stored is of no one knows which images and weights.
                known = (samples.num or 0, protocol) if not plan.samples.stored else (0, "")
                npz.save_statistics(Path(run.save_stats), samples.stats, *known)
            reference, cache = None, None
            if plan.reference:
                if ctx.is_first and plan.reference.needed:
                    how = f"{protocol}, skip_bad {run.machine.skip_bad}"
                    cache = npz.ReferenceCache(digests[1].result(), how)
                reference = measure(run, ctx, plan.reference, network, cache)
            if ctx.is_first:
                return_freed_memory()
                # Unreadable images may have left too few for some figures.
                read = replace(plan.samples, num=samples.num)
                against = plan.reference
                if against and reference:
                    against = replace(against, num=reference.num)
                figures, left_out = possible(run, read, against)
                plan = replace(plan, figures=figures, left_out=left_out)
                values = compare(run, figures, samples, reference)
                facts = describe(plan, values, samples, reference, digests)
                report(run, facts)
                if run.facts_file:
                    write_json(Path(run.facts_file), facts)


@functools.lru_cache(maxsize=1)
def _load_once(weights: Path, device: str) -> InceptionFeatures:
    """The network, the same for both sides."""
    from spiralrope_cli.core.hub.published import load_safely
    from spiralrope_cli.core.metrics.inception import build_extractor

    return build_extractor(load_safely(weights), weights).to(device)


def describe(
    plan: Plan,
    figures: dict[str, float | None],
    samples: Measured,
    reference: Measured | None,
    digests: list[Future[str]],
) -> dict[str, Any]:
    """Everything that the JSON holds: the figures, and what they rest on."""
    from spiralrope_cli.core.metrics.inception_score import SPLIT_SIZE

    run, sha256 = plan.run, plan.weights_sha256
    keys = ("fid", "fid_std", "sfid", "is", "is_std", "kid", "kid_std", "precision", "recall")
    facts: dict[str, Any] = {key: figures.get(key) for key in keys}
    facts |= {"samples": None, "reference": None}
    for side, measured, digest in zip(
        (plan.samples, plan.reference), (samples, reference), digests, strict=False
    ):
        if side and measured:
            facts[side.role.lower()] = {
                "path": str(side.path),
                "holds": side.words,
                "count": measured.num,
                "unreadable": measured.num_unreadable,
                "stored_statistics": list(side.stored),
                "from_cache": list(measured.from_cache),
                "sha256": digest.result(),
            }
    facts["protocol"] = {
        "extractor": EXTRACTOR,
        "weights": run.weights or None,
        "weights_sha256": sha256 or None,
        "weights_published": sha256.startswith(find("inception").sha256) if sha256 else None,
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
    facts["left_out"] = plan.left_out
    return facts | {"warnings": _warnings(plan, facts)}


def _warnings(plan: Plan, facts: dict[str, Any]) -> list[str]:
    biased = {"fid", "sfid"}.intersection(plan.figures)
    lines = []
    for side in (plan.samples, plan.reference):
        if side is None or not biased:
            continue
        # Statistics that a file of images holds are not of these images alone.
        others = side.images is not None and biased <= set(side.stored)
        some = None if others else facts[side.role.lower()]["count"]
        if some is None:
            if side is plan.samples:
                lines.append("SAMPLES does not say of how many images its statistics are")
            continue
        if side is plan.samples and some < USUAL_COUNT:
            lines.append(
                f"{some:,} samples are fewer than the {USUAL_COUNT:,} of papers: FID and sFID come "
                "out too large"
            )
        if some <= npz.POOL_SIZE:
            lines.append(
                f"{some:,} images of {side.role} are at most the {npz.POOL_SIZE} features: their "
                "covariance is singular"
            )
    count, protocol = facts["samples"]["count"], facts["protocol"]
    split_size = protocol["is_split_size"]
    if protocol["weights_published"] is False:
        lines.append("the weights are not the published ones: nothing compares with papers")
    if protocol["precision"] != "fp32":
        lines.append(f"features in {protocol['precision']}: papers compute them in fp32")
    if "is" in plan.figures and count is not None and count < split_size:
        lines.append(f"the Inception Score is of one split of {count:,} images, not {split_size:,}")
    return lines


def report(run: FidRun, facts: dict[str, Any]) -> None:
    """JSON on stdout and nothing else there, or a table."""
    if run.as_json:
        print(json.dumps(facts, indent=2))  # noqa: T201 - rich would wrap it
        return
    for role in ("samples", "reference"):
        if side := facts[role]:
            say_result(f"{role.upper():<9}  {side['path']}")
            bad = side["unreadable"]
            bad = f", {side['count']:,} measured and {bad:,} unreadable" if bad else ""
            say_result(f"           {side['holds']}{bad}, sha256 {side['sha256'][:16]}")
            if side["from_cache"]:
                say_result("           its statistics were computed by an earlier run")
    protocol = facts["protocol"]
    if weights := protocol["weights_sha256"]:
        say_result(f"FEATURES   {EXTRACTOR}, {protocol['precision']}, sha256 {weights[:16]}")
    table = Table("figure", Column("value", justify="right"), Column("±", justify="right"), "")
    for name in run.select:
        label, better, digits = LABELS[name]
        value, spread = facts[name], facts.get(f"{name}_std")
        shown = "-" if value is None else f"{value:.{digits}f}"
        spread_shown = "" if spread is None else f"{spread:.{digits}f}"
        table.add_row(label, shown, spread_shown, facts["left_out"].get(name, better))
    console().print(table)
    for line in facts["warnings"]:
        say(f"warning: {line}")
