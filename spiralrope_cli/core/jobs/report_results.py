"""What came out of a run, as pieces of its page: tables and pictures, as far as there are any."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spiralrope_cli.core.jobs import report_page as html
from spiralrope_cli.core.jobs.eval_report import Record, read_rows
from spiralrope_cli.core.jobs.score_report import LABELS
from spiralrope_cli.core.runtime.report import ACCURACY_COLUMNS, accuracy_rows, read_metrics
from spiralrope_cli.core.runtime.run_folder import (
    EVAL_FILE,
    FID_FILE,
    PIPELINE_FILE,
    SAMPLES_FILE,
    SIZES_FILE,
    SWEEP_FILE,
    read_json,
)

SPREAD = (("acc1", 2), ("acc5", 2), ("loss", 4))


def results(folder: Path, level: int) -> Iterable[str]:
    """Everything that a folder has of this kind.

    Args:
        folder: of a run, a pipeline or a sweep.
        level: of its headings.
    """
    if rows := read_json(folder / SWEEP_FILE).get("rows"):
        yield html.section(level, "All points", sweep(rows))
    if ran := read_json(folder / PIPELINE_FILE).get("stages"):
        yield html.section(level, "Stages", timetable(ran))
    validations = [line for line in read_metrics(folder) if "acc1" in line]
    if validations:
        rows = accuracy_rows(validations)
        shown = html.table("Held-out images, as trained", ACCURACY_COLUMNS, rows, {"weights"})
        yield html.section(level, "Accuracy", shown)
    if rows_of_eval := read_rows(folder / EVAL_FILE):
        sizes = folder / SIZES_FILE
        drawn = html.picture(sizes, "acc@1 against the image size") if sizes.exists() else ""
        yield html.section(level, "Evaluation", evaluation(rows_of_eval), drawn)
    if (folder / SAMPLES_FILE).is_file():
        alt = f"grid of images that {folder.name} drew"
        yield html.section(level, "Samples", html.picture(folder / SAMPLES_FILE, alt))
    if figures := read_json(folder / FID_FILE):
        yield html.section(level, "Figures of the images", *scores(figures))


def evaluation(records: list[Record]) -> str:
    """One row for each set of weights and protocol; what all share stands above."""
    told = {
        "source": [str(each["source"]) for each in records],
        "data": [Path(each["data"]).name for each in records],
        "weights": [f"{each['checkpoint']} {each['weights']}".strip() for each in records],
        "step": ["" if each["step"] is None else str(each["step"]) for each in records],
        "image size": ["x".join(map(str, each["image_size"])) for each in records],
        "crop ratio": [f"{each['crop_ratio']:g}" for each in records],
        "precision": [str(each["precision"]) for each in records],
    }
    varying = {n: cells for n, cells in told.items() if n == "weights" or len(set(cells)) > 1}
    same = [f"{n} {cells[0]}" for n, cells in told.items() if n not in varying and cells[0]]
    best = max(each["acc1"] for each in records) if len(records) > 1 else None
    figures = [
        (
            f"{each['acc1']:.2f}" + (" (best)" if each["acc1"] == best else ""),
            f"{each['acc5']:.2f}",
            f"{each['loss']:.4f}",
            each["count"],
        )
        for each in records
    ]
    columns = [*varying, "acc@1 %", "acc@5 %", "loss", "images"]
    rows = [[*cells, *found] for *cells, found in zip(*varying.values(), figures, strict=True)]
    caption = ", ".join(same) or "Held-out images"
    return html.table(caption, columns, rows, {"source", "data", "weights", "precision"})


def scores(facts: dict[str, Any]) -> list[str]:
    """FID and its relatives, with what they rest on."""
    rows = []
    for name, (label, better, digits) in LABELS.items():
        if (value := facts.get(name)) is not None:
            spread = facts.get(f"{name}_std")
            told = "" if spread is None else f"{spread:.{digits}f}"
            rows.append((label, f"{value:.{digits}f}", told, better))
    sides = [
        f"{facts[side]['count']:,} images of {facts[side]['path']}"
        if facts[side]["count"]
        else facts[side]["path"]
        for side in ("samples", "reference")
        if facts.get(side)
    ]
    return [
        html.table(" against ".join(sides), ("figure", "value", "±", ""), rows, {"figure", ""}),
        *(html.paragraph(f"Warning: {line}", "note") for line in facts.get("warnings", ())),
    ]


def timetable(stages: dict[str, Any]) -> str:
    """When each stage of a pipeline was done, and how long it took."""
    rows = [
        (name, each["finished"], "-" if each["seconds"] is None else f"{each['seconds']:,.0f}")
        for name, each in stages.items()
    ]
    return html.table("As they were done", ("stage", "finished", "seconds"), rows, {"finished"})


def sweep(rows: list[Record]) -> str:
    """Mean and spread over seeds of each point, set of weights and crop ratio."""
    names = list(rows[0]["point"])
    columns = [*names, "weights", "crop ratio", "seeds", "acc@1 %", "acc@5 %", "loss"]
    cells = [
        [
            *each["point"].values(),
            f"{each['checkpoint']} {each['weights']}",
            f"{each['crop_ratio']:g}",
            len(each["seeds"]),
            *(with_spread(each[name], digits) for name, digits in SPREAD),
        ]
        for each in rows
    ]
    return html.table("Mean ± standard deviation over seeds", columns, cells, {"weights"})


def with_spread(value: Record, digits: int) -> str:
    """`97.22 ± 0.31`, of a mean with its standard deviation."""
    more = "" if value["std"] is None else f" ± {value['std']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{more}"
