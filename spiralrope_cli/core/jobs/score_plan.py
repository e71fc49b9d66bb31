"""What `fid` is about to do: what both sides hold, which figures that allows, which weights.

It comes before torch is loaded and before any worker is started.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from spiralrope_cli.core.config.fid import FidRun
from spiralrope_cli.core.data.inputs import STATISTICS, Side, look_at, read_statistics
from spiralrope_cli.core.errors import CheckpointError, ConfigError, DataError, FetchError
from spiralrope_cli.core.hub.catalog import find
from spiralrope_cli.core.hub.files import digest_like
from spiralrope_cli.core.hub.plain import target_of

FEATURES = ("kid", "precision", "recall")
"""Figures that need the features of every image, not only sums over them."""
NEIGHBOURHOOD = 4


@dataclass(frozen=True)
class Wanted:
    """What must be computed from the images of one side."""

    fid: bool
    sfid: bool
    inception_score: bool
    features: bool

    @property
    def parts(self) -> list[str]:
        """The names of those that are kept for another run."""
        names = {"fid": self.fid, "sfid": self.sfid, "features": self.features}
        return [name for name, wanted in names.items() if wanted]


@dataclass(frozen=True)
class Plan:
    """Both sides, and what is computed.

    Attributes:
        samples: the one side.
        reference: the other, if there is one.
        figures: those that can be computed.
        left_out: figure -> why it cannot.
        from_samples: what must be computed from the images of the samples.
        from_reference: the same for the reference.
    """

    samples: Side
    reference: Side | None
    figures: tuple[str, ...]
    left_out: dict[str, str]
    from_samples: Wanted
    from_reference: Wanted

    @property
    def needs_weights(self) -> bool:
        """Whether any image must be looked at."""
        return self.from_samples != NOTHING or self.from_reference != NOTHING


NOTHING = Wanted(False, False, False, False)


def make_plan(config: FidRun) -> Plan:
    """The plan of a run.

    Raises:
        DataError: a side is missing, damaged or too small, or allows nothing of what was asked.
    """
    samples = look_at(Path(config.samples).expanduser(), "SAMPLES", config.num)
    reference = (
        look_at(Path(config.reference).expanduser(), "REFERENCE") if config.reference else None
    )
    figures, left_out = _possible(config, samples, reference)
    if config.save_stats and samples.images is None:
        raise ConfigError(f"--save-stats: {samples.path} already is a file of statistics")
    saved = [name for name in ("fid", "sfid") if config.save_stats and name in config.select]
    if config.save_stats and "fid" not in saved:
        saved.append("fid")
    if config.bootstrap and not ("fid" in figures and samples.images):
        raise DataError("--bootstrap draws images of SAMPLES, and there are none to measure")
    return Plan(
        samples,
        reference,
        figures,
        left_out,
        _wanted(samples, (*figures, *saved), features=bool(config.bootstrap)),
        _wanted(reference, tuple(name for name in figures if name != "is")),
    )


def _wanted(side: Side | None, figures: tuple[str, ...], features: bool = False) -> Wanted:
    if side is None or side.images is None:
        return NOTHING
    return Wanted(
        fid="fid" in figures and "fid" not in side.stored,
        sfid="sfid" in figures and "sfid" not in side.stored,
        inception_score="is" in figures,
        features=features or any(name in FEATURES for name in figures),
    )


def without_unreadable(
    plan: Plan, config: FidRun, num_samples: int | None, num_reference: int | None
) -> Plan:
    """The plan with those figures alone for which enough images could be read.

    Raises:
        DataError: that leaves nothing of what was asked.
    """
    samples = dataclasses.replace(plan.samples, num=num_samples)
    reference = plan.reference and dataclasses.replace(plan.reference, num=num_reference)
    figures, left_out = _possible(config, samples, reference)
    return dataclasses.replace(plan, figures=figures, left_out=left_out)


def _possible(
    config: FidRun, samples: Side, reference: Side | None
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The figures that can be computed, and why the others cannot."""
    reasons = {figure: _obstacle(figure, config, samples, reference) for figure in config.select}
    figures = tuple(figure for figure, reason in reasons.items() if not reason)
    left_out = {figure: reason for figure, reason in reasons.items() if reason}
    if not figures and reference:
        figure, reason = next(iter(left_out.items()))
        raise DataError(f"nothing of --select can be computed; {figure}: {reason}")
    return figures, left_out


def _obstacle(figure: str, config: FidRun, samples: Side, reference: Side | None) -> str:
    """Why a figure cannot be computed, empty where it can."""
    if figure == "is":
        return "" if samples.images is not None else "SAMPLES holds no images"
    if reference is None:
        return "there is no REFERENCE"
    least = {"kid": config.kid_subset_size, "precision": NEIGHBOURHOOD, "recall": NEIGHBOURHOOD}
    for side in (samples, reference):
        if side.images is None and figure not in side.stored:
            names = f"no {' and '.join(STATISTICS[figure][:2])}, and " if figure == "sfid" else ""
            return f"{side.role} holds {names}no images"
        if side.images is not None and (side.num or 0) < least.get(figure, 2):
            option = " (--kid-subset-size)" if figure == "kid" else ""
            return f"{side.role} has {side.num} images, and {least[figure]} are needed{option}"
    return ""


def prepare(config: FidRun) -> FidRun:
    """Checks all that can be checked before any image is looked at, and finds the weights.

    Returns:
        the run with the path of the weights, or without weights where it needs none.

    Raises:
        DataError: one of the sides cannot be used.
        FetchError: there are no weights.
    """
    plan = make_plan(config)
    sides = [plan.samples] + ([plan.reference] if plan.reference else [])
    for side in sides:
        for figure in side.stored:
            if figure in plan.figures:
                read_statistics(side.path, figure)
    if not plan.needs_weights:
        digest = ""
        alone = dataclasses.replace(config.machine, nproc=1) if config.machine.nnodes == 1 else None
        config = dataclasses.replace(config, weights="", machine=alone or config.machine)
    else:
        path, digest = find_weights(config.weights)
        config = dataclasses.replace(config, weights=str(path))
    protocols = {
        side.role: side.protocol
        for side in sides
        if side.protocol and not set(side.stored).isdisjoint(plan.figures)
    }
    if digest:
        protocols["this run"] = config.protocol(digest)
    if len(set(protocols.values())) > 1:
        raise DataError(
            "statistics that were made differently cannot be compared",
            "; ".join(f"{who}: {protocol}" for who, protocol in protocols.items()),
        )
    return config


def find_weights(given: str) -> tuple[Path, str]:
    """The weights' file and its SHA-256.

    Args:
        given: `--weights`, empty for those that `fetch inception` brings.

    Raises:
        ConfigError: no such file.
        FetchError: nothing was fetched yet.
        CheckpointError: what was fetched is damaged.
    """
    row = find("inception")
    path = Path(given).expanduser() if given else target_of(row)
    if given and not path.is_file():
        raise ConfigError(f"--weights {path} is no file", "spiralrope fetch inception brings one")
    if not path.is_file():
        raise FetchError(
            f"the weights of Inception are not here: there is no {path}",
            "spiralrope fetch inception stores them there (95 MB); --weights FILE takes another",
        )
    _, digest = digest_like(path, "")
    if not given and not digest.startswith(row.sha256):
        raise CheckpointError(
            f"{path} is damaged: its sha256 begins with {digest[:8]} and not {row.sha256}",
            "spiralrope fetch inception brings it again",
        )
    return path, digest
