"""The figures of `fid` with what they rest on, as a table or as JSON."""

from __future__ import annotations

import json
from typing import Any

from rich.table import Table

from spiralrope_cli.core.config.fid import EXTRACTOR, FidRun
from spiralrope_cli.core.data.inputs import POOL_SIZE
from spiralrope_cli.core.hub.catalog import find
from spiralrope_cli.core.jobs.score_measure import Measured
from spiralrope_cli.core.jobs.score_plan import NEIGHBOURHOOD, Plan
from spiralrope_cli.core.metrics.inception_score import SPLIT_SIZE
from spiralrope_cli.core.runtime.console import console, say, say_result
from spiralrope_cli.version import __version__

USUAL_COUNT = 50_000
"""Samples behind the figures of papers."""
LABELS = {
    "fid": ("FID", "lower is better", 4),
    "sfid": ("sFID", "lower is better", 4),
    "is": ("Inception Score", "higher is better", 4),
    "kid": ("KID", "lower is better", 6),
    "precision": ("Precision", "higher is better", 4),
    "recall": ("Recall", "higher is better", 4),
}
Facts = dict[str, Any]


def describe(
    config: FidRun,
    plan: Plan,
    figures: dict[str, float | None],
    measured: list[Measured | None],
    digests: list[str],
    weights: str,
) -> Facts:
    """Everything that the JSON holds.

    Args:
        config: of the run.
        plan: of the run.
        figures: name -> value, as far as they were computed.
        measured: samples, and the reference if there is one.
        digests: SHA-256 of both.
        weights: SHA-256 of the extractor's weights, empty where no image was looked at.
    """
    keys = ("fid", "fid_std", "sfid", "is", "is_std", "kid", "kid_std", "precision", "recall")
    facts: Facts = {key: figures.get(key) for key in keys}
    for key, side, what, digest in zip(
        ("samples", "reference"),
        (plan.samples, plan.reference),
        measured,
        [*digests, ""],
        strict=False,
    ):
        facts[key] = side and {
            "path": str(side.path),
            "holds": side.words,
            "count": what.num if what else side.num,
            "unreadable": what.num_unreadable if what else 0,
            "stored_statistics": list(side.stored),
            "from_cache": list(what.from_cache) if what else [],
            "sha256": digest,
        }
    facts["protocol"] = {
        "extractor": EXTRACTOR,
        "weights": config.weights or None,
        "weights_sha256": weights or None,
        "weights_published": weights.startswith(find("inception").sha256) if weights else None,
        "resize": "bilinear of TensorFlow 1, to 299x299",
        "precision": config.machine.precision,
        "is_split_size": SPLIT_SIZE,
        "kid_subsets": config.kid_subsets,
        "kid_subset_size": config.kid_subset_size,
        "neighbours": NEIGHBOURHOOD - 1,
        "bootstrap": config.bootstrap,
        "seed": config.seed,
        "spiralrope": __version__,
    }
    facts["left_out"] = plan.left_out
    facts["warnings"] = _warnings(config, plan, facts)
    return facts


def _warnings(config: FidRun, plan: Plan, facts: Facts) -> list[str]:
    biased = [name for name in ("fid", "sfid") if name in plan.figures]
    lines = []
    for side in (plan.samples, plan.reference) if biased else ():
        if side is None:
            continue
        # Statistics that a file of images holds are not of these images alone.
        others = side.images is not None and set(biased) <= set(side.stored)
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
        if some <= POOL_SIZE:
            lines.append(
                f"{some:,} images of {side.role} are at most the {POOL_SIZE} features: their "
                "covariance is singular"
            )
    count = facts["samples"]["count"]
    if facts["protocol"]["weights_published"] is False:
        lines.append("the weights are not the published ones: nothing compares with papers")
    if config.machine.precision != "fp32":
        lines.append(f"features in {config.machine.precision}: papers compute them in fp32")
    if "is" in plan.figures and count is not None and count < SPLIT_SIZE:
        lines.append(f"the Inception Score is of one split of {count:,} images, not {SPLIT_SIZE:,}")
    return lines


def show(config: FidRun, facts: Facts) -> None:
    """JSON on stdout and nothing else there, or a table."""
    if config.as_json:
        print(json.dumps(facts, indent=2))  # noqa: T201 - rich would wrap it
        return
    for role in ("samples", "reference"):
        side = facts[role]
        if side:
            say_result(f"{role.upper():<9}  {side['path']}")
            bad = side["unreadable"]
            bad = f", {side['count']:,} measured and {bad:,} unreadable" if bad else ""
            say_result(f"           {side['holds']}{bad}, sha256 {side['sha256'][:16]}")
            if side["from_cache"]:
                say_result("           its statistics were computed by an earlier run")
    protocol = facts["protocol"]
    weights = protocol["weights_sha256"]
    if weights:
        say_result(f"FEATURES   {EXTRACTOR}, {protocol['precision']}, sha256 {weights[:16]}")
    table = Table()
    for column in ("figure", "value", "±", ""):
        table.add_column(column, justify="left" if column in ("figure", "") else "right")
    for name in config.select:
        label, better, digits = LABELS[name]
        value, spread = facts[name], facts.get(f"{name}_std")
        shown = "-" if value is None else f"{value:.{digits}f}"
        spread_shown = "" if spread is None else f"{spread:.{digits}f}"
        note = facts["left_out"].get(name, better)
        table.add_row(label, shown, spread_shown, note)
    console().print(table)
    for line in facts["warnings"]:
        say(f"warning: {line}")
