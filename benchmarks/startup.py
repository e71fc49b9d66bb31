"""How soon does the command line answer, beside a Typer app of one command? Whole processes."""

from __future__ import annotations

import compileall
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from interleave import interleaved, median, ratio, show

import spiralrope_cli

PEER = "a one-command app --help"
ONE_COMMAND = """
import typer

app = typer.Typer(add_completion=False)


@app.command()
def hello(name: str = typer.Option("you", help="Who is greeted.")) -> None:
    \"\"\"Greet somebody.\"\"\"
    print(f"hello {name}")


if __name__ == "__main__":
    app()
"""
OURS = {
    "spiralrope --help": ["--help"],
    "spiralrope pretrain --help": ["pretrain", "--help"],
    "spiralrope pretrain --arch x": ["pretrain", "--arch", "x"],
}
MOST = {"spiralrope --help": 1.5, "spiralrope pretrain --help": 2.0}
"""Times the peer's that it may take."""
LOADED = """
import sys
sys.argv[0] = "spiralrope"
from spiralrope_cli.main import main
try:
    main()
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


def main() -> None:
    compileall.compile_dir(Path(spiralrope_cli.__file__).parent, quiet=1)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "peer.py").write_text(ONE_COMMAND)
        compileall.compile_dir(folder, quiet=1)
        sides: dict[str, Callable[[], object]] = {"python -c pass": partial(run, "-c", "pass")}
        # Imported, as ours is, and so from its bytecode.
        sides[PEER] = partial(
            run,
            "-c",
            f"import sys; sys.path[0] = {folder!r}; sys.argv[1:] = "
            "['--help']; import peer; peer.app()",
        )
        for name, words in OURS.items():
            sides[name] = partial(run, "-m", "spiralrope_cli", *words)
        seconds = interleaved(sides, rounds=15)
    rows = []
    for name in seconds:
        text = f"{1e3 * median(seconds[name]):.0f} ms, RATIO {ratio(seconds, name, PEER):.2f}"
        rows.append((name, text + (f" (at most {MOST[name]})" if name in MOST else "")))
    show("start-up, medians of 15 rounds, and beside the one-command app", rows)
    loaded = {name: run("-c", LOADED, *words).stderr for name, words in OURS.items()}
    torch = [name for name, said in loaded.items() if not said.endswith("False\n")]
    print(f"torch is loaded by {', '.join(torch) or 'none of these'}")


if __name__ == "__main__":
    main()
