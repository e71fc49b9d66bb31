"""What a job says: results on stdout, everything else on stderr, and how far it is.

What can be counted shows as a bar on a terminal, and as lines elsewhere.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

SECONDS = 30.0
"""Between lines in a log."""


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
