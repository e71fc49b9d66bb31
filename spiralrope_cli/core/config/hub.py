"""Config of `fetch` and `export`, and the cache folder. Standard library only."""

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
    """Folder of downloads and unpacked data sets."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SPIRALROPE_CACHE") or Path(base) / "spiralrope")


@dataclass(frozen=True, kw_only=True)
class FetchRun:
    """The config of `fetch`."""

    names: Annotated[
        tuple[str, ...],
        Opt(
            "Published names; --list shows all.",
            metavar="NAME",
            complete="published",
            argument=True,
            many=True,
        ),
    ] = ()
    show_list: Annotated[
        bool, Opt("List all names, and which are downloaded.", SHOW, flag="--list")
    ] = False
    as_json: Annotated[bool, Opt("Print JSON on stdout.", SHOW, flag="--json")] = False
    out: Annotated[str, Opt("Also copy the files into this folder.", DOWNLOAD, **PATH)] = ""
    revision: Annotated[str | None, Opt("Branch, tag or commit on the Hub.", DOWNLOAD)] = None
    offline: Annotated[bool, Opt("Use local files only, no network.", DOWNLOAD)] = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.show_list and self.names:
            raise ConfigError("--list shows all published names", "leave NAME out")
        if not self.show_list and not self.names:
            raise ConfigError("NAME is missing", "--list shows all published names")


@dataclass(frozen=True, kw_only=True)
class ExportRun:
    """The config of `export`."""

    source: Annotated[str, SOURCE]
    layout: Annotated[
        Literal["published", "safetensors"],
        Opt(
            "published: one .pth file; safetensors: a folder with a model card.",
            EXPORT,
            required=True,
        ),
    ]
    ema: Annotated[
        bool | None,
        Opt(
            "Only EMA or only raw weights. By default raw; published files hold both.",
            EXPORT,
            flag="--ema/--no-ema",
        ),
    ] = None
    best: Annotated[
        bool, Opt("Use the checkpoint with the best raw acc@1, not the last.", EXPORT)
    ] = False
    arch: Annotated[str, ARCH_OF_SOURCE] = ""
    out: Annotated[
        str,
        Opt(
            "Output file (published) or folder (safetensors); by default in exports/.",
            EXPORT,
            **{**PATH, "metavar": "PATH"},
        ),
    ] = ""

    def __post_init__(self) -> None:
        check_fields(self)
        suffix = Path(self.out).suffix
        if self.out and self.layout == "published" and suffix not in PUBLISHED_SUFFIXES:
            raise ConfigError(
                f"--out {self.out} must end in {' or '.join(PUBLISHED_SUFFIXES)}",
                "the published layout is one file",
            )
        if self.layout == "safetensors" and suffix in (*PUBLISHED_SUFFIXES, ".safetensors"):
            raise ConfigError(
                f"--out {self.out} is the name of a file",
                "the safetensors layout is a folder: model.safetensors, config.yaml, README.md",
            )
