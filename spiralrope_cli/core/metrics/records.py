"""The rows of an `eval.json`: which of them are the same, how they are read and shown."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from spiralrope_cli.core.runtime.console import console, say, say_result
from spiralrope_cli.core.runtime.run_folder import differences, write_json

SAME = ("sha256", "checkpoint", "weights", "data", "image_size", "crop_ratio", "rope", "precision")
"""Two rows that agree in these measure the same thing."""

SENTENCES = {"step": "step {}", "size": "{} px", "crop": "crop ratio {}"}
"""How a column is told above the table where it says the same in all rows."""

Record = dict[str, Any]


def is_same(before: Record, now: Record) -> bool:
    """Whether two rows measure the same weights in the same way."""
    return not differences(before, {name: now[name] for name in SAME}, free=())


def read_rows(path: Path) -> list[Record]:
    """Rows of an `eval.json`, none where there is no such file; a damaged one is set aside."""
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())["rows"]
        if all(isinstance(each, dict) for each in rows):
            return list(rows)
    except (ValueError, KeyError, TypeError):
        pass
    aside = path.with_suffix(".damaged")
    os.replace(path, aside)
    say(f"note: {path} was no list of rows; it is now {aside.name}")
    return []


def add_rows(path: Path, rows: Sequence[Record], decoded: int) -> None:
    """Writes an `eval.json` anew: its old rows, without those that are measured anew, then these.

    Args:
        path: of the file, which need not be there.
        rows: with figures.
        decoded: images that were read for them.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [old for old in read_rows(path) if not any(is_same(old, new) for new in rows)]
    write_json(path, {"decoded": decoded, "rows": [*kept, *rows]})


def print_table(rows: Sequence[Record]) -> None:
    """Figures of all rows; what is the same in all of them stands above."""
    told = {
        "source": [row["source"] for row in rows],
        "arch": [row["arch"] for row in rows],
        "data": [Path(row["data"]).name for row in rows],
        "weights": [", ".join(filter(None, (row["checkpoint"], row["weights"]))) for row in rows],
        "step": ["" if row["step"] is None else str(row["step"]) for row in rows],
        "size": [size_words(row["image_size"]) for row in rows],
        "scaling": [r["scaling"] if r["enabled"] else "no RoPE" for r in (x["rope"] for x in rows)],
        "crop": [f"{row['crop_ratio']:g}" for row in rows],
    }
    columns = {n: cells for n, cells in told.items() if n == "weights" or len(set(cells)) > 1}
    same = {n: cells[0] for n, cells in told.items() if n not in columns and n != "scaling"}
    title = [SENTENCES.get(name, "{}").format(cell) for name, cell in same.items() if cell]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in columns:
        table.add_column(name, justify="right" if name in SENTENCES else "left", overflow="fold")
    for name in ("acc@1 %", "acc@5 %", "loss", "images"):
        table.add_column(name, justify="right", no_wrap=True)
    for row, *cells in zip(rows, *columns.values(), strict=True):
        figures = (f"{row['acc1']:.2f}", f"{row['acc5']:.2f}", f"{row['loss']:.4f}")
        table.add_row(*cells, *figures, str(row["count"]))
    say_result(", ".join([*title, rows[0]["precision"]]))
    console().print(table)


def print_csv(rows: Sequence[Record]) -> None:
    """One line per row; groups of values take a column each, lists are written `8x8`."""
    lines = []
    for row in rows:
        line: Record = {}
        for key, value in row.items():
            if isinstance(value, dict):
                line.update({f"{key}_{name}": item for name, item in value.items()})
            elif isinstance(value, list):
                line[key] = ("/" if key in ("mean", "std") else "x").join(map(str, value))
            else:
                line[key] = value
        lines.append(line)
    writer = csv.DictWriter(sys.stdout, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)


def size_words(size: Sequence[int]) -> str:
    """`224`, or `224x448` (height x width)."""
    height, width = size
    return str(height) if height == width else f"{height}x{width}"
