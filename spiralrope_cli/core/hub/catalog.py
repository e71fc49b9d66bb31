"""Published weights by name, one row each, and weights on the Hub. Standard library only."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from spiralrope_cli.core.config.hub import FILE_SUFFIXES, HUB, HUB_FORM
from spiralrope_cli.core.errors import ConfigError, FetchError
from spiralrope_cli.core.storage import MODEL_FILE

WEIGHTS_REPO = "haoyuliu00/Spiral_RoPE"
HUB_CONFIG, DIFFUSERS_FILE = "config.json", "diffusion_pytorch_model.safetensors"
DIFFUSERS_INDEX, TRANSFORMER_FOLDER = "model_index.json", "transformer"
INCEPTION_VARIABLE = "SPIRALROPE_INCEPTION_URL"
SHOWN_FILES = 6
_INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
_REFERENCES = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A published file, in a repository on the Hub or at a plain URL."""

    name: str  # published name, for all commands
    kind: str  # deit, dit, vae, inception, reference or data; network: a DeiT or DiT of anybody
    what: str  # description
    file: str  # path in the repository; for a plain URL the file name
    repo: str = ""
    more_files: tuple[str, ...] = ()  # further files of the repository
    revision: str | None = None  # branch, tag or commit; None: main
    listed: bool = False  # `file` may be a folder or empty: the list of the repository decides
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
    def folder_name(self) -> str:
        """The name as that of a folder."""
        return re.sub(r"[^\w.-]+", "-", self.name.removeprefix(HUB))

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
        file=DIFFUSERS_FILE,
        more_files=(HUB_CONFIG,),
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
    Row(
        name="cifar100",
        kind="data",
        what="CIFAR-100, for `--data cifar100`",
        file="cifar-100-python.tar.gz",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        url_variable="SPIRALROPE_CIFAR100_URL",
        sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    ),
    _reference(256, "VIRTUAL_imagenet256_labeled.npz"),
    _reference(512, "VIRTUAL_imagenet512.npz"),
)

ALIASES = {"dit-xl2": "dit-xl2@7m"}


def find_row(name: str) -> Row:
    """The row by name, or of weights on the Hub; an error suggests the nearest name."""
    if name.startswith(HUB):
        return hub_row(name)
    wanted = name.strip().lower()
    by_name = {row.name: row for row in ROWS}
    if row := by_name.get(ALIASES.get(wanted, wanted)):
        return row
    near = difflib.get_close_matches(wanted, [*by_name, *ALIASES], n=1, cutoff=0.5)
    guess = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"{name} is not a published name", f"{guess}spiralrope fetch --list shows all"
    )


def hub_row(given: str, kind: str = "network") -> Row:
    """The row of `hf:OWNER/NAME[/FILE][@REVISION]`.

    Options that files of the catalogue lack are known there; `listed_file` finds all other files.
    """
    place, at, revision = given.removeprefix(HUB).partition("@")
    owner, _, rest = place.partition("/")
    name, _, file = rest.partition("/")
    allowed = all(re.fullmatch(r"\w[\w.-]*", part) for part in (owner, name))
    if not allowed or bool(at) != bool(revision):
        raise ConfigError(
            f"{given} is not {HUB_FORM}", f"for example {HUB}{WEIGHTS_REPO}/dit_s2/0400000.pt"
        )
    repo, file = f"{owner}/{name}", file.strip("/")
    what = f"{file or 'weights'} of {repo}"
    own = Row(name=given, kind=kind, what=what, file=file, repo=repo, listed=True)
    known = (replace(row, name=given) for row in ROWS if (row.repo, row.file) == (repo, file))
    return replace(next(known, own), revision=revision or None)


def listed_file(row: Row, names: Collection[str]) -> Row:
    """A row with its files, out of the `names` in its repository."""
    below = f"{row.file}/" if row.file else ""
    weights = [n for n in names if n.endswith(FILE_SUFFIXES) and n.startswith(below)]
    usual = (DIFFUSERS_FILE, f"vae/{DIFFUSERS_FILE}")
    if row.kind != "vae":  # not the VAE of a pipeline either, where that alone is in the cache
        weights = [name for name in weights if not name.removeprefix(below).startswith("vae/")]
        usual = (MODEL_FILE, f"{TRANSFORMER_FOLDER}/{DIFFUSERS_FILE}")
    first = [below + name for name in usual if below + name in weights]
    found = [row.file] if row.file in names else first[:1] or weights
    if len(found) != 1:
        shown = found or sorted(n for n in names if n.endswith(FILE_SUFFIXES)) or sorted(names)
        more = f" and {len(shown) - SHOWN_FILES} more" if len(shown) > SHOWN_FILES else ""
        have = f"{', '.join(shown[:SHOWN_FILES])}{more}"
        if found:
            raise FetchError(f"{row.name} holds several files of weights", f"name one of {have}")
        what = f"no file {row.file}" if row.file else "no weights"
        raise FetchError(f"{row.name}: {row.repo} has {what}", f"it has {have or 'no file'}")
    beside = str(PurePosixPath(found[0]).with_name(HUB_CONFIG))
    return replace(row, file=found[0], more_files=(beside,) if row.kind == "vae" else ())
