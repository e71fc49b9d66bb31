"""Writes docs/cli.md from the app itself: `make docs`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer

from spiralrope_cli.main import app

PAGE = Path(__file__).with_name("cli.md")
HEAD = """# Commands and options

Written by `make docs` from the app, so that it says what `--help` says. An option that is not
given takes its value from `--config`, the data set or the recipe; `--dry-run` shows which.

`spiralrope --install-completion` lets the shell complete commands, options, architectures,
published names, data sets and run folders ([how](README.md#completion)).
"""

OF_TYPER = ("install_completion", "show_completion", "help")
"""Options that every command or every Typer app has; their words differ between its versions."""

PLACEHOLDERS = {
    **{"int": "N", "integer": "N", "float": "X", "str": "TEXT", "text": "TEXT", "path": "FILE"},
    "list[str]": "...",
}


def reference() -> str:
    """The whole page."""
    # Typer's own `utils docs` knows neither our panels nor that examples stand on lines.
    return HEAD + _page(typer.main.get_command(app), "spiralrope", None)


def _page(command: Any, name: str, parent: Any) -> str:
    context = typer.Context(command, info_name=name, parent=parent)
    path = context.command_path
    parts = [f"## {path}", *_paragraphs(command.help)]
    parts.append(f"```text\n{path} {' '.join(command.collect_usage_pieces(context))}\n```")
    panels: dict[str, list[str]] = {}
    for parameter in command.params:
        shown = parameter.get_help_record(context)
        if shown and parameter.name not in OF_TYPER:
            is_argument = parameter.param_type_name == "argument"
            title = parameter.rich_help_panel or ("Arguments" if is_argument else "Options")
            name = f"`{parameter.metavar}`" if is_argument else _spelling(shown[0])
            panels.setdefault(title, []).append(_row(name, _meaning(parameter)))
    subcommands = getattr(command, "commands", {})
    panels["Commands"] = [
        _row(f"[`{each}`](#{f'{path} {each}'.replace(' ', '-')})", _paragraphs(it.help)[0])
        for each, it in subcommands.items()
    ]
    for title, rows in panels.items():
        if rows:
            parts.append(f"| {title} | |\n|---|---|\n" + "".join(rows))
    if command.epilog:
        parts.append(_examples(command.epilog))
    pages = [_page(each, each_name, context) for each_name, each in subcommands.items()]
    return "\n" + "\n\n".join(part.strip() for part in parts) + "\n" + "".join(pages)


def _spelling(shown: str) -> str:
    """`--rope / --no-rope`, `--arch NAME`, `--epochs N`: Typer's versions differ in the last."""
    words, _, kind = shown.strip().rpartition(" ")
    if words and not kind.startswith("--"):
        shown = f"{words} {PLACEHOLDERS.get(kind.strip('<>').lower(), kind)}"
    return f"`{shown.strip()}`"


def _meaning(parameter: Any) -> str:
    words = " ".join((parameter.help or "").split())
    return f"{words} Required." if parameter.required else words


def _paragraphs(text: str | None) -> list[str]:
    return [" ".join(each.split()) for each in re.split(r"\n\s*\n", text or "") if each.strip()]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n"


def _examples(epilog: str) -> str:
    """The lines of an epilog as a block; what stands far to the right is a comment."""
    lines = [line.strip() for line in epilog.splitlines() if line.startswith("  ") and line.strip()]
    split = [re.split(r" {3,}", line, maxsplit=1) for line in lines]
    return "```bash\n" + "\n".join("  # ".join(each) for each in split) + "\n```"


if __name__ == "__main__":
    PAGE.write_text(reference())
