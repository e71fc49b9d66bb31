"""Published weights by name, one row each. Standard library only."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from spiralrope_cli.core.errors import ConfigError

WEIGHTS_REPO = "haoyuliu00/Spiral_RoPE"
INCEPTION_VARIABLE = "SPIRALROPE_INCEPTION_URL"
_INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
_REFERENCES = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A published file, in a repository on the Hub or at a plain URL."""

    name: str  # published name, for all commands
    kind: str  # deit, dit, vae, inception or reference
    what: str  # description
    file: str  # path in the repository; for a plain URL the file name
    repo: str = ""
    more_files: tuple[str, ...] = ()  # further files of the repository
    arch: str = ""  # of a DeiT or DiT
    steps: int | None = None  # training steps; the file name can be wrong
    rope: dict[str, Any] | None = None  # fields of RopeConfig, if the file does not have them
    url: str = ""
    url_variable: str = ""  # environment variable for a mirror
    sha256: str = ""  # first digits, for plain URLs; empty if none is published

    @property
    def files(self) -> tuple[str, ...]:
        """All files, by path in the repository."""
        return (*self.more_files, self.file)

    @property
    def file_name(self) -> str:
        """Name of the file, without folders."""
        return PurePosixPath(self.file).name

    @property
    def source_url(self) -> str:
        """URL of a plain download, or of the user's mirror."""
        return os.environ.get(self.url_variable or "", "") or self.url


def _deit(size: str, folder: str) -> Row:
    what = f"DeiT-{size.upper()}, ImageNet-1K 224 px"
    name, file = f"deit-{size}", f"{folder}/checkpoint.pth"
    return Row(name=name, kind="deit", what=what, file=file, repo=WEIGHTS_REPO, arch=name)


def _dit(name: str, file: str, steps: int, **more: Any) -> Row:
    arch = name.partition("@")[0]
    what = f"DiT-{arch[4:-1].upper()}/{arch[-1]}, ImageNet 256 px"
    row = {"what": what, "file": file, "repo": WEIGHTS_REPO, "arch": arch, "steps": steps, **more}
    return Row(name=name, kind="dit", **row)


def _vae(name: str, what: str) -> Row:
    return Row(
        name=name,
        kind="vae",
        what=what,
        file="diffusion_pytorch_model.safetensors",
        more_files=("config.json",),
        repo=f"stabilityai/sd-{name.replace('-', '-ft-')}",
    )


def _reference(side: int, file: str) -> Row:
    return Row(
        name=f"imagenet{side}-ref",
        kind="reference",
        what=f"ADM's reference batch, ImageNet {side} px",
        file=file,
        url=f"{_REFERENCES}/{side}/{file}",
    )


ROWS = (
    _deit("s", "deit_small_patch16_LS_rms_rope"),
    _deit("b", "deit_base_patch16_LS_rms_rope"),
    _deit("l", "deit_large_patch16_LS_rms_rope"),
    _dit("dit-s2", "dit_s2/0400000.pt", 400_000),
    _dit("dit-b2", "dit_b2/0400000.pt", 400_000),
    _dit("dit-l2", "dit_l2/0400000.pt", 400_000),
    _dit("dit-xl2@400k", "dit_xl2/0400000.pt", 400_000),
    # The file name lacks a zero: these are the weights of step 7 000 000. It is a plain state dict
    # without options; the RoPE options are from the name of the authors' run.
    _dit(
        "dit-xl2@7m",
        "dit_xl2/0700000.pth",
        7_000_000,
        what="DiT-XL/2, best; its file name lacks a zero",
        rope={"rotate": 4, "max_freq_lang": 1.5, "same_theta": False},
    ),
    _vae("vae-ema", "the VAE of DiT training"),
    _vae("vae-mse", "the VAE of sampling, for the published FID"),
    Row(
        name="inception",
        kind="inception",
        what="Inception features for `fid`",
        file=_INCEPTION,
        url=f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{_INCEPTION}",
        url_variable=INCEPTION_VARIABLE,
        sha256="6726825d",
    ),
    _reference(256, "VIRTUAL_imagenet256_labeled.npz"),
    _reference(512, "VIRTUAL_imagenet512.npz"),
)

ALIASES = {"dit-xl2": "dit-xl2@7m"}


def find_row(name: str) -> Row:
    """The row by name; for an unknown name the error suggests the nearest."""
    wanted = name.strip().lower()
    by_name = {row.name: row for row in ROWS}
    if row := by_name.get(ALIASES.get(wanted, wanted)):
        return row
    near = difflib.get_close_matches(wanted, [*by_name, *ALIASES], n=1, cutoff=0.5)
    guess = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"{name} is not a published name",
        f"{guess}spiralrope fetch --list shows all",
    )
