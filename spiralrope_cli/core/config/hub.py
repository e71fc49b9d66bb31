"""What `fetch` and `export` are asked, and where downloads are kept. Standard library only."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from spiralrope_cli.core.config.models import ARCH_OF_SOURCE
from spiralrope_cli.core.config.option import (
    DOWNLOAD,
    EXPORT,
    PATH,
    SHOW,
    SOURCE,
    Opt,
    check_fields,
)
from spiralrope_cli.core.errors import ConfigError

PUBLISHED_SUFFIXES = (".pth", ".pt")


def cache_folder() -> Path:
    """Where downloads and unpacked data sets are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SPIRALROPE_CACHE") or Path(base) / "spiralrope")


@dataclass(frozen=True, kw_only=True)
class FetchRun:
    """Published files that come here, or a list of them."""

    names: Annotated[
        tuple[str, ...],
        Opt(
            "Published name; --list shows them.",
            metavar="NAME",
            complete="published",
            argument=True,
            many=True,
        ),
    ] = ()
    show_list: Annotated[bool, Opt("List names and what is here.", SHOW, flag="--list")] = False
    as_json: Annotated[bool, Opt("The result as JSON on stdout.", SHOW, flag="--json")] = False
    out: Annotated[str, Opt("Folder for a copy under the file's own name.", DOWNLOAD, **PATH)] = ""
    revision: Annotated[str | None, Opt("Branch, tag or commit on the Hub.", DOWNLOAD)] = None
    offline: Annotated[bool, Opt("Use only local files; no network.", DOWNLOAD)] = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.show_list and self.names:
            raise ConfigError("--list shows all that is published", "leave NAME out")
        if not self.show_list and not self.names:
            raise ConfigError("nothing to fetch", "name what to fetch; --list shows what there is")


@dataclass(frozen=True, kw_only=True)
class ExportRun:
    """Weights to write in another layout."""

    source: Annotated[str, SOURCE]
    layout: Annotated[
        Literal["published", "safetensors"],
        Opt("A file as published, or a folder with a model card.", EXPORT, required=True),
    ]
    ema: Annotated[
        bool | None,
        Opt(
            "Only the EMA or the raw weights; by default raw, or both in a published file.",
            EXPORT,
            flag="--ema/--no-ema",
        ),
    ] = None
    best: Annotated[bool, Opt("A run's best checkpoint, not its last.", EXPORT)] = False
    arch: Annotated[str, ARCH_OF_SOURCE] = ""
    out: Annotated[
        str,
        Opt(
            "File (published) or folder (safetensors); by default below exports/.",
            EXPORT,
            **{**PATH, "metavar": "PATH"},
        ),
    ] = ""

    def __post_init__(self) -> None:
        check_fields(self)
        suffix = Path(self.out).suffix
        if self.out and self.layout == "published" and suffix not in PUBLISHED_SUFFIXES:
            raise ConfigError(
                f"--out {self.out} does not end with {' or '.join(PUBLISHED_SUFFIXES)}",
                "the published layout is one file",
            )
        if self.layout == "safetensors" and suffix in (*PUBLISHED_SUFFIXES, ".safetensors"):
            raise ConfigError(
                f"--out {self.out} names a file",
                "the safetensors layout is a folder: model.safetensors, config.yaml, README.md",
            )
