"""Config of `fetch` and `export`. Standard library only."""

from __future__ import annotations

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
    UPLOAD,
    Opt,
    check_fields,
)
from spiralrope_cli.core.errors import ConfigError

PUBLISHED_SUFFIXES = (".pth", ".pt")
FILE_SUFFIXES = (*PUBLISHED_SUFFIXES, ".bin", ".safetensors")
HUB = "hf:"
HUB_FORM = f"{HUB}OWNER/NAME[/FILE][@REVISION]"


@dataclass(frozen=True, kw_only=True)
class FetchRun:
    names: Annotated[
        tuple[str, ...],
        Opt(
            "Published names (--list shows all); of the Hugging Face Hub hf:OWNER/NAME, also with "
            "/FILE and @REVISION.",
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
    source: Annotated[str, SOURCE]
    layout: Annotated[
        Literal["safetensors", "published", "diffusers"],
        Opt(
            "safetensors: a folder with config and model card; published: one .pth file; "
            "diffusers: a pipeline, of a DiT.",
            EXPORT,
        ),
    ] = "safetensors"
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
    vae: Annotated[
        str | None,
        Opt(
            "VAE of the pipeline: mse, ema, a folder in diffusers' layout or hf:OWNER/NAME; "
            "by default as in dit-sample.",
            EXPORT,
            metavar="NAME|FOLDER",
            complete="vaes",
        ),
    ] = None
    out: Annotated[
        str,
        Opt(
            "Output folder, or file (published); by default in exports/, with --push nowhere.",
            EXPORT,
            **{**PATH, "metavar": "PATH"},
        ),
    ] = ""
    push: Annotated[
        str | None,
        Opt(
            "Upload the folder to this repository of the Hugging Face Hub.",
            UPLOAD,
            metavar="OWNER/NAME",
            pattern=r"\w[\w.-]*/\w[\w.-]*",
            expects="OWNER/NAME",
        ),
    ] = None
    license: Annotated[
        str | None,
        Opt(
            "Licence of the weights as the Hub spells it, as mit or cc-by-nc-4.0; for the card.",
            UPLOAD,
            metavar="ID",
            pattern=r"[a-z0-9][a-z0-9.-]*",
            expects="an identifier of the Hub, as mit, apache-2.0 or cc-by-nc-4.0",
        ),
    ] = None
    private: Annotated[
        bool, Opt("Make a new repository private; an existing one must be.", UPLOAD)
    ] = False

    def __post_init__(self) -> None:
        check_fields(self)
        suffix = Path(self.out).suffix
        one_file = self.layout == "published"
        if self.out and one_file and suffix not in PUBLISHED_SUFFIXES:
            raise ConfigError(
                f"--out {self.out} must end in {' or '.join(PUBLISHED_SUFFIXES)}",
                "the published layout is one file",
            )
        if not one_file and suffix in (*PUBLISHED_SUFFIXES, ".safetensors"):
            raise ConfigError(
                f"--out {self.out} is the name of a file", f"the {self.layout} layout is a folder"
            )
        if one_file and (self.push or self.license):
            raise ConfigError(
                f"--{'push' if self.push else 'license'} with --layout published",
                "use --layout safetensors, which has a model card and needs no pickle",
            )
        if self.push and not self.license:
            raise ConfigError(
                f"--push {self.push} needs --license, as mit, apache-2.0 or cc-by-nc-4.0",
                "only the owner of the weights can give one",
            )
        if self.private and not self.push:
            raise ConfigError("--private has no effect without --push", "leave one out")
        if self.vae is not None and self.layout != "diffusers":
            raise ConfigError(
                f"--vae {self.vae} has no effect with --layout {self.layout}",
                "only a pipeline of diffusers has a VAE",
            )
