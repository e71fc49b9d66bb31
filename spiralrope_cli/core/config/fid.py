"""What a comparison of two sets of images is. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from spiralrope_cli.core.config.checks import at_least, one_of
from spiralrope_cli.core.config.folders import cache_folder
from spiralrope_cli.core.config.runs import MachineConfig
from spiralrope_cli.core.errors import ConfigError

FIGURES = ("fid", "sfid", "is", "kid", "precision", "recall")
EXTRACTOR = "inception-v3-compat 2015-12-05"
PRECISIONS = ("fp32", "bf16")
"""The first is that of papers, and the default."""


@dataclass(frozen=True, kw_only=True)
class FidRun:
    """Figures of one set of images, measured against another.

    Attributes:
        samples: a folder of images, an `.npz` of images, or an `.npz` of statistics.
        reference: the same; empty where nothing of it is needed.
        select: what is computed, of `FIGURES`.
        num: how many images of the samples count, the first ones; 0 takes all.
        weights: file with the extractor's weights; empty for those that `fetch inception` brought.
        save_stats: file for the statistics of the samples; empty for none.
        bootstrap: how many times the samples are drawn anew for the error bar of the FID; 0 for
            none.
        kid_subsets: how many subsets the KID averages over.
        kid_subset_size: images of each side in one subset.
        seed: of KID's subsets and of the bootstrap.
        batch_size: images at a time per process; it changes no figure.
        as_json: prints JSON in place of the table.
        facts_file: where that JSON goes too; empty for nowhere.
        machine: where and how.
    """

    samples: str
    reference: str = ""
    select: tuple[str, ...] = FIGURES
    num: int = 0
    weights: str = ""
    save_stats: str = ""
    bootstrap: int = 0
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    seed: int = 2020
    batch_size: int = 32
    as_json: bool = False
    facts_file: str = ""
    machine: MachineConfig = field(default_factory=partial(MachineConfig, precision=PRECISIONS[0]))

    def __post_init__(self) -> None:
        unknown = [name for name in self.select if name not in FIGURES]
        if unknown or not self.select:
            raise ConfigError(
                f"--select {','.join(self.select)}: there is no {unknown[0] if unknown else ''!r}",
                f"there are {', '.join(FIGURES)}",
            )
        one_of("precision", self.machine.precision, PRECISIONS)
        for name in ("num", "bootstrap", "seed"):
            at_least(name, getattr(self, name), 0)
        for name in ("kid_subsets", "batch_size"):
            at_least(name, getattr(self, name), 1)
        at_least("kid_subset_size", self.kid_subset_size, 2)
        if self.seed >= 2**32:
            raise ConfigError(f"--seed is {self.seed}; it must be below 2^32")
        if self.bootstrap == 1:
            raise ConfigError("--bootstrap is 1; an error bar needs 2 or more")
        if self.bootstrap and "fid" not in self.select:
            raise ConfigError("--bootstrap gives the FID an error bar, and --select lacks fid")
        if not self.reference and not self.save_stats and self.select != ("is",):
            raise ConfigError(
                "REFERENCE is missing: SAMPLES comes first, and what it is measured against second",
                "only --select is and --save-stats do without",
            )
        if self.save_stats:
            self._check_target(Path(self.save_stats))

    def _check_target(self, target: Path) -> None:
        if target.suffix != ".npz":
            raise ConfigError(f"--save-stats {target} must end in .npz")
        if target.exists():
            raise ConfigError(f"--save-stats {target} exists", "remove it, or choose another name")
        if not os.access(target.absolute().parent, os.W_OK):
            raise ConfigError(
                f"--save-stats {target}: {target.absolute().parent} is no folder to write to"
            )

    def protocol(self, weights_digest: str) -> str:
        """What makes features comparable, in one line: network, weights, precision."""
        return f"{EXTRACTOR}, weights sha256 {weights_digest}, {self.machine.precision}"

    @property
    def out(self) -> str:
        """Where it leaves something behind: the statistics of references."""
        return str(statistics_folder())


def notes(run: FidRun, given: Collection[str]) -> list[str]:
    """One line for every option that was given and changes nothing.

    Args:
        run: complete.
        given: fields that an option set.
    """
    kid = () if "kid" in run.select else ("kid_subsets", "kid_subset_size")
    reasons = dict.fromkeys(kid, "--select lacks kid")
    if "kid" not in run.select and not run.bootstrap:
        reasons["seed"] = "nothing is drawn without kid or --bootstrap"
    return [
        f"note: --{name.replace('_', '-')} has no effect: {reason}"
        for name, reason in reasons.items()
        if name in given
    ]


def statistics_folder() -> Path:
    """Where statistics of references are kept."""
    return cache_folder() / "statistics"
