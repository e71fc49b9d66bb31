"""Cached latents in words: the run that makes them, and what the headers of their files say.

FOLDER/00000.safetensors    `plain` and `mirrored` [n, 2, L, h, w] float32, `labels` [n] int64; of
                            the dimension of 2, the first is the posterior's mean and the second its
                            standard deviation, not scaled. The metadata hold the plan that every
                            shard of the folder follows, images that were left out, and a checksum.

A cache is whole when all shards of its plan are there. No torch here, so that a cache that does
not fit shows before any worker starts.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from spiralrope_cli.core.config.datasets import BUILT_IN, class_folders, class_names
from spiralrope_cli.core.config.models import SIZE, format_size
from spiralrope_cli.core.config.option import DATA, MACHINE, PATH, RUN, Opt, check_fields
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.errors import ConfigError, DataError

VAE_NAMES = ("ema", "mse")
VAE_FACTOR = 8
"""Pixels of an image's side for each of its latents'."""

LATENT_CHANNELS = 4
LATENT_SCALE = 0.18215
"""DiT sees the VAE's latents times this."""

EXACT = "fp32"
"""Latents are made once and used for a whole training, so that the exact ones are worth it."""

CROP = "adm-centre"
METADATA_KEY = "latents"
"""One key with a JSON text: safetensors writes several in any order, and bytes would differ."""

TENSORS = ("plain", "mirrored", "labels")
LARGEST_SHARD, SMALLEST_SHARD, WANTED_SHARDS = 1024, 16, 64


@dataclass(frozen=True, kw_only=True)
class EncodeRun:
    """A run of `dit-encode`."""

    data: Annotated[
        str,
        Opt(
            "Folder with one folder of images per class, or with such a folder train/. "
            "Without it: $SPIRALROPE_DATA.",
            DATA,
            metavar="FOLDER",
        ),
    ]
    out: Annotated[str, Opt("Folder of the cache.", RUN, **PATH)] = "latents"
    vae: Annotated[
        str,
        Opt(
            "The VAE: ema, mse, or a folder as diffusers saves it.",
            DATA,
            metavar="ema|mse|FOLDER",
            complete="vaes",
        ),
    ] = "ema"
    image_size: Annotated[
        tuple[int, int], Opt("Side, or height x width, after the centre crop.", DATA, **SIZE)
    ] = (256, 256)
    batch_size: Annotated[int, Opt("Images per batch and process.", MACHINE, ge=1)] = 16
    machine: MachineConfig = field(default_factory=MachineConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        nearest = [max(1, round(side / VAE_FACTOR)) * VAE_FACTOR for side in self.image_size]
        if nearest != [*self.image_size]:
            raise ConfigError(
                f"--image-size {format_size(self.image_size)}: the VAE needs sides that "
                f"{VAE_FACTOR} divides",
                f"the nearest: {format_size(nearest)}",
            )


def class_folder(data: str) -> Path:
    """The folder with one folder of images per class: `data` itself, or its `train/`."""
    if data in BUILT_IN:
        raise DataError(
            f"--data {data} is too small for a VAE",
            "spiralrope dit-train trains on it in pixel space; dit-encode takes image folders",
        )
    root = Path(os.path.expanduser(data))
    if not root.is_dir():
        raise DataError(
            f"--data {data} is no folder", "it must hold one folder of images per class"
        )
    folder = class_folders(root)
    class_names(folder)
    return folder.resolve()


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """What a cache is of; every shard of it is made after the same plan."""

    data: str  # the class folder
    class_names: tuple[str, ...]  # by class number
    num_files: int  # images found there
    files_sha256: str  # of their paths below that folder, in order
    image_size: tuple[int, int]  # (height, width) in pixels
    crop: str = CROP  # how they are brought to that size
    vae: str  # `ema`, `mse`, or the whole path of its folder
    vae_sha256: str  # of its weights file; empty for a published VAE that is not here yet
    scale: float = LATENT_SCALE  # what latents are multiplied by
    precision: str = "float32"  # that the VAE computed in
    shard_size: int  # images in a shard, but for the last and for unreadable ones

    @property
    def num_shards(self) -> int:
        """Files of the cache."""
        return -(-self.num_files // self.shard_size)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of an image's latents."""
        height, width = self.image_size
        return LATENT_CHANNELS, height // VAE_FACTOR, width // VAE_FACTOR

    @property
    def bytes_per_image(self) -> int:
        """Mean and deviation in float32, plain and mirrored, and the label."""
        channels, rows, columns = self.latent_shape
        return 2 * 2 * 4 * channels * rows * columns + 8

    def files_of(self, shard: int) -> range:
        """Numbers of the image files that go into a shard."""
        first = shard * self.shard_size
        return range(first, min(first + self.shard_size, self.num_files))


def shard_size_for(num_files: int) -> int:
    """Images per shard: large ones for large sets, and enough of them to share out."""
    return min(LARGEST_SHARD, max(SMALLEST_SHARD, -(-num_files // WANTED_SHARDS)))


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What the metadata of one file say."""

    number: int  # which is its name
    plan: CachePlan
    count: int  # images in it
    unreadable: dict[str, str]  # path -> reason of the images that were left out
    crc32: str = ""  # of all that it holds, eight hexadecimal digits

    @property
    def file(self) -> str:
        """Its name in the folder."""
        return shard_file(self.number)

    @property
    def num_bytes(self) -> int:
        """Its size, but for the header."""
        return self.count * self.plan.bytes_per_image


def shard_file(number: int) -> str:
    """The name of a shard."""
    return f"{number:05d}.safetensors"


@dataclass(frozen=True)
class CacheMetadata:
    """A whole cache without its latents: the plan it was made after, and its shards in order."""

    folder: Path
    plan: CachePlan
    shards: tuple[Shard, ...]

    @property
    def count(self) -> int:
        """Images."""
        return sum(shard.count for shard in self.shards)

    def check_fits(self, image_size: tuple[int, int], vae: str) -> None:
        """Refuses latents of another image size (height, width) or VAE than a run has."""
        plan = self.plan
        if image_size != plan.image_size:
            ours, theirs = map(format_size, (image_size, plan.image_size))
            raise ConfigError(
                f"--latents {self.folder} are of {theirs} px images, --image-size is {ours}",
                "leave --image-size out, or encode the images anew by spiralrope dit-encode",
            )
        if vae != plan.vae:
            raise ConfigError(
                f"--latents {self.folder} were made with --vae {plan.vae}, not with {vae}",
                "leave --vae out, or encode the images anew by spiralrope dit-encode",
            )


def read_cache(folder: Path) -> CacheMetadata:
    """The metadata of a whole cache; one with a shard that is missing or cut is refused."""
    shards, wrong = read_shards(folder)
    if not (shards or wrong):
        raise DataError(
            f"--latents {folder} holds no latents",
            "spiralrope dit-encode makes them; the same command again goes on with an "
            "interrupted cache",
        )
    if not shards:
        raise damaged(folder, wrong)
    plan = next(iter(shards.values())).plan
    missing = (shard_file(number) for number in range(plan.num_shards) if number not in shards)
    bad = {file: wrong.get(file, "is missing") for file in missing}
    bad |= {s.file: "is of other options than the first" for s in shards.values() if s.plan != plan}
    if bad:
        raise damaged(folder, bad)
    metadata = CacheMetadata(folder, plan, tuple(shards.values()))
    if not metadata.count:
        raise DataError(f"--latents {folder}: none of its {plan.num_files} images could be read")
    return metadata


def read_shards(folder: Path) -> tuple[dict[int, Shard], dict[str, str]]:
    """The shards of a folder by number, and file -> what is wrong with the others.

    Only headers are read, which also show whether a file was cut.
    """
    from safetensors import SafetensorError

    shards: dict[int, Shard] = {}
    wrong: dict[str, str] = {}
    plans: dict[CachePlan, CachePlan] = {}  # one object for all shards: it names every class
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        names = []
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from error
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix == ".safetensors" and stem.isdigit():
            try:
                shard = _read_header(folder / name)
                plan = plans.setdefault(shard.plan, shard.plan)
                shards[shard.number] = dataclasses.replace(shard, plan=plan)
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                wrong[name] = f"is damaged: {error}"
    return shards, wrong


def _read_header(path: Path) -> Shard:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        metadata = (file.metadata() or {}).get(METADATA_KEY)
        shapes = [tuple(file.get_slice(name).get_shape()) for name in TENSORS]
    if not metadata:
        raise ValueError("it is no shard of latents, or of another version")
    values = json.loads(metadata)
    plan = values["plan"]
    for name in ("class_names", "image_size"):
        plan[name] = tuple(plan[name])
    shard = Shard(**{**values, "plan": CachePlan(**plan)})
    shape = (shard.count, 2, *shard.plan.latent_shape)
    if shapes != [shape, shape, (shard.count,)] or path.name != shard.file:
        raise ValueError("its latents are not those that its metadata describe")
    return shard


def damaged(folder: Path, wrong: dict[str, str]) -> DataError:
    """The error for shards that are missing or damaged."""
    file, what = next(iter(sorted(wrong.items())))
    more = f" (and {len(wrong) - 1} more are wrong)" if len(wrong) > 1 else ""
    return DataError(
        f"latents {folder / file} {what}{more}",
        "the same spiralrope dit-encode command encodes again what is wrong, and only that",
    )
