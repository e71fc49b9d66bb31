"""Config of `fid`, and of the FID while a DiT trains. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from spiralrope_cli.core.config.option import FILE, Opt, check_fields, option
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.storage import cache_folder, check_writable

Reading = Literal["as-pil", "as-trained"]
"""How image files are read: by PIL's `convert("RGB")`, as other FID tools do, or as in training."""

NUM_SAMPLING_STEPS = 250
"""Of the published metrics."""

FID_METRICS = {
    "fid": ("FID", "lower is better", 4),
    "sfid": ("sFID", "lower is better", 4),
    "is": ("Inception Score", "higher is better", 4),
    "kid": ("KID", "lower is better", 6),
    "precision": ("Precision", "higher is better", 4),
    "recall": ("Recall", "higher is better", 4),
}
"""Metric -> name, which direction is better, number of decimals."""
EXTRACTOR = "inception-v3-compat 2015-12-05"


REFERENCE = Opt(
    "Real images or their statistics, for the FID: a folder or an .npz.", metavar="REFERENCE"
)
INCEPTION = Opt("Inception weights; by default those of fetch inception.", metavar="FILE")


def words(text: str) -> tuple[str, ...]:
    """`fid, IS` -> ("fid", "is"); `all` -> all metrics."""
    names = tuple(dict.fromkeys(word.strip().lower() for word in text.split(",")))
    return tuple(FID_METRICS) if names == ("all",) else names


@dataclass(frozen=True, kw_only=True)
class FeatureMachine(MachineConfig):
    """As `MachineConfig`, but fp32 by default, so that metrics are comparable."""

    precision: Literal["fp32", "tf32", "bf16"] = option(
        "Precision of the Inception features; papers use fp32.", "Machine", default="fp32"
    )


@dataclass(frozen=True, kw_only=True)
class FidRun:
    """The config of `fid`."""

    panel = "Metrics"
    samples: str = option(
        "Generated images: a folder or an .npz.", metavar="SAMPLES", argument=True
    )
    reference: str = option(
        "Real images or their statistics: a folder or an .npz.",
        metavar="REFERENCE",
        argument=True,
        default="",
    )
    num_samples: int = option(
        "Use the first N images of SAMPLES; fewer are an error. 0: all.",
        "Images",
        ge=0,
        was="--num",
        default=0,
    )
    weights: str = option(INCEPTION, "Images", default="")
    images: Reading = option(
        "Read transparency and 16-bit grey by PIL's convert('RGB'), as other FID tools do, "
        "or as in training.",
        "Images",
        default="as-pil",
    )
    select: tuple[str, ...] = option(
        f"Metrics: some of {','.join(FID_METRICS)}.",
        metavar="NAMES",
        read=words,
        expects="names",
        default=tuple(FID_METRICS),
    )
    kid_subsets: int = option("Number of KID subsets.", ge=1, default=100)
    kid_subset_size: int = option("Images per KID subset.", ge=2, default=1000)
    bootstrap: int = option(
        "Bootstrap samples for the standard deviation of the FID; 0: none.", ge=0, default=0
    )
    seed: int = option("Seed of KID subsets and bootstrap.", ge=0, lt=2**32, default=2020)
    as_json: bool = option("Print JSON on stdout.", "Output", flag="--json", default=False)
    save_stats: str = option(
        "Save the statistics of SAMPLES (.npz), to use as a REFERENCE later.",
        "Output",
        **FILE,
        default="",
    )
    dry_run: bool = option("Print the plan and stop.", "Output", default=False)
    result_file: str = ""  # the JSON is also written to this file
    batch_size: int = option("Images per batch and process.", "Machine", ge=1, default=32)
    machine: FeatureMachine = field(default_factory=FeatureMachine)

    def __post_init__(self) -> None:
        check_fields(self)
        unknown = [name for name in self.select if name not in FID_METRICS]
        if unknown or not self.select:
            raise ConfigError(
                f"--select {','.join(self.select)}: unknown metric "
                f"{unknown[0] if unknown else ''!r}",
                f"known: {', '.join(FID_METRICS)}",
            )
        if self.bootstrap == 1:
            raise ConfigError("--bootstrap is 1; a standard deviation needs 2 or more")
        if self.bootstrap and "fid" not in self.select:
            raise ConfigError("--bootstrap needs fid in --select")
        if not self.reference and not self.save_stats and self.select != ("is",):
            raise ConfigError(
                "REFERENCE is missing: give SAMPLES first, REFERENCE second",
                "only --select is, or --save-stats, work without it",
            )
        if not self.save_stats:
            return
        target = Path(self.save_stats)
        if target.suffix != ".npz":
            raise ConfigError(f"--save-stats {target} must end in .npz")
        if target.exists():
            raise ConfigError(f"--save-stats {target} exists", "remove it, or choose another name")
        check_writable(self.save_stats, "--save-stats")

    def protocol(self, weights_digest: str) -> str:
        """What statistics depend on besides the images; equal ones are comparable."""
        reading = "" if self.images == "as-pil" else f", images {self.images}"
        return f"{EXTRACTOR}, weights sha256 {weights_digest}, {self.machine.precision}{reading}"

    def inert_options(self) -> list[tuple[str, str]]:
        """Fields that have no effect, with the reason."""
        if "kid" in self.select:
            return []
        inert = [(name, "--select lacks kid") for name in ("kid_subsets", "kid_subset_size")]
        random = [("seed", "nothing is random without kid or --bootstrap")]
        return inert if self.bootstrap else inert + random

    @property
    def out(self) -> str:
        """Folder that it writes to: the cached statistics of references."""
        return str(statistics_folder())


def statistics_folder() -> Path:
    """Folder of cached statistics."""
    return cache_folder() / "statistics"


@dataclass(frozen=True, kw_only=True)
class TrainingFid:
    """FID of the EMA weights while a DiT trains. It changes no weights."""

    panel = "Run"
    free = True
    fid_every: int = option(
        "Steps between FIDs of the EMA weights, and one after the last step; 0: none.",
        ge=0,
        default=0,
    )
    fid_num: int = option("Images for each FID, the first ones of dit-sample.", ge=2, default=5000)
    fid_reference: str = option(REFERENCE, default="")
    fid_weights: str = option(INCEPTION, default="")
    fid_sampling_steps: int = option(
        "Sampling steps of these images.", ge=2, le=1000, default=NUM_SAMPLING_STEPS
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.fid_every and not self.fid_reference:
            raise ConfigError(
                f"--fid-every {self.fid_every} needs --fid-reference",
                "a folder of real images, or an .npz of images or statistics",
            )

    @property
    def summary(self) -> str:
        """For the plan."""
        return (
            f"every {self.fid_every} steps, {self.fid_num} images of the EMA weights in "
            f"{self.fid_sampling_steps} steps, against {self.fid_reference}"
        )

    def inert_options(self) -> list[tuple[str, str]]:
        """Fields that have no effect, with the reason."""
        names = [name for name in vars(self) if name != "fid_every"]
        return [] if self.fid_every else [(name, "--fid-every is 0") for name in names]
