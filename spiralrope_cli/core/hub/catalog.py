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
    """One entry.

    Attributes:
        name: what `fetch` and the other commands call it.
        kind: deit, dit, vae, inception or reference.
        what: in words.
        file: path in the repository, or the file's name where there is no repository.
        repo: on the Hub; empty for plain downloads.
        more_files: further files of the repository that belong to it.
        arch: its `--arch`, empty for what is not ours.
        steps: training steps; the file's name can say something else.
        rope: options by the fields of RopeConfig, None where the file itself holds them or
            there are none.
        url: of plain downloads.
        url_variable: environment variable that names a mirror.
        sha256: how the digest of a plain download begins, empty where none is published.
    """

    name: str
    kind: str
    what: str
    file: str
    repo: str = ""
    more_files: tuple[str, ...] = ()
    arch: str = ""
    steps: int | None = None
    rope: dict[str, Any] | None = None
    url: str = ""
    url_variable: str = ""
    sha256: str = ""

    @property
    def files(self) -> tuple[str, ...]:
        """All its files, by path in the repository."""
        return (*self.more_files, self.file)

    @property
    def file_name(self) -> str:
        """Its file without folders."""
        return PurePosixPath(self.file).name

    @property
    def source_url(self) -> str:
        """Where a plain download comes from, a mirror named by the user included."""
        return os.environ.get(self.url_variable or "", "") or self.url


def _deit(name: str, folder: str) -> Row:
    return Row(
        name=name,
        kind="deit",
        what=f"DeiT-{name[-1].upper()}, ImageNet-1K 224 px",
        file=f"{folder}/checkpoint.pth",
        repo=WEIGHTS_REPO,
        arch=name,
    )


def _dit(name: str, what: str, file: str, steps: int, rope: dict[str, Any] | None = None) -> Row:
    return Row(
        name=name,
        kind="dit",
        what=what,
        file=file,
        repo=WEIGHTS_REPO,
        arch=name.partition("@")[0],
        steps=steps,
        rope=rope,
    )


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
    _deit("deit-s", "deit_small_patch16_LS_rms_rope"),
    _deit("deit-b", "deit_base_patch16_LS_rms_rope"),
    _deit("deit-l", "deit_large_patch16_LS_rms_rope"),
    _dit("dit-s2", "DiT-S/2, ImageNet 256 px", "dit_s2/0400000.pt", 400_000),
    _dit("dit-b2", "DiT-B/2, ImageNet 256 px", "dit_b2/0400000.pt", 400_000),
    _dit("dit-l2", "DiT-L/2, ImageNet 256 px", "dit_l2/0400000.pt", 400_000),
    _dit("dit-xl2@400k", "DiT-XL/2, ImageNet 256 px", "dit_xl2/0400000.pt", 400_000),
    # The name of this file is one digit short: it holds the weights of step 7 000 000. It is a
    # bare state dict, so that its RoPE options are known from the authors' run name alone.
    _dit(
        "dit-xl2@7m",
        "DiT-XL/2, best; its file name lacks a zero",
        "dit_xl2/0700000.pth",
        7_000_000,
        {"rotate": 4, "max_freq_lang": 1.5, "same_theta": False},
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
_BY_NAME = {row.name: row for row in ROWS}


def find(name: str) -> Row:
    """The row of that name.

    Raises:
        ConfigError: there is none; the nearest name is suggested.
    """
    wanted = name.strip().lower()
    wanted = ALIASES.get(wanted, wanted)
    if wanted in _BY_NAME:
        return _BY_NAME[wanted]
    near = difflib.get_close_matches(wanted, [*_BY_NAME, *ALIASES], n=1, cutoff=0.5)
    guess = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"{name} is not among the published weights",
        f"{guess}spiralrope fetch --list shows them all",
    )
