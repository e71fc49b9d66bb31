"""The output folder of `dit-sample`.

OUT/samples.json        options and weights, written before the first image
OUT/samples.npz.part    the images so far, each at its final offset
OUT/samples.done        one byte per image: 1 if it is written
OUT/samples.npz         `arr_0`, uint8 [N, H, W, 3]: the part file, complete and renamed
OUT/samples.png         grid of the first images
OUT/png/000000.png      every image, with --png
"""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from spiralrope_cli.core.data.image_sets import names_of
from spiralrope_cli.core.data.images import image_grid
from spiralrope_cli.core.data.npz import read_headers, stream_rows
from spiralrope_cli.core.errors import CheckpointError
from spiralrope_cli.core.runtime.progress import say
from spiralrope_cli.core.runtime.run_folder import differences
from spiralrope_cli.core.runtime.seeds import drawn_class
from spiralrope_cli.core.storage import (
    METADATA_FILE,
    NPZ_FILE,
    PART_FILE,
    SAMPLES_FILE,
    atomic_write,
    flush,
    parse,
    write_whole,
)

DONE_FILE, PNG_FOLDER = "samples.done", "png"
GRID_IMAGES = 64
CHUNK = 1 << 22
SAY_ABOVE = 1 << 30
"""For more bytes than this, a line says that the checksum is being computed."""
FREE_TO_DIFFER = ("made_by", "source", "versions", "trained", "data", "num_classes", "class_names")
"""Metadata that may differ between two runs of the same images, or that the weights decide."""


class SampleFiles:
    """The files of one sampling run: `num` images of `size` (H, W) in `folder`."""

    def __init__(self, folder: Path, num: int, size: tuple[int, int]) -> None:
        self.folder, self.num, self.size = folder, num, size
        self.npz, self.grid = folder / NPZ_FILE, folder / SAMPLES_FILE
        self._part, self._done = folder / PART_FILE, folder / DONE_FILE
        self._image_bytes = 3 * size[0] * size[1]
        array_header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            array_header, {"descr": "|u1", "fortran_order": False, "shape": (num, *size, 3)}
        )
        self._array_header = array_header.getvalue()
        # 50 000 images must not be on the disk twice, so each is written at its final offset. The
        # zip stores `arr_0` uncompressed after two headers, whose length is known in advance. When
        # all images are written, `finish` adds these headers, which contain the checksum, and the
        # central directory at the end.
        self._start = len(self._headers(self._entry(checksum=0)))
        self._end = self._start + num * self._image_bytes

    def _entry(self, checksum: int) -> zipfile.ZipInfo:
        """The entry of `arr_0`, as `zipfile` would make it, with known sizes and checksum."""
        entry = zipfile.ZipInfo("arr_0.npy")  # its date is fixed: equal images, equal files
        entry.external_attr = 0o600 << 16
        entry.header_offset, entry.CRC = 0, checksum
        entry.file_size = len(self._array_header) + self.num * self._image_bytes
        entry.compress_size = entry.file_size
        return entry

    def _headers(self, entry: zipfile.ZipInfo) -> bytes:
        """The bytes before the first image: header of the zip entry, header of the array."""
        return entry.FileHeader(zip64=True) + self._array_header

    def png(self, index: int) -> Path:
        digits = max(6, len(str(self.num - 1)))
        return self.folder / PNG_FOLDER / f"{index:0{digits}d}.png"

    def bytes_needed(self, png: bool) -> int:
        """Bytes that are still to be written; `png` adds one file per image."""
        all_images = self.num * self._image_bytes
        written = self._part.stat().st_blocks * 512 if self._part.exists() else 0
        needed = 0 if self.npz.exists() else all_images - written
        return needed + (all_images if png else 0)

    def check_same(self, metadata: dict[str, Any]) -> None:
        """Raises if the folder holds images of other weights or options."""
        before = read_metadata(self.folder)
        if before is None:
            if self.npz.exists():
                raise CheckpointError(
                    f"{self.npz} exists, but {METADATA_FILE} is missing: its options are unknown",
                    "give this run another --name or --out",
                )
            return
        again = (
            f"remove {self.folder} to sample again, or use another folder: "
            f"spiralrope dit-sample {metadata['source']} --out FOLDER"
        )
        digests = [str(each.get("sha256"))[:12] for each in (before, metadata)]
        if digests[0] != digests[1]:
            raise CheckpointError(
                f"{self.folder} holds samples of other weights: "
                f"sha256 {digests[0]}, now {digests[1]}",
                again,
            )
        known = {**before, **before.get("rope", {})}
        values = {**metadata, **metadata.get("rope", {})}
        if differing := differences(known, values, (*FREE_TO_DIFFER, "rope")):
            message = f"{self.folder} holds other samples: {differing}"
            raise CheckpointError(message, f"repeat those options, {again}")

    def finished(self, png: bool) -> bool:
        """Whether all files are there; `png` asks for one file per image too."""
        return self.npz.exists() and self.grid.exists() and not (png and self.missing_pngs())

    def begin(self, metadata: dict[str, Any]) -> None:
        """Creates the files, unless an earlier run did."""
        if self.npz.exists():
            return
        part, done = self._part, self._done
        known = (self.folder / METADATA_FILE).exists()  # else the options of the part are unknown
        whole = part.is_file() and part.stat().st_size >= self._end
        write_whole(self.folder / METADATA_FILE, json.dumps(metadata, indent=2))
        if not (known and whole and done.is_file() and done.stat().st_size == self.num):
            with part.open("wb") as file:
                file.truncate(self._end)
            write_whole(done, bytes(self.num))

    def missing(self) -> list[int]:
        """Numbers of the missing images, ascending."""
        if self.npz.exists():
            return []
        if not (self._done.is_file() and (self.folder / METADATA_FILE).exists()):
            return list(range(self.num))
        done = np.frombuffer(self._done.read_bytes(), dtype=np.uint8)
        return np.flatnonzero(done == 0).tolist()

    def put(self, indices: Sequence[int], images: Tensor) -> None:
        """Writes images [B, 3, H, W] uint8 at their offsets."""
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        # Not a memory map: its pages would count as memory of this process.
        with self._part.open("r+b") as file:
            for index, image in zip(indices, pixels, strict=True):
                file.seek(self._start + index * self._image_bytes)
                file.write(image.tobytes())
            file.flush()
            os.fsync(file.fileno())  # before the images are marked as done
        with self._done.open("r+b") as file:
            for index in indices:
                file.seek(index)
                file.write(b"\x01")

    def finish(self, metadata: dict[str, Any]) -> None:
        """Completes the `.npz`; after an interruption it can be called again."""
        if not self.npz.exists():
            if self._end > SAY_ABOVE:
                say("all images are sampled; computing the checksum of the archive")
            os.truncate(self._part, self._end)  # a killed run may have written the directory
            entry = self._entry(self._checksum())
            with self._part.open("r+b") as file:
                file.write(self._headers(entry))
                file.seek(self._end)
                # Writes only the central directory, at the end of the file.
                with zipfile.ZipFile(file, "w") as archive:
                    archive.comment = _comment(metadata)
                    archive.filelist.append(entry)
            flush(self._part)
            os.replace(self._part, self.npz)
        for path in (self._part, self._done):
            path.unlink(missing_ok=True)

    def _checksum(self) -> int:
        """CRC-32 of the array: header and images."""
        checksum = zlib.crc32(self._array_header)
        with self._part.open("rb") as file:
            file.seek(self._start)
            while chunk := file.read(CHUNK):
                checksum = zlib.crc32(chunk, checksum)
        return checksum

    def _images(self, part: range, at_once: int) -> Iterator[np.ndarray]:
        """Finished images in batches [B, H, W, 3] uint8."""
        return stream_rows(self.npz, "arr_0", read_headers(self.npz)["arr_0"], part, at_once)

    def write_grid(self, metadata: dict[str, Any]) -> None:
        """Writes a grid of the first images, with the metadata in the PNG."""
        count = min(self.num, GRID_IMAGES)
        (first,) = self._images(range(count), count)
        grid = image_grid(torch.from_numpy(first).permute(0, 3, 1, 2))
        _save_png(grid, self.grid, metadata)

    def missing_pngs(self) -> int:
        """Number of images without a PNG file."""
        folder = self.folder / PNG_FOLDER
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        return sum(self.png(index).name not in there for index in range(self.num))

    def write_pngs(self, metadata: dict[str, Any], part: range) -> Iterator[int]:
        """Writes the missing PNG files of a part, and yields the number of each."""
        (self.folder / PNG_FOLDER).mkdir(exist_ok=True)
        # In every file, a thousand names would be longer than all else.
        metadata = {name: value for name, value in metadata.items() if name != "class_names"}
        for index, image in zip(part, self._images(part, 1), strict=True):
            path = self.png(index)
            if not path.exists():
                _save_png(Image.fromarray(image[0]), path, {**metadata, "index": index})
                yield index


def _comment(metadata: dict[str, Any]) -> bytes:
    """Metadata as the comment of a zip, without lists of classes if they are too long."""
    for name in ("class_names", "classes"):
        if name in metadata and len(json.dumps(metadata)) >= zipfile.ZIP_MAX_COMMENT:
            metadata = {**metadata, name: f"{len(metadata[name])} classes"}
    return json.dumps(metadata).encode()


def npz_metadata(npz: Path) -> dict[str, Any]:
    """Metadata of the samples in an `.npz`; empty if it has none."""
    try:
        with zipfile.ZipFile(npz) as archive:
            return dict(parse(archive.comment or b"{}"))
    except (OSError, ValueError, TypeError, zipfile.BadZipFile):
        return {}


def read_metadata(folder: Path) -> dict[str, Any] | None:
    """Metadata of the samples in a folder; None if there are none."""
    path = folder / METADATA_FILE
    if not path.exists():
        return None
    try:
        return dict(parse(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read", "choose another --out") from error


def sample_labels(metadata: dict[str, Any], part: range) -> list[str]:
    """The class of each sample, by name if it has one; empty if the metadata lacks them."""
    classes, num_classes = metadata.get("classes"), metadata.get("num_classes", 0)
    if isinstance(classes, str) or not (classes or num_classes):  # a str: too many for the archive
        return []
    if classes:
        numbers = [classes[number % len(classes)] for number in part]
    else:
        numbers = [drawn_class(metadata["seed"], num_classes, number) for number in part]
    stored = metadata.get("class_names", ())
    names = names_of(
        metadata.get("data", ""), num_classes, stored if isinstance(stored, list) else ()
    )
    return [names[number] if number < len(names) else str(number) for number in numbers]


def _save_png(image: Image.Image, path: Path, metadata: dict[str, Any]) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("spiralrope", json.dumps(metadata))
    with atomic_write(path, sole=True) as beside:
        image.save(beside, "png", pnginfo=text)
