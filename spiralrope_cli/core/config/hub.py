"""Config of `fetch` and `export`, and what says which weights of SOURCE. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from spiralrope_cli.core.config.dit_runs import VAE_NAMES
from spiralrope_cli.core.config.models import ARCH_OF_SOURCE
from spiralrope_cli.core.config.option import PATH, SOURCE, check_fields, one_of, option
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.storage import check_writable

PUBLISHED_SUFFIXES = (".pth", ".pt")
FILE_SUFFIXES = (*PUBLISHED_SUFFIXES, ".bin", ".safetensors")
HUB = "hf:"
HUB_FORM = f"{HUB}OWNER/NAME[/FILE][@REVISION]"


@dataclass(frozen=True, kw_only=True)
class ChosenWeights:
    """Which weights of SOURCE, and what overrides their options."""

    ema: bool = option("Use EMA weights.", "Weights", flag="--ema/--no-ema", default=False)
    best: bool = option(
        "Use the checkpoint with the best raw acc@1, not the last.", "Weights", default=False
    )
    arch: str = option(ARCH_OF_SOURCE, default="")
    rope: dict[str, Any] = field(default_factory=dict)  # options that override the source's


@dataclass(frozen=True, kw_only=True)
class FetchRun:
    names: tuple[str, ...] = option(
        "Published names (--list shows all); of the Hugging Face Hub hf:OWNER/NAME, also with "
        "/FILE and @REVISION.",
        metavar="NAME",
        complete="published",
        argument=True,
        many=True,
        default=(),
    )
    show_list: bool = option(
        "List all names, and which are downloaded.", "Display", flag="--list", default=False
    )
    as_json: bool = option("Print JSON on stdout.", "Display", flag="--json", default=False)
    out: str = option("Also copy the files into this folder.", "Download", **PATH, default="")
    revision: str | None = option("Branch, tag or commit on the Hub.", "Download", default=None)
    offline: bool = option("Use local files only, no network.", "Download", default=False)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.show_list and self.names:
            raise ConfigError("--list shows all published names", "leave NAME out")
        if not self.show_list and not self.names:
            raise ConfigError("NAME is missing", "--list shows all published names")
        if self.out:
            check_writable(self.out, folder=True)


@dataclass(frozen=True, kw_only=True)
class ExportRun(ChosenWeights):
    panel = "Export"
    source: str = option(SOURCE)
    layout: Literal["safetensors", "published", "diffusers"] = option(
        "safetensors: a folder with config and model card; published: one .pth file; "
        "diffusers: a pipeline, of a DiT.",
        default="safetensors",
    )
    ema: bool | None = option(  # type: ignore[assignment]
        "Only EMA or only raw weights. By default raw; published files hold both.",
        "Weights",
        flag="--ema/--no-ema",
        default=None,
    )
    vae: str | None = option(
        "VAE of the pipeline: mse, ema, a folder in diffusers' layout or hf:OWNER/NAME; "
        "by default as in dit-sample.",
        metavar="NAME|FOLDER",
        complete=VAE_NAMES,
        default=None,
    )
    out: str = option(
        "Output folder, or file (published); by default in exports/, with --push nowhere.",
        **{**PATH, "metavar": "PATH"},
        default="",
    )
    push: str | None = option(
        "Upload the folder to this repository of the Hugging Face Hub.",
        "Upload",
        metavar="OWNER/NAME",
        pattern=r"\w[\w.-]*/\w[\w.-]*",
        expects="OWNER/NAME",
        default=None,
    )
    license: str | None = option(
        "Licence of the weights as the Hub spells it, as mit or cc-by-nc-4.0; for the card.",
        "Upload",
        metavar="ID",
        pattern=r"[a-z0-9][a-z0-9.-]*",
        expects="an identifier of the Hub, as mit, apache-2.0 or cc-by-nc-4.0",
        default=None,
    )
    private: bool = option(
        "Make a new repository private; an existing one must be.", "Upload", default=False
    )

    def __post_init__(self) -> None:
        check_fields(self)
        suffix = Path(self.out).suffix
        one_file = self.layout == "published"
        if self.out and one_file and suffix not in PUBLISHED_SUFFIXES:
            raise ConfigError(
                f"--out {self.out} must end in {one_of(PUBLISHED_SUFFIXES)}",
                "the published layout is one file",
            )
        if not one_file and suffix in (*PUBLISHED_SUFFIXES, ".safetensors"):
            raise ConfigError(
                f"--out {self.out} is the name of a file", f"the {self.layout} layout is a folder"
            )
        if self.out:
            check_writable(self.out, folder=not one_file)
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
