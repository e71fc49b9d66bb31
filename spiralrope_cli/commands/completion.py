"""Shell completion.

Each function imports what it needs when it is called: every help page imports this file. If a
function returns nothing, the shell completes paths.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer

from spiralrope_cli.core.config.models import DEIT_SIZES, DIT_SIZES

Offer = list[str] | list[tuple[str, str]]
"""Words, or (word, description) for shells that show it."""

TAKES = {
    **dict.fromkeys(("finetune", "eval", "attention"), "deit"),
    **dict.fromkeys(("dit-sample", "dit-train"), "dit"),
}
"""Command -> kind of weights that it takes; other commands take both."""


def choices(*allowed: str) -> Callable[[], Offer]:
    """Completion of an option with a few allowed values."""
    return lambda: list(allowed)


def paths() -> Offer:
    """Nothing: the shell completes paths. Typer's default returns the word, which prevents this."""
    return []


def dit_archs(incomplete: str) -> Offer:
    """DiTs by name: `dit-b4`, or `DiT-B/4` if the word begins like that."""
    if incomplete == incomplete.lower() and "/" not in incomplete:
        return list(DIT_SIZES)
    sizes = (name.removeprefix("dit-") for name in DIT_SIZES)
    paper = [f"DiT-{size[:-1].upper()}/{size[-1]}" for size in sizes]
    # Shells drop words that do not begin with the typed letters; dit-b/4 is valid too.
    return [
        incomplete + name[len(incomplete) :]
        for name in paper
        if name.lower().startswith(incomplete.lower())
    ]


def archs(incomplete: str) -> Offer:
    return [*DEIT_SIZES, *map(str, dit_archs(incomplete))]


def published() -> Offer:
    return _published(lambda kind: True)


def sources(ctx: typer.Context, incomplete: str) -> Offer:
    """Runs in runs/, checkpoint files, published names and `hf:`, as the command takes them."""
    from spiralrope_cli.core.config.hub import FILE_SUFFIXES, HUB
    from spiralrope_cli.core.hub.source import CLASSIFIERS

    takes = TAKES.get(ctx.info_name or "")
    kinds = (takes,) if takes else ("deit", "dit")
    commands = {"deit": CLASSIFIERS, "dit": ("dit-train",)}
    offered = [(run, "run") for kind in kinds for run in runs(*commands[kind])]
    if incomplete:
        files = (path for path in Path(incomplete).parent.glob("*") if path.suffix in FILE_SUFFIXES)
        offered += [(str(path), "file") for path in sorted(files)]
    on_hub = [(HUB, "OWNER/NAME on the Hugging Face Hub, also with /FILE and @REVISION")]
    return offered + _published(kinds.__contains__) + on_hub


def runs(*commands: str) -> list[str]:
    """Run folders of these commands, also in pipelines, newest first."""
    from spiralrope_cli.core.config.training import RUNS_FOLDER
    from spiralrope_cli.core.runtime.run_folder import run_configs

    found = []
    for config in run_configs(Path(RUNS_FOLDER)):
        try:
            with config.open() as lines:  # parsing YAML would be too slow for completion
                command = next(lines, "").partition("command: ")[2].strip()
            if command in commands:
                found.append((config.stat().st_mtime, str(config.parent)))
        except (OSError, UnicodeDecodeError):
            continue
    return [folder for _, folder in sorted(found, reverse=True)]


def training_runs() -> Offer:
    from spiralrope_cli.core.config.dit_runs import RUN_KINDS

    return runs(*RUN_KINDS)


def _published(wanted: Callable[[str], bool]) -> list[tuple[str, str]]:
    from spiralrope_cli.core.hub.catalog import ALIASES, ROWS, find_row

    rows = {row.name: row for row in ROWS} | {alias: find_row(alias) for alias in ALIASES}
    return [(name, row.what) for name, row in sorted(rows.items()) if wanted(row.kind)]
