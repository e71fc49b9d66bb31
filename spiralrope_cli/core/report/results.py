"""What came out of a run: its last lines on stdout, and tables and pictures for its page."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from rich.table import Table as RichTable

from spiralrope_cli.core.config.evals import FID_METRICS
from spiralrope_cli.core.runtime.progress import console, read_metrics, say_result
from spiralrope_cli.core.runtime.run_folder import (
    CURVES_FILE,
    EVAL_FILE,
    FID_FILE,
    PIPELINE_FILE,
    REPORT_FILE,
    SAMPLES_FILE,
    SIZES_FILE,
    SWEEP_FILE,
    read_json,
    read_rows,
)

LARGEST_PICTURE = 1_500_000
"""Bytes of a picture that goes in as it is; larger ones are made smaller."""
PICTURE_SIDE = 1600
JPEG_QUALITY = 85
FIGURES = (("acc1", 2), ("acc5", 2), ("val_loss", 4))
ACCURACY_COLUMNS = ("weights", "step", "acc@1 %", "acc@5 %", "loss", "images")
SPREAD = (("acc1", 2), ("acc5", 2), ("loss", 4))

Record = dict[str, Any]


# --- On stdout


def print_results(folder: Path) -> None:
    """The final figures of a run, on stdout; the last line is for scripts to find."""
    lines = read_metrics(folder)
    validations = [line for line in lines if "acc1" in line]
    if validations:
        console().print(accuracy_table(folder, validations))
    pictures = (("curves", CURVES_FILE), ("samples", SAMPLES_FILE), ("report", REPORT_FILE))
    for name, file in pictures:
        if (folder / file).exists():
            say_result(f"{name}: {folder / file}")
    if validations:
        say_result(f"held-out acc@1 {validations[-1]['acc1']:.2f} %")
    elif lines:
        say_result(f"training loss {lines[-1]['loss']:.4f}")


def accuracy_table(folder: Path, validations: list[dict[str, Any]]) -> RichTable:
    """Raw and averaged weights at the last and at the best validation."""
    table = RichTable(title=str(folder), title_justify="left")
    for column in ACCURACY_COLUMNS:
        table.add_column(column, justify="left" if column == "weights" else "right")
    for row in accuracy_rows(validations):
        table.add_row(*row)
    return table


def accuracy_rows(validations: list[dict[str, Any]]) -> list[list[str]]:
    """The cells of that table, by `ACCURACY_COLUMNS`."""
    last = validations[-1]
    best = max(validations, key=lambda line: (line["acc1"], -line["step"]))
    return [
        [
            name,
            str(line["step"]),
            *(f"{line[prefix + key]:.{digits}f}" for key, digits in FIGURES),
            str(line["count"]),
        ]
        for name, line, prefix in (
            ("last, raw", last, ""),
            ("last, EMA", last, "ema_"),
            ("best, raw", best, ""),
            ("best, EMA", best, "ema_"),
        )
    ]


# --- On the page


class Table(NamedTuple):
    """A table of the page.

    Attributes:
        caption: what it shows.
        columns: their names.
        rows: their cells; the first one says what the row is about.
        words: columns that hold no numbers, which stand at the left.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    words: Collection[str]

    @property
    def numbers(self) -> set[str]:
        """Columns that stand at the right."""
        return {*self.columns} - {self.columns[0], *self.words}


class Picture(NamedTuple):
    """A picture of the page: an address that holds it, and what it shows."""

    address: str
    alt: str


class Result(NamedTuple):
    """One heading of the page, with what stands below it in this order."""

    title: str
    table: Table | None = None
    picture: Picture | None = None
    warnings: Sequence[str] = ()


def results(folder: Path) -> list[Result]:
    """Everything that the folder of a run, a pipeline or a sweep has of this kind."""
    found = []
    if rows := read_json(folder / SWEEP_FILE).get("rows"):
        found.append(Result("All points", sweep(rows)))
    if ran := read_json(folder / PIPELINE_FILE).get("stages"):
        found.append(Result("Stages", timetable(ran)))
    validations = [line for line in read_metrics(folder) if "acc1" in line]
    if validations:
        rows = accuracy_rows(validations)
        shown = Table("Held-out images, as trained", ACCURACY_COLUMNS, rows, {"weights"})
        found.append(Result("Accuracy", shown))
    if rows_of_eval := read_rows(folder / EVAL_FILE):
        sizes = folder / SIZES_FILE
        drawn = picture(sizes, "acc@1 against the image size") if sizes.exists() else None
        found.append(Result("Evaluation", evaluation(rows_of_eval), drawn))
    if (folder / SAMPLES_FILE).is_file():
        drawn = picture(folder / SAMPLES_FILE, f"grid of images that {folder.name} drew")
        found.append(Result("Samples", picture=drawn))
    if facts := read_json(folder / FID_FILE):
        warnings = facts.get("warnings", ())
        found.append(Result("Figures of the images", scores(facts), warnings=warnings))
    return found


def picture(path: Path, alt: str) -> Picture:
    """A picture file inside the page; a large one is made smaller first."""
    kind, content = "png", path.read_bytes()
    if len(content) > LARGEST_PICTURE:
        with Image.open(path) as image:
            smaller = image.convert("RGB")
            smaller.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        sink = io.BytesIO()
        smaller.save(sink, "jpeg", quality=JPEG_QUALITY)
        kind, content = "jpeg", sink.getvalue()
    return Picture(f"data:image/{kind};base64,{base64.b64encode(content).decode()}", alt)


def evaluation(records: list[Record]) -> Table:
    """One row for each set of weights and protocol; what all share stands above."""
    cells_of = {
        "source": [str(each["source"]) for each in records],
        "data": [Path(each["data"]).name for each in records],
        "weights": [f"{each['checkpoint']} {each['weights']}".strip() for each in records],
        "step": ["" if each["step"] is None else str(each["step"]) for each in records],
        "image size": ["x".join(map(str, each["image_size"])) for each in records],
        "crop ratio": [f"{each['crop_ratio']:g}" for each in records],
        "precision": [str(each["precision"]) for each in records],
    }
    varying = {n: cells for n, cells in cells_of.items() if n == "weights" or len(set(cells)) > 1}
    same = [f"{n} {cells[0]}" for n, cells in cells_of.items() if n not in varying and cells[0]]
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
    return Table(caption, columns, rows, {"source", "data", "weights", "precision"})


def scores(facts: Record) -> Table:
    """FID and its relatives, with what they rest on."""
    rows = []
    for name, (label, better, digits) in FID_METRICS.items():
        if (value := facts.get(name)) is not None:
            spread = facts.get(f"{name}_std")
            spread = "" if spread is None else f"{spread:.{digits}f}"
            rows.append((label, f"{value:.{digits}f}", spread, better))
    sides = [
        f"{facts[side]['count']:,} images of {facts[side]['path']}"
        if facts[side]["count"]
        else facts[side]["path"]
        for side in ("samples", "reference")
        if facts.get(side)
    ]
    columns = ("figure", "value", "±", "")
    return Table(" against ".join(sides), columns, rows, {"figure", ""})


def timetable(stages: Record) -> Table:
    """When each stage of a pipeline was done, and how long it took."""
    rows = [
        (name, each["finished"], "-" if each["seconds"] is None else f"{each['seconds']:,.0f}")
        for name, each in stages.items()
    ]
    return Table("As they were done", ("stage", "finished", "seconds"), rows, {"finished"})


def sweep(rows: list[Record]) -> Table:
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
    return Table("Mean ± standard deviation over seeds", columns, cells, {"weights"})


def with_spread(value: Record, digits: int) -> str:
    """`97.22 ± 0.31`, of a mean with its standard deviation."""
    more = "" if value["std"] is None else f" ± {value['std']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{more}"
