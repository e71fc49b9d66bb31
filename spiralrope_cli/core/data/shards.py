"""The headers of cached latents. No torch, so that errors come early.

FOLDER/00000.safetensors    `plain` and `mirrored` [n, 2, L, h, w] float32, `labels` [n] int64. In
                            the dimension of 2: mean and standard deviation of the posterior, not
                            scaled. The metadata holds the plan, which is the same for all shards,
                            skipped images, and a checksum.

A cache is complete when it has all shards of its plan.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from spiralrope_cli.core.config.dit_runs import LATENT_CHANNELS, LATENT_SCALE, VAE_FACTOR
from spiralrope_cli.core.config.models import format_size
from spiralrope_cli.core.errors import ConfigError, DataError
from spiralrope_cli.core.storage import own_folder, parse

CROP = "adm-centre"
METADATA_KEY = "latents"
"""One key with JSON: safetensors does not sort several keys, so equal caches could differ."""

TENSORS = ("plain", "mirrored", "labels")
LARGEST_SHARD, SMALLEST_SHARD, WANTED_SHARDS = 1024, 16, 64


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """The options of a cache, the same for all its shards."""

    data: str  # folder or archive of the images
    class_names: tuple[str, ...]  # by class number
    num_files: int  # number of images in that folder
    files_sha256: str  # of their relative paths, in order
    image_size: tuple[int, int]  # (height, width) in pixels
    crop: str = CROP  # how images get this size
    vae: str  # `ema`, `mse`, or the absolute path of its folder
    vae_sha256: str  # of its weights file; empty for a published VAE before the download
    scale: float = LATENT_SCALE  # factor of latents for a DiT
    precision: str = "float32"  # of the VAE
    shard_size: int  # images per shard; the last shard, and shards with skipped images, have fewer

    @property
    def num_shards(self) -> int:
        return -(-self.num_files // self.shard_size)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, rows, columns) of the latents of an image."""
        height, width = self.image_size
        return LATENT_CHANNELS, height // VAE_FACTOR, width // VAE_FACTOR

    @property
    def bytes_per_image(self) -> int:
        """Mean and standard deviation in float32, plain and flipped, and the label."""
        channels, rows, columns = self.latent_shape
        return 2 * 2 * 4 * channels * rows * columns + 8

    def files_of(self, shard: int) -> range:
        """Indices of the image files of a shard."""
        first = shard * self.shard_size
        return range(first, min(first + self.shard_size, self.num_files))


def shard_size_for(num_files: int) -> int:
    """Images per shard: few large shards, but enough of them for several processes."""
    return min(LARGEST_SHARD, max(SMALLEST_SHARD, -(-num_files // WANTED_SHARDS)))


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The metadata of one shard."""

    number: int  # also its file name
    plan: CachePlan
    count: int  # number of images
    unreadable: dict[str, str]  # path -> reason, skipped images
    crc32: str = ""  # of metadata and tensors, eight hexadecimal digits

    @property
    def file(self) -> str:
        return shard_file(self.number)

    @property
    def num_bytes(self) -> int:
        """Size without the header."""
        return self.count * self.plan.bytes_per_image


def shard_file(number: int) -> str:
    return f"{number:05d}.safetensors"


@dataclass(frozen=True)
class CacheMetadata:
    """Plan and shards of a complete cache, without the latents."""

    folder: Path
    plan: CachePlan
    shards: tuple[Shard, ...]

    @property
    def count(self) -> int:
        return sum(shard.count for shard in self.shards)

    def check_fits(self, image_size: tuple[int, int], vae: str) -> None:
        """Raises if a run has another image size (height, width) or VAE."""
        plan = self.plan
        if image_size != plan.image_size:
            ours, theirs = map(format_size, (image_size, plan.image_size))
            raise ConfigError(
                f"--latents {self.folder} are of {theirs} px images, but --image-size is {ours}",
                "leave --image-size out, or encode again with spiralrope dit-encode",
            )
        if vae != plan.vae:
            raise ConfigError(
                f"--latents {self.folder} were made with --vae {plan.vae}, not with {vae}",
                "leave --vae out, or encode again with spiralrope dit-encode",
            )


def read_cache(folder: Path) -> CacheMetadata:
    """The metadata of a cache; raises if a shard is missing or truncated."""
    shards, wrong = read_shards(folder)
    if not (shards or wrong):
        if kind := own_folder(folder)[0]:
            raise DataError(f"--latents {folder} is {kind}", "dit-encode makes a folder of latents")
        raise DataError(
            f"--latents {folder} holds no latents",
            "spiralrope dit-encode makes them; after an interruption run it again, and it resumes",
        )
    if not shards:
        raise damaged(folder, wrong)
    plan = next(iter(shards.values())).plan
    missing = (shard_file(number) for number in range(plan.num_shards) if number not in shards)
    bad = {file: wrong.get(file, "is missing") for file in missing}
    bad |= {s.file: "has other options than the first" for s in shards.values() if s.plan != plan}
    if bad:
        raise damaged(folder, bad)
    metadata = CacheMetadata(folder, plan, tuple(shards.values()))
    if not metadata.count:
        raise DataError(f"--latents {folder}: none of its {plan.num_files} images could be read")
    return metadata


def read_shards(folder: Path) -> tuple[dict[int, Shard], dict[str, str]]:
    """The shards of a folder by number, and file -> what is wrong with the others.

    Reads only headers, which also tell whether a file is truncated.
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
        raise ValueError("it is not a shard of latents, or is of another version")
    values = parse(metadata)
    plan = values["plan"]
    for name in ("class_names", "image_size"):
        plan[name] = tuple(plan[name])
    shard = Shard(**{**values, "plan": CachePlan(**plan)})
    shape = (shard.count, 2, *shard.plan.latent_shape)
    if shapes != [shape, shape, (shard.count,)] or path.name != shard.file:
        raise ValueError("its tensors do not fit its metadata")
    return shard


def damaged(folder: Path, wrong: dict[str, str]) -> DataError:
    """The error for shards that are missing or damaged."""
    file, what = next(iter(sorted(wrong.items())))
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return DataError(
        f"latents {folder / file} {what}{more}",
        "run the same spiralrope dit-encode command again: it encodes only these shards again",
    )
