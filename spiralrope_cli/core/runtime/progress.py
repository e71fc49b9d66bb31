"""What a job says: results on stdout, all else on stderr; how far it is; what a run records.

What can be counted shows as a bar on a terminal, and as lines elsewhere. Of the processes of a job
the first one alone speaks and records.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from spiralrope_cli.core.atomic import write_whole
from spiralrope_cli.core.errors import ConfigError

SECONDS = 30.0
"""Between lines in a log."""

Track = Callable[[int, dict[str, float]], None]

METRICS_FILE = "metrics.jsonl"
UNITS = {
    "lr": "{:.3g}",
    "loss": "{:.4f}",
    "vb": "{:.5f}",
    "grad_norm": "{:.3f}",
    "images_per_s": "{:.0f}",
}
LABELS = {"grad_norm": "|grad|", "images_per_s": "images/s"}


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console that shows text as it is: names and paths may hold [brackets]."""
    return Console(stderr=stderr, quiet=quiet, highlight=False, markup=False)


def say(line: str, to: Console | None = None) -> None:
    """One line, never cut: on stderr, or on the console that shows a bar, which makes way."""
    (to or console(stderr=True)).print(line, soft_wrap=True)


def say_result(line: str) -> None:
    """One line on stdout, never cut."""
    console().print(line, soft_wrap=True)


def human_size(size: float) -> str:
    """Bytes in decimal units, as download pages show them."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3f} TB" if size < 10 else f"{size:,.0f} TB"


@contextlib.contextmanager
def counted(
    what: str, total: int, *, shown: bool, done: int = 0, unit: str = "per second", parts: int = 1
) -> Iterator[Callable[[int], None]]:
    """A function that is told how many more are done.

    Args:
        what: is counted.
        total: all of them.
        shown: whether this process speaks.
        done: those that an earlier run did; they say nothing about the pace.
        unit: of the pace.
        parts: of each one, where those are told; whole ones are shown.
    """
    shown_on = console(stderr=True, quiet=not shown)
    pace = Pace(total, done, parts)
    if not shown_on.is_terminal:
        yield _lines(shown_on, what, pace, unit)
        return
    columns = bar_columns(what, MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, console=shown_on, transient=True) as progress:
        task = progress.add_task("", total=total, completed=done, rate="")

        def advance(more: int) -> None:
            pace.advance(more)
            progress.update(task, completed=pace.done, rate=f"{_short(pace.rate)} {unit}")

        yield advance


def bar_columns(what: str, *counts: ProgressColumn) -> list[ProgressColumn]:
    """A bar as wide as there is room, what it counts, and the time that is left."""
    return [TextColumn(what), BarColumn(None), *counts, TimeRemainingColumn(), TextColumn("left")]


class Pace:
    """How many are done, how fast, and for how long it will go on."""

    def __init__(self, total: int, done: int, parts: int = 1) -> None:
        self.total, self.done = total, done
        self._parts, self._parts_done = parts, 0
        self._first, self._start = done, time.monotonic()

    def advance(self, more: int) -> None:
        """Counts parts, and with them whole ones; never beyond the total."""
        self._parts_done += more
        self.done = min(self._first + self._parts_done // self._parts, self.total)

    @property
    def rate(self) -> float:
        """Per second, since the start of this process."""
        return (self.done - self._first) / max(time.monotonic() - self._start, 1e-9)

    @property
    def left(self) -> timedelta:
        """Time until the end at this pace."""
        return timedelta(seconds=round((self.total - self.done) / max(self.rate, 1e-9)))


def _lines(to: Console, what: str, pace: Pace, unit: str) -> Callable[[int], None]:
    said = time.monotonic()

    def advance(more: int) -> None:
        nonlocal said
        before = pace.done
        pace.advance(more)
        now = time.monotonic()
        if now - said >= SECONDS or before < pace.done == pace.total:
            said = now
            rate = f"{_short(pace.rate)} {unit}"
            say(f"{what}  {pace.done}/{pace.total}  {rate}  left {pace.left}", to)

    return advance


def _short(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


# --- A training run


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


def best_validation(validations: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The one of the highest acc@1 of the raw weights, the first of several."""
    return max(validations, key=lambda values: values["acc1"])


def say_unreadable(reasons: dict[str, str]) -> None:
    """How many images were left out, and the first of them."""
    if not reasons:
        return
    say(f"{len(reasons)} image(s) could not be read and were left out:")
    for path, reason in sorted(reasons.items())[:10]:
        say(f"  {path}: {reason}")


def forget_after(folder: Path, step: int) -> None:
    """Drops what was logged beyond a checkpoint: the resumed run will log it again."""
    lines = [line for line in read_metrics(folder) if line["step"] <= step]
    write_whole(folder / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in lines))
