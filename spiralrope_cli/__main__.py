"""Entry point: from the first import to the last, Ctrl-C says a word and exits with 130."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def main() -> None:
    signal.signal(signal.SIGINT, _interrupt)
    try:
        from spiralrope_cli.main import main as run

        run()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the shutdown of Python is left


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Not by KeyboardInterrupt, which Typer turns into an exit without a word."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print("interrupted", file=sys.stderr)  # noqa: T201 - rich may not be here yet
    raise SystemExit(130)


if __name__ == "__main__":
    main()
