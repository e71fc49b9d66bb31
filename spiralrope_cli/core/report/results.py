"""Results of a run: printed on stdout, and as tables and images for the report page."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.table import Table

from spiralrope_cli.core.config.datasets import slug_of
from spiralrope_cli.core.config.dit_runs import GRID_ROWS, DiTRun
from spiralrope_cli.core.config.fid import FID_METRICS
from spiralrope_cli.core.config.models import format_size
from spiralrope_cli.core.config.option import build
from spiralrope_cli.core.runtime.progress import best_validation, console, read_metrics, say_result
from spiralrope_cli.core.runtime.run_folder import read_config, read_json, read_rows
from spiralrope_cli.core.storage import (
    CONFIG_FILE,
    CURVES_FILE,
    EVAL_FILE,
    FID_FILE,
    PIPELINE_FILE,
    REPORT_FILE,
    SAMPLES_FILE,
    SIZES_FILE,
    SWEEP_FILE,
)

Record = dict[str, Any]

ACCURACY = ("acc@1 %", "acc@5 %", "loss")
SHARED = {
    **{"labels": "labels of {}", "classes": "{} classes"},
    **{"step": "step {}", "image size": "{} px", "crop ratio": "crop ratio {}"},
}
"""Columns that are written above a table instead, if all rows have the same value."""
BEST = "best: the highest raw acc@1 of all validations"


@dataclass(frozen=True, kw_only=True)
class Result:
    """A section of the page: title, table, image; the table is also printed."""

    title: str
    caption: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()  # the first cell is the header of the row
    words: Collection[str] = ()  # text columns, aligned left
    image: Path | bytes | None = None
    alt: str = ""  # alternative text of the image
    warnings: Sequence[str] = ()


def print_results(folder: Path) -> None:
    """Prints the final metrics of a run; scripts can read the last line."""
    lines = read_metrics(folder)
    validations = [line for line in lines if "acc1" in line]
    if validations:
        say_result(str(folder))
        print_table(of_validations(validations))
        say_result(BEST)
    images = (("curves", CURVES_FILE), ("samples", SAMPLES_FILE), ("report", REPORT_FILE))
    for name, file in images:
        if (folder / file).exists():
            say_result(f"{name}: {folder / file}")
    if validations:
        say_result(f"validation acc@1 {validations[-1]['acc1']:.2f} %")
    if scored := [line for line in lines if "fid" in line]:
        say_result(f"FID {scored[-1]['fid']:.4f}, EMA weights, {scored[-1]['fid_num']} images")
    if logged := [line for line in lines if "loss" in line and not validations]:
        say_result(f"training loss {logged[-1]['loss']:.4f}")


def print_evaluation(rows: Sequence[Record], output: str = "table", decoded: int = 0) -> None:
    """Prints the rows of an evaluation; values that all rows share are above the table."""
    if output == "json":
        content = json.dumps({"decoded": decoded, "rows": rows}, indent=2, allow_nan=False)
        sys.stdout.write(f"{content}\n")
        return
    if output == "csv":
        print_csv(rows)
        return
    evaluation = of_evaluation(rows, mark="")
    say_result(evaluation.caption)
    print_table(evaluation)


def print_table(result: Result) -> None:
    """Prints the table of a result; where it is too wide, each row as text."""
    table, out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)), console()
    for name, *cells in zip(result.columns, *result.rows, strict=True):
        is_text = not table.columns or name in result.words
        # Only texts are folded, and not into single letters.
        pieces = [w for cell in (name, *cells) for w in (str(cell).split() if is_text else [cell])]
        longest = max(len(str(each)) for each in pieces)
        justify: Literal["left", "right"] = "left" if is_text else "right"
        least = min(longest, 8) if is_text else longest
        table.add_column(name, justify=justify, overflow="fold", min_width=least)
    for row in result.rows:
        table.add_row(*map(str, row))
    wide = out.options.update(width=10_000)
    if out.measure(table, options=wide).minimum <= out.width:
        out.print(table)
        return
    for row in result.rows:
        named = zip(result.columns, row, strict=True)
        out.print(", ".join(f"{name} {cell}" for name, cell in named))


def print_csv(rows: Sequence[Record]) -> None:
    """One line per row on stdout; nested values get a column each, lists are written `8x8`."""
    lines = []
    for row in rows:
        line: Record = {}
        for key, value in row.items():
            if isinstance(value, dict):
                line |= {f"{key}_{name}": item for name, item in value.items()}
            elif isinstance(value, list):
                line[key] = ("/" if key in ("mean", "std") else "x").join(map(str, value))
            else:
                line[key] = value
        lines.append(line)
    writer = csv.DictWriter(sys.stdout, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)


def columns_of(rows: Sequence[Record]) -> tuple[dict[str, list[str]], str]:
    """Columns that differ between rows of an `eval.json`, and the shared values as text."""
    cells = {
        "source": [row["source"] for row in rows],
        "arch": [row["arch"] for row in rows],
        "data": [slug_of(row["data"]) for row in rows],
        "labels": [row.get("labels") or "" for row in rows],
        "classes": [_of_classes(row) for row in rows],
        "weights": [", ".join(filter(None, (row["checkpoint"], row["weights"]))) for row in rows],
        "step": ["" if row["step"] is None else str(row["step"]) for row in rows],
        "image size": [format_size(row["image_size"]) for row in rows],
        "scaling": [r["scaling"] if r["enabled"] else "no RoPE" for r in (x["rope"] for x in rows)],
        "crop ratio": [f"{row['crop_ratio']:g}" for row in rows],
        "precision": [row["precision"] for row in rows],
    }
    columns = {n: column for n, column in cells.items() if n == "weights" or len(set(column)) > 1}
    shared = {n: column[0] for n, column in cells.items() if n not in (*columns, "scaling")}
    words = [SHARED.get(n, "{}").format(cell) for n, cell in shared.items() if cell]
    words += [BEST] if any(row["checkpoint"] == "best" for row in rows) else []
    return columns, ", ".join(words)


def _of_classes(row: Record) -> str:
    """How many classes predictions were restricted to; empty if they were not."""
    few, of_all = row.get("classes"), row.get("num_classes")
    return "" if few == of_all else f"{few} of {of_all}"


def in_digits(row: Record, acc1: str = "acc1", acc5: str = "acc5", loss: str = "loss") -> list[str]:
    """Accuracies with two decimals, the loss with four."""
    return [f"{row[acc1]:.2f}", f"{row[acc5]:.2f}", f"{row[loss]:.4f}"]


# --- Tables


def results(folder: Path) -> list[Result]:
    """All results in the folder of a run, a pipeline or a sweep."""
    found = []
    if points := read_json(folder / SWEEP_FILE).get("rows"):
        found.append(of_sweep(points))
    if stages := read_json(folder / PIPELINE_FILE).get("stages"):
        found.append(of_stages(stages))
    if validations := [line for line in read_metrics(folder) if "acc1" in line]:
        found.append(of_validations(validations))
    if rows := read_rows(folder / EVAL_FILE):
        sizes = folder / SIZES_FILE
        found.append(of_evaluation(rows, sizes if sizes.exists() else None))
    if (samples := folder / SAMPLES_FILE).is_file():
        alt = f"grid of images sampled by {folder.name}"
        found.append(Result(title="Samples", image=with_labels(samples), alt=alt))
    if scores := read_json(folder / FID_FILE):
        found.append(of_scores(scores))
    return found


def with_labels(samples: Path) -> Path | bytes:
    """The grid of samples with the class below each image, where the classes are known."""
    from spiralrope_cli.core.data.image_sets import names_of
    from spiralrope_cli.core.data.sample_files import GRID_IMAGES, read_metadata, sample_labels
    from spiralrope_cli.core.plots.images import labelled_grid

    folder = samples.parent
    if (folder / CONFIG_FILE).is_file():
        run: DiTRun = build(DiTRun, read_config(folder / CONFIG_FILE))
        columns = run.grid_classes
        names = names_of(run.data, run.model.num_classes, run.class_names)
        labels = [names[number] for number in columns] * GRID_ROWS
        return labelled_grid(samples, labels, len(columns)) or samples
    metadata = read_metadata(folder) or {}
    count = min(metadata.get("num", 0), GRID_IMAGES)
    labels = sample_labels(metadata, range(count))
    return labelled_grid(samples, labels, math.ceil(math.sqrt(count))) or samples


def of_validations(validations: list[Record]) -> Result:
    """Last and best validation, raw and EMA weights."""
    rows = [
        [
            f"{name}, {weights}",
            line["step"],
            *in_digits(line, f"{prefix}acc1", f"{prefix}acc5", f"{prefix}val_loss"),
            line["count"],
        ]
        for name, line in (("last", validations[-1]), ("best", best_validation(validations)))
        for weights, prefix in (("raw", ""), ("EMA", "ema_"))
    ]
    return Result(
        title="Accuracy",
        caption=f"Validation images, as trained; {BEST}",
        columns=("weights", "step", *ACCURACY, "images"),
        rows=rows,
    )


def of_evaluation(
    rows: Sequence[Record], sizes: Path | None = None, mark: str = " (highest)"
) -> Result:
    """One row per set of weights and protocol; `mark` follows the best acc@1."""
    columns, shared = columns_of(rows)
    best = max(row["acc1"] for row in rows) if len(rows) > 1 else None
    table = []
    for row, *cells in zip(rows, *columns.values(), strict=True):
        acc1, *others = in_digits(row)
        marked = acc1 + mark if row["acc1"] == best else acc1
        table.append([*cells, marked, *others, row["count"]])
    return Result(
        title="Evaluation",
        caption=shared,
        columns=[*columns, *ACCURACY, "images"],
        rows=table,
        words=columns.keys() - SHARED.keys(),
        image=sizes,
        alt="acc@1 over image size",
    )


def of_scores(scores: Record) -> Result:
    """FID and the other metrics of images; those that were left out with the reason."""
    rows = []
    for name, (label, better, digits) in FID_METRICS.items():
        value, spread = (
            "" if (number := scores.get(key)) is None else f"{number:.{digits}f}"
            for key in (name, f"{name}_std")
        )
        reason = scores.get("left_out", {}).get(name)
        if value or reason:
            rows.append((label, value or "-", spread, reason or better))
    sides = [scores[role] for role in ("samples", "reference") if scores.get(role)]
    caption = " against ".join(
        f"{side['count']:,} images of {side['path']}" if side["count"] else side["path"]
        for side in sides
    )
    return Result(
        title="Image metrics",
        caption=caption,
        columns=("metric", "value", "±", ""),
        rows=rows,
        words={""},
        warnings=scores.get("warnings", ()),
    )


def of_stages(stages: Record) -> Result:
    """When each stage of a pipeline finished, and its seconds."""
    rows = [
        (name, each["finished"], "-" if each["seconds"] is None else f"{each['seconds']:,.0f}")
        for name, each in stages.items()
    ]
    columns = ("stage", "finished", "seconds")
    caption = "Stages that are finished"
    return Result(title="Stages", caption=caption, columns=columns, rows=rows, words={"finished"})


def of_sweep(points: Sequence[Record]) -> Result:
    """All rows of a `sweep.json`."""
    if "training_loss" in points[0]:  # of `run dit`
        metrics = [
            (heading, name, 2 if name in ("fid", "sfid", "is") else digits)
            for name, (heading, _, digits) in FID_METRICS.items()
            if any(name in each for each in points)
        ]
        metrics.append(("training loss", "training_loss", 4))
        caption = f"{points[0]['images']:,} images each, from the last EMA weights"
        return of_points(points, metrics, caption)
    metrics = list(zip(ACCURACY, ("acc1", "acc5", "loss"), (2, 2, 4), strict=True))
    rows = [
        {
            **each,
            "weights": f"{each['checkpoint']} {each['weights']}",
            "crop ratio": f"{each['crop_ratio']:g}",
        }
        for each in points
    ]
    return of_points(rows, metrics, more=("weights", "crop ratio"))


def of_points(
    points: Sequence[Record],
    metrics: Sequence[tuple[str, str, int]],
    caption: str = "",
    more: Sequence[str] = (),
) -> Result:
    """One row per configuration of a sweep: mean and standard deviation over seeds.

    `metrics` are (heading, key, decimals), and `more` the keys of further columns.
    """
    names = list(points[0]["point"]) or ["options"]
    rows = [
        [
            *(each["point"].values() or ("as given",)),
            *(each[name] for name in more),
            len(each["seeds"]),
            *(with_spread(each[key], digits) if key in each else "-" for _, key, digits in metrics),
        ]
        for each in points
    ]
    several = any(len(each["seeds"]) > 1 for each in points)
    over = "Mean ± standard deviation over seeds" if several else "One seed each"
    return Result(
        title="All configurations",
        caption="; ".join(filter(None, (over, caption))),
        columns=[*names, *more, "seeds", *(heading for heading, _, _ in metrics)],
        rows=rows,
        words={*names, "weights"},
    )


def with_spread(value: Record, digits: int) -> str:
    """`97.22 ± 0.31`: mean and standard deviation."""
    more = "" if value["std"] is None else f" ± {value['std']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{more}"
