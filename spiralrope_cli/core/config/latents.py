"""Cached latents in words: the run that makes them, and the manifest that says what they are.

Standard library only, so that a cache that does not fit shows before any worker starts.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from spiralrope_cli.core.config.datasets import BUILT_IN, class_folders, class_names
from spiralrope_cli.core.config.models import SIZE
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
MANIFEST_FILE = "manifest.json"
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
    batch_size: Annotated[int, Opt("Images at a time per process.", MACHINE, ge=1)] = 16
    machine: MachineConfig = field(default_factory=MachineConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        check_image_size(self.image_size)


def check_image_size(image_size: tuple[int, int]) -> None:
    """Refuses images that do not give whole latents.

    Raises:
        ConfigError: says what the sides must be.
    """
    if any(side < VAE_FACTOR or side % VAE_FACTOR for side in image_size):
        height, width = image_size
        raise ConfigError(
            f"--image-size {height}x{width}: the VAE needs sides that {VAE_FACTOR} divides",
            "the nearest: "
            + "x".join(str(max(1, round(s / VAE_FACTOR)) * VAE_FACTOR) for s in image_size),
        )


def class_folder(data: str) -> Path:
    """The folder with one folder of images per class: `data` itself, or its `train/`.

    Raises:
        DataError: no such folder, or one without class folders.
    """
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
    """What a cache is of; every shard of it is made after the same plan.

    Attributes:
        data: the class folder.
        class_names: by class number.
        num_files: images found there.
        files_sha256: of their paths below that folder, in order.
        image_size: (height, width) in pixels.
        crop: how they are brought to that size.
        vae: `ema`, `mse`, or the whole path of its folder.
        vae_sha256: of its weights file; empty for a published VAE that is not here yet.
        scale: what latents are multiplied by.
        precision: the VAE computed in.
        shard_size: images in a shard, but for the last and for unreadable ones.
    """

    data: str
    class_names: tuple[str, ...]
    num_files: int
    files_sha256: str
    image_size: tuple[int, int]
    crop: str = CROP
    vae: str
    vae_sha256: str
    scale: float = LATENT_SCALE
    precision: str = "float32"
    shard_size: int

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
    """One file of a cache.

    Attributes:
        file: its name.
        count: images in it.
        size: in bytes.
        crc32: of the whole file, eight hexadecimal digits.
        unreadable: path -> reason of the images that were left out.
    """

    file: str
    count: int
    size: int
    crc32: str
    unreadable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """A whole cache: the plan it was made after, and its shards in order."""

    folder: Path
    plan: CachePlan
    shards: tuple[Shard, ...]

    @property
    def count(self) -> int:
        """Images."""
        return sum(shard.count for shard in self.shards)

    def check_fits(self, image_size: tuple[int, int], vae: str) -> None:
        """Refuses latents that are not those of the run.

        Args:
            image_size: the run's, (height, width).
            vae: the run's, `ema`, `mse` or the whole path of its folder.

        Raises:
            ConfigError: names both sides.
        """
        plan = self.plan
        if image_size != plan.image_size:
            ours, theirs = (f"{h}x{w}" for h, w in (image_size, plan.image_size))
            raise ConfigError(
                f"--latents {self.folder} are of {theirs} px images, --image-size is {ours}",
                "leave --image-size out, or encode the images anew by spiralrope dit-encode",
            )
        if vae != plan.vae:
            raise ConfigError(
                f"--latents {self.folder} were made with --vae {plan.vae}, not with {vae}",
                "leave --vae out, or encode the images anew by spiralrope dit-encode",
            )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a whole cache, whose shards are all there in their right sizes.

    Raises:
        DataError: no cache, an unfinished one, or one with a missing or truncated shard.
    """
    manifest = load_manifest(folder)
    if wrong := wrong_sizes(folder, manifest.shards):
        raise damaged(folder, wrong)
    return manifest


def load_manifest(folder: Path) -> Manifest:
    """The manifest alone.

    Raises:
        DataError: there is none, or it is damaged.
    """
    path = folder / MANIFEST_FILE
    try:
        content = json.loads(path.read_text())
        shards = tuple(Shard(**shard) for shard in content["shards"])
        return Manifest(folder, plan_from(content), shards)
    except FileNotFoundError as error:
        raise DataError(
            f"--latents {folder} has no {MANIFEST_FILE}",
            "spiralrope dit-encode writes it when all images are encoded; the same command again "
            "goes on with an interrupted cache",
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        hint = "remove it; the same spiralrope dit-encode command then encodes all images again"
        raise DataError(f"{path} is damaged, or of another version: {error}", hint) from error


def plan_from(content: dict[str, Any]) -> CachePlan:
    """The plan in what a manifest holds."""
    values = {each.name: content[each.name] for each in dataclasses.fields(CachePlan)}
    for name in ("class_names", "image_size"):
        values[name] = tuple(values[name])
    return CachePlan(**values)


def wrong_sizes(folder: Path, shards: tuple[Shard, ...]) -> dict[str, str]:
    """File -> what is wrong, by a look at the folder alone."""
    try:
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from error
    return {
        shard.file: f"has {sizes[shard.file]} bytes, not {shard.size}"
        if shard.file in sizes
        else "is missing"
        for shard in shards
        if sizes.get(shard.file) != shard.size
    }


def damaged(folder: Path, wrong: dict[str, str]) -> DataError:
    """The error for shards that are not what the manifest says."""
    file, what = next(iter(wrong.items()))
    more = f" (and {len(wrong) - 1} more are wrong)" if len(wrong) > 1 else ""
    return DataError(
        f"latents {folder / file} {what}{more}",
        "the same spiralrope dit-encode command encodes again what is wrong, and only that",
    )
