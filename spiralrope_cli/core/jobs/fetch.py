"""Published weights come here, or are listed. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.hub.catalog import ALIASES, ROWS, Row, find
from spiralrope_cli.core.hub.download import fetch, local_files, local_path
from spiralrope_cli.core.hub.files import human_size
from spiralrope_cli.core.runtime.console import say_result

LINE = "{:<15} {:>5}  {:>7}  {:<4}  {}"


def fetch_all(
    names: list[str], *, revision: str | None, offline: bool, out: Path | None, as_json: bool
) -> None:
    """Fetches rows by name and prints where each one is."""
    rows = list(dict.fromkeys(find(name).name for name in names))
    if not rows:
        raise ConfigError("nothing to fetch", "name what to fetch; --list shows what there is")
    chosen = [find(name) for name in rows]
    if out:
        out = out.expanduser()
        _check_names(chosen)
    found = []
    for row in chosen:
        path = fetch(row, revision=revision, offline=offline, out=out)
        found.append({"name": row.name, "path": str(path)})
        if not as_json:
            _print(str(path))
    if as_json:
        _print(json.dumps(found, indent=2))


def _check_names(rows: list[Row]) -> None:
    """Refuses rows whose files have the same name, for one flat folder."""
    owner: dict[str, str] = {}
    for row in rows:
        for file in row.files:
            name = Path(file).name
            if owner.setdefault(name, row.name) != row.name:
                raise ConfigError(
                    f"{owner[name]} and {row.name} both have a file {name}",
                    "fetch them into different --out folders",
                )


def show_list(*, as_json: bool) -> None:
    """Prints all rows and what of them is here."""
    if as_json:
        _print(json.dumps([_facts(row) for row in ROWS], indent=2))
        return
    _print(LINE.format("name", "steps", "size", "here", "what and where from"))
    for row in ROWS:
        facts = _facts(row)
        size = human_size(facts["size"]) if facts["size"] else "-"
        here = "yes" if facts["here"] else "-"
        _print(LINE.format(row.name, _short(row.steps), size, here, row.what))
        where = f"{row.repo}: " if row.repo and row.kind == "vae" else ""
        _print(f"  {where}{', '.join(row.files)}")
        if row.rope:
            _print(f"  RoPE: {', '.join(map(_option, row.rope.items()))}")
        if facts["aliases"]:
            _print(f"  also called {', '.join(facts['aliases'])}")


def _facts(row: Row) -> dict[str, Any]:
    files = local_files(row)
    here = local_path(row)
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


def _option(pair: tuple[str, Any]) -> str:
    name, value = pair
    return f"{name} {'on' if value else 'off'}" if isinstance(value, bool) else f"{name} {value}"


def _short(steps: int | None) -> str:
    if steps is None:
        return "-"
    return f"{steps // 1_000_000}M" if steps % 1_000_000 == 0 else f"{steps // 1000}K"


def _print(line: str) -> None:
    say_result(line)
