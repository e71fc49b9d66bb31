"""The two sides of a comparison before anything of them is computed: what they hold.

Standard library and numpy alone, so that what is wrong with them shows before torch is loaded.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spiralrope_cli.core.config.datasets import IMAGE_SUFFIXES, images_below
from spiralrope_cli.core.data.npz import Header, read_array, read_headers
from spiralrope_cli.core.errors import DataError

POOL_SIZE, SPATIAL_SIZE = 2048, 2023
STATISTICS = {"fid": ("mu", "sigma", POOL_SIZE), "sfid": ("mu_s", "sigma_s", SPATIAL_SIZE)}
"""Figure -> names of mean and covariance in a file, as ADM's reference batches have, and size."""


@dataclass(frozen=True)
class FolderInput:
    """A folder of images: all files below it with an image's suffix, sorted by path."""

    path: Path
    files: list[str] = field(repr=False)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def size_words(self) -> str:
        """How large the images are, in words."""
        return ""


@dataclass(frozen=True)
class NpzImages:
    """The images of an `.npz`: `arr_0`, [N, h, w, 3] uint8."""

    path: Path
    header: Header

    def __len__(self) -> int:
        return self.header.shape[0]

    @property
    def size_words(self) -> str:
        """How large the images are, in words."""
        return f" of {self.header.shape[1]}x{self.header.shape[2]}"


ImageInput = FolderInput | NpzImages


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        role: SAMPLES or REFERENCE.
        path: as it was given.
        images: where its images are; None without images.
        stored: figures whose statistics it holds.
        num: images that count; None where nobody knows.
        protocol: by which its statistics were made, empty if unknown.
        needed: what its images must be looked at for: of `fid`, `sfid`, `is`, `features`.
    """

    role: str
    path: Path
    images: ImageInput | None
    stored: tuple[str, ...]
    num: int | None
    protocol: str = ""
    needed: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """What it holds, for the table."""
        parts = [f"statistics for {' and '.join(self.stored)}"] if self.stored else []
        if self.images is not None:
            count = f"{self.num:,}"
            of = f" (of {len(self.images):,})" if self.num != len(self.images) else ""
            parts.append(f"{count}{of} images{self.images.size_words}")
        else:
            parts.append(
                "an unknown number of images" if self.num is None else f"{self.num:,} images"
            )
        return (", " if self.images is not None else " of ").join(parts)


def look_at(path: Path, role: str, num: int = 0) -> Side:
    """What is in a folder or file.

    Args:
        path: of the folder or the `.npz`.
        role: SAMPLES or REFERENCE, for messages.
        num: how many of its images count, 0 for all.

    Raises:
        DataError: it is not there, is neither, is damaged, or holds too few images.
    """
    images, stored, count, protocol = _contents(path, role)
    if images is not None:
        count = _counted(len(images), role, path, num)
        if count != len(images):
            stored = ()  # they are of all images
    elif num and num != count:
        raise DataError(f"--num {num}: {role} {path} holds statistics, and not of {num} images")
    return Side(role, path, images, stored, count or None, protocol)


def images_in(path: Path, role: str) -> ImageInput:
    """The images of a folder or file, one at least.

    Raises:
        DataError: as `look_at`, or it holds statistics alone.
    """
    images, *_ = _contents(path, role)
    if images is None:
        raise DataError(f"{role} {path} holds statistics, and no images")
    if not len(images):
        raise DataError(f"{role} {path} holds no images: arr_0 is empty")
    return images


def _contents(path: Path, role: str) -> tuple[ImageInput | None, tuple[str, ...], int, str]:
    if path.is_dir():
        folder = FolderInput(path, list_images(path))
        return folder, (), len(folder), ""
    if not path.exists():
        raise DataError(f"{role} {path} does not exist", "it is a folder of images or an .npz file")
    if path.suffix == ".npz" or zipfile.is_zipfile(path):
        return _look_into(path)
    raise DataError(f"{role} {path} is neither a folder of images nor an .npz file")


def _counted(there: int, role: str, path: Path, num: int) -> int:
    if num > there:
        raise DataError(
            f"--num {num}: {role} {path} holds {there} images", "make more, or ask for fewer"
        )
    if (num or there) < 2:
        raise DataError(
            f"{role} {path} counts {num or there} image(s); a covariance needs 2 or more"
        )
    return num or there


def list_images(folder: Path) -> list[str]:
    """All images at any depth, in the order of their paths.

    Raises:
        DataError: there are none.
    """
    found = images_below(folder)
    if not found:
        raise DataError(f"{folder} holds no images", f"known suffixes: {' '.join(IMAGE_SUFFIXES)}")
    return found


def _look_into(path: Path) -> tuple[NpzImages | None, tuple[str, ...], int, str]:
    headers = read_headers(path)
    stored = tuple(figure for figure, (mean, _, _) in STATISTICS.items() if mean in headers)
    for figure in stored:
        _check_statistics(path, headers, figure)
    if "arr_0" in headers:
        _check_images(path, headers["arr_0"])
        images = NpzImages(path, headers["arr_0"])
        return images, stored, len(images), ""
    if not stored:
        raise DataError(
            f"{path} has no arr_0 and no mu: it holds {', '.join(list(headers)[:5])}",
            "images are called arr_0; statistics mu and sigma, mu_s and sigma_s",
        )
    count = int(_note(path, headers, "num_images", "iu") or 0)
    return None, stored, max(count, 0), str(_note(path, headers, "protocol", "U") or "")


def _note(path: Path, headers: dict[str, Header], name: str, kinds: str) -> Any:
    """A number or word that `--save-stats` wrote beside statistics; None where it did not."""
    header = headers.get(name)
    if header is None or header.shape or header.dtype.kind not in kinds:
        return None
    return read_array(path, name).item()


def _check_images(path: Path, header: Header) -> None:
    if header.dtype != np.uint8:
        raise DataError(
            f"{path}: arr_0 is {header.dtype}, and images are uint8 from 0 to 255",
            "convert them as they were meant, and round",
        )
    if len(header.shape) != 4 or header.shape[3] != 3 or 0 in header.shape[1:]:
        raise DataError(f"{path}: arr_0 has shape {header.shape}, and images are N x H x W x 3")
    if header.fortran_order:
        raise DataError(
            f"{path}: arr_0 lies in Fortran order and cannot be streamed",
            "save numpy.ascontiguousarray of it",
        )


def _check_statistics(path: Path, headers: dict[str, Header], figure: str) -> None:
    mean, covariance, size = STATISTICS[figure]
    if covariance not in headers:
        raise DataError(f"{path} has {mean} but no {covariance}")
    for name, shape in ((mean, (size,)), (covariance, (size, size))):
        if headers[name].shape != shape:
            raise DataError(
                f"{path}: {name} has shape {headers[name].shape}, and it must be {shape}",
                "they are statistics of other features",
            )
        if headers[name].dtype.kind != "f":
            raise DataError(f"{path}: {name} is {headers[name].dtype}, and it must be float")


def read_statistics(path: Path, figure: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D, D], float64.

    Raises:
        DataError: they are not finite, or no covariance.
    """
    mean_name, covariance_name, _ = STATISTICS[figure]
    mean = read_array(path, mean_name).astype(np.float64)
    covariance = read_array(path, covariance_name).astype(np.float64)
    for name, values in ((mean_name, mean), (covariance_name, covariance)):
        if not np.isfinite(values).all():
            raise DataError(
                f"{path}: {name} holds {np.size(values) - np.isfinite(values).sum()} "
                "values that are NaN or infinite"
            )
    scale = np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > 1e-5 * scale or covariance.diagonal().min() < 0:
        raise DataError(
            f"{path}: {covariance_name} is no covariance, as it is not symmetric "
            "or has negative variances"
        )
    return mean, covariance
