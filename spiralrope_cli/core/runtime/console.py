"""Where words go: results on stdout, everything else on stderr."""

from __future__ import annotations

from rich.console import Console


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console that shows text as it is: names and paths may hold [brackets]."""
    return Console(stderr=stderr, quiet=quiet, highlight=False, markup=False)


def say(line: str, to: Console | None = None) -> None:
    """One line, never cut: on stderr, or on the console that shows a bar, which makes way."""
    (to or console(stderr=True)).print(line, soft_wrap=True)


def say_result(line: str) -> None:
    """One line on stdout, never cut."""
    console().print(line, soft_wrap=True)
