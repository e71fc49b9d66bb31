"""Writes docs/cli.md from the app, and the fields of RopeConfig into python-api.md: `make docs`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer

from spiralrope_cli.core.config.models import RopeConfig
from spiralrope_cli.core.config.option import leaves
from spiralrope_cli.main import app

PAGE = Path(__file__).with_name("cli.md")
API_PAGE = Path(__file__).with_name("python-api.md")
FIELDS_HEAD = "| field of `RopeConfig` | default | |\n|---|---|---|\n"
HEAD = """# Commands and options

Written by `make docs` from the app, so that it says what `--help` says. An option that is not
given takes its value from `--config`, the data set or the recipe; `--dry-run` shows which. A
default is that of the published recipe on photographs, and that of the bundled digits where theirs
is another.

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


def rope_fields() -> str:
    """The table of RopeConfig's fields, in the words of their options."""
    return FIELDS_HEAD + "".join(
        _row(f"`{name}`", f"`{opt.default!r}`", opt.help + _choices(opt.choices))
        for name, opt in leaves(RopeConfig).items()
    )


def _choices(words: tuple[str, ...]) -> str:
    return f" ({', '.join(words)})" if words else ""


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
    subcommands = {  # a command is built when it is resolved
        each: command.resolve_command(context, [each])[1]
        for each in getattr(command, "commands", {})
    }
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
    """The words of the help, and the default that stands at their end in brackets."""
    words, _, shown = " ".join((parameter.help or "").split()).partition(r" [dim]\[")
    if shown:
        usual, _, on_digits = shown.removesuffix("][/dim]").partition("; digits ")
        words += f" Default: `{usual}`" + (f", on digits `{on_digits}`." if on_digits else ".")
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
    table = re.compile(re.escape(FIELDS_HEAD) + r"(\|.*\n)*")
    API_PAGE.write_text(table.sub(lambda _: rope_fields(), API_PAGE.read_text()))
