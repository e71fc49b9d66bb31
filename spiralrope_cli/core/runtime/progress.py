"""Console output, progress and `metrics.jsonl`.

Results go to stdout, everything else to stderr. Progress is a bar on a terminal, and lines
elsewhere. Only the first process of a run prints and logs.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from spiralrope_cli.core.runtime.trackers import open_tracker
from spiralrope_cli.core.storage import parse, write_whole

if TYPE_CHECKING:
    from spiralrope_cli.core.config.dit_runs import TrainingRun

SECONDS = 30.0
"""Between progress lines, without a terminal."""

METRICS_FILE = "metrics.jsonl"
LOGGED = ("step", "epoch", "loss", "lr", "images_per_s")
VALIDATED = (
    *("step", "epoch", "acc1", "acc5", "val_loss"),
    *("ema_acc1", "ema_acc5", "ema_val_loss", "count"),
)
SCORED = ("step", "epoch", "fid", "fid_num")
"""Keys of a log point, of a validation, and of a FID."""
SHOWN = {
    "lr": "lr {:.3g}",
    "loss": "loss {:.4f}",
    "vb": "vb {:.5f}",
    "grad_norm": "|grad| {:.3f}",
    "images_per_s": "images/s {:.0f}",
    "data_wait": "waits for data {:.0%}",
}


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console without markup: names and paths may contain [brackets]."""
    return Console(stderr=stderr, quiet=quiet, highlight=False, markup=False)


def say(line: str, to: Console | None = None) -> None:
    """Prints one line, not wrapped, on stderr or on the console of a bar."""
    (to or console(stderr=True)).print(line, soft_wrap=True)


def say_result(line: str) -> None:
    """Prints one line, not wrapped, on stdout."""
    console().print(line, soft_wrap=True)


def say_unreadable(reasons: dict[str, str]) -> None:
    """Prints how many images were skipped, and the first ten with the reason."""
    if not reasons:
        return
    say(f"{len(reasons)} image(s) could not be read and were skipped:")
    for path, reason in sorted(reasons.items())[:10]:
        say(f"  {path}: {reason}")


def human_size(size: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3f} TB" if size < 10 else f"{size:,.0f} TB"


@contextlib.contextmanager
def counted(
    what: str, total: int, *, shown: bool, done: int = 0, unit: str = "per second", parts: int = 1
) -> Iterator[Callable[[int], None]]:
    """A progress bar, or lines; yields `advance(n)`.

    Args:
        what: label.
        total: number of items.
        shown: whether this process prints.
        done: items of an earlier run; they do not count for the rate.
        unit: unit of the rate.
        parts: `advance` counts parts, so many per item; items are shown.
    """
    out = console(stderr=True, quiet=not shown)
    columns = bar_columns(what, MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    bar = Progress(*columns, console=out, transient=True)
    bar.add_task("", total=total, completed=done, rate="")
    [task] = bar.tasks
    parts_done, said = 0, time.monotonic()

    def advance(more: int) -> None:
        nonlocal parts_done, said
        parts_done += more
        before, now = task.completed, min(done + parts_done // parts, total)
        pace = (now - done) / max(task.elapsed or 0, 1e-9)
        rate = f"{pace:.0f} {unit}" if pace >= 100 else f"{pace:.3g} {unit}"
        bar.update(task.id, completed=now, rate=rate)
        late = time.monotonic() - said >= SECONDS
        if not out.is_terminal and (late or before < now == total):
            said = time.monotonic()
            say(f"{what}  {now}/{total}  {rate}  left {time_left(task, done)}", out)

    with bar if out.is_terminal else contextlib.nullcontext():
        yield advance


def bar_columns(what: str, *counts: ProgressColumn) -> list[ProgressColumn]:
    """Columns of a bar: label, bar, counts, remaining time."""
    return [TextColumn(what), BarColumn(None), *counts, TimeRemainingColumn(), TextColumn("left")]


def time_left(task: Task, first: int) -> str:
    """Remaining time at the rate of this process, which began at item `first`."""
    done, left = task.completed - first, (task.total or 0) - task.completed
    if left and not done:
        return "?"
    seconds = (task.elapsed or 0) * left / done if left else 0
    return str(timedelta(seconds=round(min(seconds, timedelta.max.total_seconds() // 2))))


# --- A training run


class Reporter:
    """Prints and logs the progress of a training run, if `first`."""

    def __init__(
        self, run: TrainingRun, *, step: int, best_acc1: float | None, first: bool
    ) -> None:
        self.folder, self.first, self._first_step = Path(run.out), first, step
        self._total_steps, self._steps_per_epoch = run.total_steps, run.steps_per_epoch
        self.console = console(stderr=True, quiet=not first)
        self._tracker = open_tracker(run, step) if first else None
        counts = (TextColumn("step"), MofNCompleteColumn())
        columns = bar_columns("epoch {task.fields[epoch]}", *counts)
        self._bar = Progress(*columns, console=self.console, expand=True)
        self._bar.add_task("", total=run.total_steps, completed=step, epoch=self._epoch(step))
        [self._task] = self._bar.tasks
        self._metrics, self._best, self._said = "", "", set[str]()
        self._status = Text()
        self._show_status(best_acc1)
        below_each_other = Group(self._bar, self._status)
        self._live = Live(below_each_other, console=self.console, refresh_per_second=4)

    def __enter__(self) -> Reporter:
        if self.first and self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._live.transient = kind is not None  # a bar below "stopped at step" would be stale
        self._live.stop()
        if self._tracker:
            self._tracker.close(failed=kind is not None)

    def advance(self, step: int) -> None:
        """Moves the bar."""
        self._bar.update(self._task.id, completed=step, epoch=self._epoch(step))

    def log(self, step: int, values: dict[str, float]) -> None:
        """A log point: loss, lr, grad_norm, images_per_s, and a long data_wait."""
        self._record("train", step, {"epoch": step / self._steps_per_epoch, **values})
        self.advance(step)
        self._metrics = "  ".join(
            words.format(values[key]) for key, words in SHOWN.items() if key in values
        )
        if self._live.is_started:
            self._show_status()
        else:
            self.say(
                f"epoch {self._epoch(step)}  step {step}/{self._total_steps}  {self._metrics}  "
                f"left {time_left(self._task, self._first_step)}"
            )

    def validated(self, step: int, values: dict[str, float], best_acc1: float) -> None:
        """A validation of raw and averaged weights."""
        self._record("val", step, values)
        self._show_status(best_acc1)
        self.say(
            f"step {step}  acc@1 {values['acc1']:.2f} %  EMA {values['ema_acc1']:.2f} %  "
            f"loss {values['val_loss']:.4f}  {self._best}"
        )

    def sampled(self, step: int, path: Path) -> None:
        """A grid of samples."""
        if self._tracker:
            self._tracker.log_image(step, "samples", path)
        self.say(f"samples: {path}")

    def scored(self, step: int, values: dict[str, float]) -> None:
        """A FID of the averaged weights."""
        self._record("val", step, values)
        self.say(f"step {step}  FID {values['fid']:.4f}  EMA weights, {values['fid_num']} images")

    @contextlib.contextmanager
    def counting(self, what: str, total: int, parts: int) -> Iterator[Callable[[int], None]]:
        """As `counted`, in place of the bar of the run."""
        hidden, self._live.transient = self._live.is_started, True
        self._live.stop()
        with counted(what, total, shown=self.first, unit="images/s", parts=parts) as advance:
            yield advance
        if hidden:
            self._live.start()

    def say(self, line: str) -> None:
        """Prints one line."""
        say(line, self.console)

    def say_once(self, line: str) -> None:
        """Prints one line, the first time."""
        if line not in self._said:
            self._said.add(line)
            self.say(line)

    def _epoch(self, step: int) -> str:
        return f"{step / self._steps_per_epoch:.1f}/{self._total_steps / self._steps_per_epoch:.3g}"

    def _show_status(self, best_acc1: float | None = None) -> None:
        if best_acc1 is not None:
            self._best = f"best raw acc@1 {best_acc1:.2f} %"
        self._status.plain = f"{self._metrics}  {self._best}"

    def _record(self, group: str, step: int, values: dict[str, float]) -> None:
        if not self.first:
            return
        # A norm of gradients can be infinite, which JSON does not know.
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line = {"step": step, **finite, "time": round(time.time(), 3)}
        with (self.folder / METRICS_FILE).open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self._tracker:
            tags = {f"{group}/{name.replace('val_', '')}": value for name, value in values.items()}
            self._tracker.log(step, tags)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a note counts those that a crash damaged."""
    path = folder / METRICS_FILE
    there = path.read_bytes().splitlines() if path.exists() else []
    lines = [line for line in map(_whole_line, there) if line]
    if len(lines) < len(there):
        _note_damaged(path, len(there) - len(lines))
    return lines


def _whole_line(line: bytes) -> dict[str, Any]:
    """One line; empty if it is damaged."""
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        found = parse(line)
        whole = any(set(keys) <= found.keys() for keys in (LOGGED, VALIDATED, SCORED))
        if whole and all(abs(value) < math.inf for value in found.values()):
            return dict(found)
    return {}


@functools.cache  # a command reads the file several times
def _note_damaged(path: Path, count: int) -> None:
    say(f"note: {path}: {count} damaged line(s) are passed over")


def best_validation(validations: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The validation with the highest acc@1 of the raw weights; the first one if equal."""
    return max(validations, key=lambda values: values["acc1"])


def forget_after(folder: Path, step: int) -> None:
    """Removes lines after a checkpoint: the resumed run logs them again."""
    lines = [line for line in read_metrics(folder) if line["step"] <= step]
    write_whole(folder / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in lines))
