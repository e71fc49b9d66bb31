"""`fetch`: downloads or lists published weights. Results go to stdout, the rest to stderr."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spiralrope_cli.core.config.hub import FetchRun
from spiralrope_cli.core.config.option import build
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.hub import download
from spiralrope_cli.core.hub.catalog import ALIASES, ROWS, Row, find_row
from spiralrope_cli.core.hub.download import local_files, local_path
from spiralrope_cli.core.runtime.progress import human_size, say, say_result

LINE = "{:<15} {:>5}  {:>7}  {:<4}  {}"


def fetch(given: dict[str, Any]) -> None:
    """Downloads the given names and prints their paths, or lists all names."""
    config: FetchRun = build(FetchRun, given)
    if config.show_list:
        show_list(as_json=config.as_json)
        return
    out = Path(os.path.expanduser(config.out)) if config.out else None
    found = []
    for row in settle(config.names, config.revision, one_folder=out is not None):
        path = download.fetch_published(row, offline=config.offline, out=out)
        found.append({"name": row.name, "path": str(path)})
        if not config.as_json:
            say_result(str(path))
    if config.as_json:
        say_result(json.dumps(found, indent=2))


def settle(names: Sequence[str], revision: str | None, *, one_folder: bool) -> list[Row]:
    """The rows of names, at `--revision`; with one --out folder, file names must differ."""
    rows = list({row.name: row for row in map(find_row, names)}.values())
    for row in rows if revision else ():
        if not row.repo:
            say(f"note: --revision has no effect: {row.name} is not on the Hub")
        if row.revision:
            raise ConfigError(f"--revision {revision}: {row.name} names another", "give only one")
    rows = [replace(row, revision=row.revision or revision) for row in rows]
    owner: dict[str, str] = {}
    for row in rows if one_folder else ():
        for name in (Path(file).name for file in row.files):
            if owner.setdefault(name, row.name) != row.name:
                raise ConfigError(
                    f"{owner[name]} and {row.name} both have a file {name}",
                    "use a different --out for each",
                )
    return rows


def show_list(*, as_json: bool) -> None:
    """Prints all rows, and which are downloaded."""
    listed = [listing(row) for row in ROWS]
    if as_json:
        say_result(json.dumps(listed, indent=2))
        return
    say_result(LINE.format("name", "steps", "size", "here", "what and where from"))
    for row, entry in zip(ROWS, listed, strict=True):
        size = human_size(entry["size"]) if entry["size"] else "-"
        here = "yes" if entry["here"] else "-"
        say_result(LINE.format(row.name, short(row.steps), size, here, row.what))
        where = f"{row.repo}: " if row.kind == "vae" else ""
        say_result(f"  {where}{', '.join(row.files)}")
        if row.rope:
            options = (
                f"{name} {('off', 'on')[value] if isinstance(value, bool) else value}"
                for name, value in row.rope.items()
            )
            say_result(f"  RoPE: {', '.join(options)}")
        if entry["aliases"]:
            say_result(f"  also called {', '.join(entry['aliases'])}")


def listing(row: Row) -> dict[str, Any]:
    """A row of `--list --json`."""
    files, here = local_files(row), local_path(row)
    return {
        "name": row.name,
        "aliases": [alias for alias, name in ALIASES.items() if name == row.name],
        "kind": row.kind,
        "arch": row.arch or None,
        "what": row.what,
        "repo": row.repo or None,
        "files": list(row.files),
        "url": row.source_url or None,
        "steps": row.steps,
        "rope": row.rope,
        "size": sum(path.stat().st_size for path in files) if files else None,
        "here": str(here) if here else None,
    }


def short(steps: int | None) -> str:
    """A number of steps in thousands or millions."""
    if steps is None:
        return "-"
    return f"{steps // 1_000_000}M" if steps % 1_000_000 == 0 else f"{steps // 1000}K"
