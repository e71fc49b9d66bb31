"""How far a job is through something that can be counted: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS = 30.0
"""Between lines in a log."""


@contextlib.contextmanager
def counted(what: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A function that is told how many more are done; nothing is shown by other processes."""
    console = Console(stderr=True, quiet=not shown)
    if not console.is_terminal:
        yield _lines(console, what, total)
        return
    columns = (TextColumn(what), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda more: progress.advance(task, more)


def _lines(console: Console, what: str, total: int) -> Callable[[int], None]:
    start = said = time.monotonic()
    done = 0

    def advance(more: int) -> None:
        nonlocal done, said
        done += more
        now = time.monotonic()
        if now - said >= SECONDS or done >= total:
            said = now
            rate = done / max(now - start, 1e-9)
            line = f"{what}  {min(done, total)}/{total}  {rate:.3g} per second"
            console.print(line, highlight=False, soft_wrap=True, markup=False)

    return advance
