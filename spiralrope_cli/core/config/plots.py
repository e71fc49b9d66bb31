"""What a picture is of. Standard library only."""

from __future__ import annotations

import re
from pathlib import Path

from spiralrope_cli.core.config.checks import one_of
from spiralrope_cli.core.errors import ConfigError

FORMATS = ("png", "svg")
PLOTS_FOLDER = "plots"
OVER = ("step", "epoch")


def target(out: str | None, form: str | None, name: str) -> Path:
    """Where a picture goes.

    Args:
        out: the file that the user named.
        form: the format that the user named.
        name: of the file without its suffix, where the user named none.

    Raises:
        ConfigError: an unknown format, or one that contradicts the suffix of the file.
    """
    if form is not None:
        one_of("format", form, FORMATS)
    if out is None:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
        return Path(PLOTS_FOLDER) / f"{stem}.{form or FORMATS[0]}"
    path = Path(out).expanduser()
    suffix = path.suffix.lower().lstrip(".")
    if suffix not in FORMATS:
        raise ConfigError(f"--out {out} must end in {' or '.join('.' + word for word in FORMATS)}")
    if form not in (None, suffix):
        raise ConfigError(f"--format {form} contradicts --out {out}", "leave one of them out")
    return path
