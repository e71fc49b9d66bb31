"""How long does the command line take to answer? Whole processes, median of 15."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from interleave import interleaved, median, show

SIDES = {
    "python -c pass": ["-c", "pass"],
    "spiralrope --help": ["-m", "spiralrope_cli", "--help"],
    "spiralrope pretrain --help": ["-m", "spiralrope_cli", "pretrain", "--help"],
    "a wrong --arch": ["-m", "spiralrope_cli", "pretrain", "--arch", "x"],
}


def main() -> None:
    calls = {
        name: partial(subprocess.run, [sys.executable, *words], capture_output=True, check=False)
        for name, words in SIDES.items()
    }
    seconds = interleaved(calls, rounds=15)
    show("start-up", [(name, f"{1e3 * median(seconds[name]):.0f} ms") for name in seconds])


if __name__ == "__main__":
    main()
