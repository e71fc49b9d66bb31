"""What a comparison of two sets of images is. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from spiralrope_cli.core.config.hub import cache_folder
from spiralrope_cli.core.config.option import (
    IMAGES,
    MACHINE,
    OUTPUT,
    SCORES,
    Opt,
    check_fields,
)
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.errors import ConfigError

LABELS = {
    "fid": ("FID", "lower is better", 4),
    "sfid": ("sFID", "lower is better", 4),
    "is": ("Inception Score", "higher is better", 4),
    "kid": ("KID", "lower is better", 6),
    "precision": ("Precision", "higher is better", 4),
    "recall": ("Recall", "higher is better", 4),
}
"""Figure -> its name in a table, which way is better, and its decimals."""
FIGURES = tuple(LABELS)
EXTRACTOR = "inception-v3-compat 2015-12-05"
PRECISIONS: tuple[Literal["fp32"], Literal["bf16"]] = ("fp32", "bf16")
"""The first is that of papers, and the default."""


def words(text: str) -> tuple[str, ...]:
    """`fid, IS` as ("fid", "is"), each once."""
    return tuple(dict.fromkeys(word.strip().lower() for word in text.split(",")))


@dataclass(frozen=True, kw_only=True)
class FidRun:
    """Figures of one set of images, measured against another."""

    samples: Annotated[
        str, Opt("Generated images: a folder, or an .npz.", metavar="SAMPLES", argument=True)
    ]
    reference: Annotated[
        str,
        Opt(
            "Real images or their statistics: a folder, an .npz.",
            metavar="REFERENCE",
            argument=True,
        ),
    ] = ""
    num: Annotated[
        int, Opt("The first NUM of SAMPLES count; fewer are an error. 0: all.", IMAGES, ge=0)
    ] = 0
    weights: Annotated[str, Opt("Inception's, if not those fetched.", IMAGES, metavar="FILE")] = ""
    select: Annotated[
        tuple[str, ...],
        Opt(f"Of {','.join(FIGURES)}.", SCORES, metavar="NAMES", read=words, expects="names"),
    ] = FIGURES
    kid_subsets: Annotated[int, Opt("KID's subsets.", SCORES, ge=1)] = 100
    kid_subset_size: Annotated[int, Opt("Images in each of them.", SCORES, ge=2)] = 1000
    bootstrap: Annotated[
        int, Opt("Error bar of the FID from N draws of SAMPLES.", SCORES, ge=0)
    ] = 0
    seed: Annotated[int, Opt("Of KID's subsets and of the bootstrap.", SCORES, ge=0)] = 2020
    as_json: Annotated[bool, Opt("The result as JSON on stdout.", OUTPUT, flag="--json")] = False
    save_stats: Annotated[
        str,
        Opt(
            "Keep the statistics of SAMPLES as a REFERENCE for later (.npz).",
            OUTPUT,
            metavar="FILE",
        ),
    ] = ""
    facts_file: str = ""  # where the JSON goes too
    batch_size: Annotated[
        int, Opt("Images at a time per process; it changes no figure.", MACHINE, ge=1)
    ] = 32
    machine: MachineConfig = field(default_factory=partial(MachineConfig, precision=PRECISIONS[0]))

    def __post_init__(self) -> None:
        check_fields(self)
        unknown = [name for name in self.select if name not in FIGURES]
        if unknown or not self.select:
            raise ConfigError(
                f"--select {','.join(self.select)}: there is no {unknown[0] if unknown else ''!r}",
                f"there are {', '.join(FIGURES)}",
            )
        if self.machine.precision not in PRECISIONS:
            raise ConfigError(
                f"--precision is {self.machine.precision}; it must be {' or '.join(PRECISIONS)}"
            )
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
