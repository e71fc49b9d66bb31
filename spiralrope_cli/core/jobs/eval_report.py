"""What an evaluation leaves behind: a table, JSON or CSV on stdout, `eval.json` and a plot."""

from __future__ import annotations

import csv
import functools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.table import Table

from spiralrope_cli.core.config.evals import EvalProtocol, EvalRow, EvalRun
from spiralrope_cli.core.hub.files import digest_like
from spiralrope_cli.core.metrics.accuracy import Accuracy
from spiralrope_cli.core.plots.curves import draw_sizes
from spiralrope_cli.core.runtime.console import console, say, say_result
from spiralrope_cli.core.runtime.environment import versions
from spiralrope_cli.core.runtime.job import Job
from spiralrope_cli.core.runtime.run_folder import EVAL_FILE, SIZES_FILE, write_json

SAME = ("sha256", "checkpoint", "weights", "data", "image_size", "crop_ratio", "rope", "precision")
"""A row of `eval.json` gives way to a new one that agrees in these."""

Record = dict[str, Any]
Justify = Literal["left", "right"]


COLUMNS: tuple[tuple[str, Justify, Callable[[EvalRow], str]], ...] = (
    ("source", "left", lambda row: row.source),
    ("arch", "left", lambda row: row.arch),
    ("data", "left", lambda row: Path(row.protocol.data).name),
    ("weights", "left", lambda row: row.label),
    ("step", "right", lambda row: "" if row.step is None else str(row.step)),
    ("size", "right", lambda row: size_words(row.protocol.image_size)),
    ("scaling", "left", lambda row: row.rope.scaling if row.rope.enabled else "no RoPE"),
    ("crop", "right", lambda row: f"{row.protocol.crop_ratio:g}"),
)
SENTENCES = {"step": "step {}", "size": "{} px", "crop": "crop ratio {}"}
"""How a column is told above the table where it says the same in all rows."""


def finish(config: EvalRun, figures: list[Accuracy], decoded: int, job: Job) -> None:
    """Writes and prints everything, from the first process alone."""
    records = [record(row, found, job) for row, found in zip(config.rows, figures, strict=True)]
    for folder in dict.fromkeys(row.folder for row in config.rows):
        mine = [r for r, row in zip(records, config.rows, strict=True) if row.folder == folder]
        write(Path(folder), mine, decoded)
    say(f"decoded {decoded} images for {len(records)} row(s)")
    if config.output == "json":
        print_json({"decoded": decoded, "rows": records})
    elif config.output == "csv":
        print_csv(records)
    else:
        print_table(config.rows, figures, str(records[0]["precision"]))


def record(row: EvalRow, found: Accuracy, job: Job) -> Record:
    """One row with its figures and all that produced them, as plain values."""
    protocol = row.protocol
    return {
        "source": row.source,
        "checkpoint": row.checkpoint,
        "step": row.step,
        "weights": row.weights,
        "file": row.file,
        "sha256": sha256(row.file),
        "arch": row.arch,
        "rope": asdict(row.rope),
        "trained_size": list(row.trained_size),
        "data": protocol.data,
        "image_size": list(protocol.image_size),
        "crop_ratio": protocol.crop_ratio,
        "interpolation": "bicubic",
        "mean": list(protocol.mean),
        "std": list(protocol.std),
        **asdict(found),
        "precision": precision_word(job.dtype),
        "device": job.device.type,
        "processes": job.world_size,
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def precision_word(dtype: torch.dtype) -> str:
    """As `--precision` calls it."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


@functools.cache
def sha256(file: str) -> str:
    """Digest of a whole file, read piece by piece."""
    return digest_like(Path(file), "")[1]


def write(folder: Path, records: list[Record], decoded: int) -> None:
    """Merges rows into a folder's `eval.json`, and draws accuracy over image sizes."""
    path = folder / EVAL_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"decoded": decoded, "rows": merged(read_rows(path), records)})
        say(f"figures: {path}")
        if len({tuple(each["image_size"]) for each in records}) > 1:
            draw_sizes(records, folder / SIZES_FILE)
            say(f"plot: {folder / SIZES_FILE}")
    except OSError as error:
        say(f"note: {path} was not written: {error.strerror or error}; --out names a folder")


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


def already(config: EvalRun, precision: str) -> list[Accuracy]:
    """Figures of all rows as an earlier evaluation left them, none where one is missing."""
    names = [field.name for field in fields(Accuracy)]
    found = []
    for row in config.rows:
        wanted = {
            **{"step": row.step, "checkpoint": row.checkpoint},
            **{"weights": row.weights, "rope": asdict(row.rope), "precision": precision},
            **{"data": row.protocol.data, "crop_ratio": row.protocol.crop_ratio},
            "image_size": list(row.protocol.image_size),
        }
        for each in read_rows(Path(row.folder) / EVAL_FILE):
            same = {name: each.get(name) for name in wanted} == wanted
            if same and each.get("sha256") == sha256(row.file):
                found.append(Accuracy(**{name: each[name] for name in names}))
                break
    return found if len(found) == len(config.rows) else []


def merged(before: list[Record], now: list[Record]) -> list[Record]:
    """Old rows without those that are measured anew, then the new ones."""
    replaced = [{name: each[name] for name in SAME} for each in now]
    return [
        *(old for old in before if {name: old.get(name) for name in SAME} not in replaced),
        *now,
    ]


def print_json(content: Record) -> None:
    """Machine-readable, and nothing else."""
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def print_csv(records: list[Record]) -> None:
    """One line per row; groups of values take a column each, lists are written `8x8`."""
    flat = []
    for each in records:
        line: Record = {}
        for key, value in each.items():
            if isinstance(value, dict):
                line.update({f"{key}_{name}": item for name, item in value.items()})
            else:
                joint = "/" if key in ("mean", "std") else "x"
                is_list = isinstance(value, list)
                line[key] = joint.join(map(str, value)) if is_list else value
        flat.append(line)
    writer = csv.DictWriter(sys.stdout, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)


def print_table(rows: tuple[EvalRow, ...], figures: list[Accuracy], precision: str) -> None:
    """Figures of all rows; what is the same in all of them stands above."""
    title, columns = [], []
    for name, align, words in COLUMNS:
        told = [words(row) for row in rows]
        if name == "weights" or len(set(told)) > 1:
            columns.append((name, align, told))
        elif told[0] and name != "scaling":
            title.append(SENTENCES.get(name, "{}").format(told[0]))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for name, align, _ in columns:
        table.add_column(name, justify=align, overflow="fold")
    for name in ("acc@1 %", "acc@5 %", "loss", "images"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, found in enumerate(figures):
        measured = (f"{found.acc1:.2f}", f"{found.acc5:.2f}", f"{found.loss:.4f}")
        table.add_row(*(told[number] for _, _, told in columns), *measured, str(found.count))
    say_result(", ".join([*title, precision]))
    console().print(table)


def size_words(size: tuple[int, int]) -> str:
    """`224`, or `224x448` (height x width)."""
    height, width = size
    return str(height) if height == width else f"{height}x{width}"


def protocol_words(protocol: EvalProtocol) -> str:
    """The protocol in a few words."""
    size = size_words(protocol.image_size)
    return f"{Path(protocol.data).name} at {size} px, crop ratio {protocol.crop_ratio:g}"
