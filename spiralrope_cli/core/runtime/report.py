"""What a run tells: a live display on a terminal, lines elsewhere, `metrics.jsonl`, trackers.

Everything here goes to stderr and comes from the first worker alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from spiralrope_cli.core.atomic import write_whole
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.runtime.progress import Pace, bar_columns, console, say, say_result
from spiralrope_cli.core.runtime.run_folder import CURVES_FILE, REPORT_FILE, SAMPLES_FILE

Track = Callable[[int, dict[str, float]], None]

METRICS_FILE = "metrics.jsonl"
FIGURES = (("acc1", 2), ("acc5", 2), ("val_loss", 4))
ACCURACY_COLUMNS = ("weights", "step", "acc@1 %", "acc@5 %", "loss", "images")
UNITS = {
    "lr": "{:.3g}",
    "loss": "{:.4f}",
    "vb": "{:.5f}",
    "grad_norm": "{:.3f}",
    "images_per_s": "{:.0f}",
}
LABELS = {"grad_norm": "|grad|", "images_per_s": "images/s"}


class Reporter:
    """Shows and records the progress of a run.

    Args:
        folder: the run folder.
        total_steps: of the run.
        steps_per_epoch: of the run.
        tracker: `none`, `tensorboard` or `wandb`.
        config: nested values, for trackers.
        first: whether this worker speaks; a silent reporter accepts everything.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        steps_per_epoch: int,
        tracker: str,
        config: dict[str, Any],
        first: bool,
    ) -> None:
        self.first = first
        self.folder = folder
        self.console = console(stderr=True, quiet=not first)
        self._total_steps, self._steps_per_epoch = total_steps, steps_per_epoch
        self._best, self._parts = "", list[str]()
        self._live: Live | None = None
        kind = tracker if first else "none"
        self._track, self._close_tracker = open_tracker(kind, folder, config)
        columns = bar_columns(
            "epoch {task.fields[epoch]}", TextColumn("step"), MofNCompleteColumn()
        )
        self._progress = Progress(*columns, console=self.console, expand=True)
        self._task = self._progress.add_task("", total=total_steps, epoch="")
        self._status = Text()

    def start(self, step: int, best_acc1: float | None) -> None:
        """Opens the display at a step, with the best accuracy before it."""
        self._pace = Pace(self._total_steps, step)
        self._show(best_acc1=best_acc1)
        if self.first and self.console.is_terminal:
            self._progress.reset(self._task, completed=step, epoch=self._epoch(step))
            self._live = Live(
                Group(self._progress, self._status), console=self.console, refresh_per_second=4
            )
            self._live.start()

    def _epoch(self, step: int) -> str:
        return f"{step / self._steps_per_epoch:.1f}/{self._total_steps / self._steps_per_epoch:.3g}"

    def _show(self, parts: list[str] | None = None, best_acc1: float | None = None) -> None:
        if parts is not None:
            self._parts = parts
        if best_acc1 is not None:
            self._best = f"best acc@1 {best_acc1:.2f} %"
        self._status.plain = "  ".join([*self._parts, self._best])

    def moved(self, step: int) -> None:
        """Advances the bar; costs nothing where there is none."""
        if self._live:
            self._progress.update(self._task, completed=step, epoch=self._epoch(step))

    def log(self, step: int, values: dict[str, float]) -> None:
        """A log point: loss, lr, grad_norm, images_per_s."""
        self._record(step, {"epoch": step / self._steps_per_epoch, **values})
        parts = [
            f"{LABELS.get(key, key)} {form.format(values[key])}"
            for key, form in UNITS.items()
            if key in values
        ]
        if self._live:
            self._show(parts)
            return
        self._pace.done = step
        self.say(
            f"epoch {self._epoch(step)}  step {step}/{self._total_steps}  "
            f"{'  '.join(parts)}  left {self._pace.left}"
        )

    def validated(self, step: int, values: dict[str, float], best_acc1: float) -> None:
        """A validation of raw and averaged weights."""
        self._record(step, values)
        self._show(best_acc1=best_acc1)
        self.say(
            f"step {step}  acc@1 {values['acc1']:.2f} %  EMA {values['ema_acc1']:.2f} %  "
            f"loss {values['val_loss']:.4f}  {self._best}"
        )

    def say(self, line: str) -> None:
        """One plain line."""
        say(line, self.console)

    def _record(self, step: int, values: dict[str, float]) -> None:
        if not self.first:
            return
        line = {"step": step, **values, "time": round(time.time(), 3)}
        with (self.folder / METRICS_FILE).open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._track(step, values)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()
        self._close_tracker()


def check_tracker(kind: str) -> None:
    """Refuses a tracker that is not installed.

    Raises:
        ConfigError: says what to install.
    """
    if kind != "none" and importlib.util.find_spec(kind) is None:
        raise ConfigError(f"--tracker {kind} is not installed", f"pip install 'spiralrope[{kind}]'")


def open_tracker(
    kind: str, folder: Path, config: dict[str, Any]
) -> tuple[Track, Callable[[], None]]:
    """A function that takes (step, values), and one that closes it."""
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))

        def write(step: int, values: dict[str, float]) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)

        return write, writer.close
    if kind == "wandb":
        import wandb

        # The id lies in the folder, so that a resumed run goes on and a new one does not.
        kept = folder / "wandb-id"
        if not kept.exists():
            kept.write_text(uuid.uuid4().hex)
        session = wandb.init(
            project="spiralrope",
            name=folder.name,
            id=kept.read_text(),
            dir=str(folder),
            config=config,
            resume="allow",
        )
        return lambda step, values: session.log(values, step=step), session.finish
    return lambda step, values: None, lambda: None


class Clock:
    """Images per second between log points, without the time that validation and saving take."""

    def __init__(self, batch_size: int, step: int) -> None:
        self._batch_size = batch_size
        self._since = (time.perf_counter(), step)
        self._paused = 0.0

    def rate(self, step: int) -> float:
        """Images per second since the last call."""
        now, (then, first) = time.perf_counter(), self._since
        seconds = now - then - self._paused
        self._since, self._paused = (now, step), 0.0
        return self._batch_size * (step - first) / max(seconds, 1e-9)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves out what happens inside."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All lines of `metrics.jsonl`; a line that a crash cut off is left out."""
    path = folder / METRICS_FILE
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def say_unreadable(reasons: dict[str, str]) -> None:
    """How many images were left out, and the first of them."""
    if not reasons:
        return
    say(f"{len(reasons)} image(s) could not be read and were left out:")
    for path, reason in sorted(reasons.items())[:10]:
        say(f"  {path}: {reason}")


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


def accuracy_table(folder: Path, validations: list[dict[str, Any]]) -> Table:
    """Raw and averaged weights at the last and at the best validation."""
    table = Table(title=str(folder), title_justify="left")
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


def forget_after(folder: Path, step: int) -> None:
    """Drops what was logged beyond a checkpoint: the resumed run will log it again."""
    lines = [line for line in read_metrics(folder) if line["step"] <= step]
    write_whole(folder / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in lines))
