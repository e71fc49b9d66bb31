"""What the shell offers for the word that is being typed.

Each function imports what it offers, as every help page has these functions and a key press waits
for one. Where a function offers nothing, the shell completes paths by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer

Offer = list[str] | list[tuple[str, str]]
"""Words, or words with what they mean, for shells that show it."""

TAKES = {
    **dict.fromkeys(("finetune", "eval", "attention"), "deit"),
    **dict.fromkeys(("dit-sample", "dit-train"), "dit"),
}
"""Kind of network whose weights a command takes; any other takes both."""


def choices(*allowed: str) -> Callable[[], Offer]:
    """Completion of an option that takes one of a few words."""
    return lambda: list(allowed)


def paths() -> Offer:
    """Nothing of ours. Typer would repeat the word itself, which keeps the shell from looking."""
    return []


def deit_archs() -> Offer:
    """Rows of the table of sizes."""
    from spiralrope_cli.core.config.models import DEIT_SIZES

    return list(DEIT_SIZES)


def dit_archs(incomplete: str) -> Offer:
    """Rows of the table of sizes, in our spelling or in the paper's, whichever was begun."""
    from spiralrope_cli.core.config.models import DIT_SIZES

    if incomplete == incomplete.lower() and "/" not in incomplete:
        return list(DIT_SIZES)
    sizes = (name.removeprefix("dit-") for name in DIT_SIZES)
    paper = [f"DiT-{size[:-1].upper()}/{size[-1]}" for size in sizes]
    # Shells drop what does not begin as it was typed, and we take dit-b/4 too.
    return [
        incomplete + name[len(incomplete) :]
        for name in paper
        if name.lower().startswith(incomplete.lower())
    ]


def archs(incomplete: str) -> Offer:
    """Rows of both tables."""
    return [str(name) for name in (*deit_archs(), *dit_archs(incomplete))]


def data_sets() -> Offer:
    """The built-in ones."""
    from spiralrope_cli.core.config.datasets import BUILT_IN

    return list(BUILT_IN)


def vaes() -> Offer:
    """Names of VAEs; a folder is one too."""
    from spiralrope_cli.core.config.latents import VAE_NAMES

    return list(VAE_NAMES)


def vaes_or_none() -> Offer:
    """The same, and the word for pixels."""
    from spiralrope_cli.core.config.dit_runs import NO_VAE

    return [*vaes(), NO_VAE]


def published() -> Offer:
    """All that `fetch` knows."""
    return _published(lambda kind: True)


def sources(ctx: typer.Context, incomplete: str) -> Offer:
    """Runs below the runs folder, files of weights, and published names that a command takes."""
    from spiralrope_cli.core.hub.source import CLASSIFIERS, FILE_SUFFIXES

    takes = TAKES.get(ctx.info_name or "")
    kinds = (takes,) if takes else ("deit", "dit")
    commands = {"deit": CLASSIFIERS, "dit": ("dit-train",)}
    offered = [(run, "run") for kind in kinds for run in runs(*commands[kind])]
    if incomplete:
        files = (path for path in Path(incomplete).parent.glob("*") if path.suffix in FILE_SUFFIXES)
        offered += [(str(path), "file") for path in sorted(files)]
    return offered + _published(kinds.__contains__)


def runs(*commands: str) -> list[str]:
    """Folders of runs of these commands, stages of pipelines among them, the newest first."""
    from spiralrope_cli.core.config.training import RUNS_FOLDER
    from spiralrope_cli.core.runtime.run_folder import run_configs

    found = []
    for config in run_configs(Path(RUNS_FOLDER)):
        try:
            with config.open() as lines:  # reading all of it as YAML takes longer than a key press
                command = next(lines, "").partition("command: ")[2].strip()
            if command in commands:
                found.append((config.stat().st_mtime, str(config.parent)))
        except (OSError, UnicodeDecodeError):
            continue
    return [folder for _, folder in sorted(found, reverse=True)]


def training_runs() -> Offer:
    """Folders of all runs that train."""
    from spiralrope_cli.core.config.nested import RUN_KINDS

    return runs(*RUN_KINDS)


def _published(wanted: Callable[[str], bool]) -> list[tuple[str, str]]:
    from spiralrope_cli.core.hub.catalog import ALIASES, ROWS, find_row

    rows = {row.name: row for row in ROWS} | {alias: find_row(alias) for alias in ALIASES}
    return [(name, row.what) for name, row in sorted(rows.items()) if wanted(row.kind)]
