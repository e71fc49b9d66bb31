"""The folder of `dit-sample`: images while they are drawn, and the archive that they become.

OUT/samples.json        what makes them, written before the first
OUT/samples.npz.part    all images, each at its place, while some are missing
OUT/samples.done        one byte per image, 1 where it is there
OUT/samples.npz         `arr_0`, uint8 [N, H, W, 3]: the same file, when all are there
OUT/samples.png         the first ones as a grid
OUT/png/000000.png      every image, where that is wanted
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

from spiralrope_cli.core.atomic import atomic_write, flush, write_whole
from spiralrope_cli.core.data.images import image_grid
from spiralrope_cli.core.data.npz import read_headers, stream_rows
from spiralrope_cli.core.errors import CheckpointError
from spiralrope_cli.core.runtime.progress import say
from spiralrope_cli.core.runtime.run_folder import (
    NPZ_FILE,
    SAMPLES_FILE,
    differences,
    refuse_run,
)

METADATA_FILE, PART_FILE, DONE_FILE = "samples.json", "samples.npz.part", "samples.done"
PNG_FOLDER = "png"
GRID_IMAGES = 64
CHUNK = 1 << 22
SAY_ABOVE = 1 << 30
"""Bytes of images whose checksum takes so long that a line announces it."""
FREE_TO_DIFFER = ("made_by", "source", "versions", "trained", "data", "num_classes")
"""Metadata that may change between two runs of the same images, or follows from the weights."""


class SampleFiles:
    """The files of one run of sampling: `num` images of `size` (H, W) in `folder`."""

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
        # 50 000 images must not be on the disk twice. So each is written where the finished archive
        # has it: a zip stores `arr_0` as it is, behind two headers whose length is known before.
        # When all images are there, `finish` writes the headers before them, which hold their
        # checksum, and the list of entries behind them.
        self._start = len(self._headers(self._entry(checksum=0)))
        self._end = self._start + num * self._image_bytes

    def _entry(self, checksum: int) -> zipfile.ZipInfo:
        """`arr_0` in the archive's list: as `zipfile` makes it, but with sizes that it is told."""
        entry = zipfile.ZipInfo("arr_0.npy")  # its date is fixed: equal images, equal files
        entry.external_attr = 0o600 << 16
        entry.header_offset, entry.CRC = 0, checksum
        entry.file_size = len(self._array_header) + self.num * self._image_bytes
        entry.compress_size = entry.file_size
        return entry

    def _headers(self, entry: zipfile.ZipInfo) -> bytes:
        """What stands before the first image: the header of the entry, and that of the array."""
        return entry.FileHeader(zip64=True) + self._array_header

    def png(self, index: int) -> Path:
        """File of one image."""
        digits = max(6, len(str(self.num - 1)))
        return self.folder / PNG_FOLDER / f"{index:0{digits}d}.png"

    def bytes_needed(self, png: bool) -> int:
        """What is still to be written, with a file for every image if asked for."""
        all_images = self.num * self._image_bytes
        written = self._part.stat().st_blocks * 512 if self._part.exists() else 0
        needed = 0 if self.npz.exists() else all_images - written
        return needed + (all_images if png else 0)

    def check_same(self, metadata: dict[str, Any]) -> None:
        """Refuses to go on in a folder that holds other images.

        Raises:
            CheckpointError: names the first options that differ, with both values.
        """
        refuse_run(self.folder)
        before = read_metadata(self.folder)
        if before is None:
            if self.npz.exists():
                raise CheckpointError(
                    f"{self.npz} is there, and no {METADATA_FILE} says what made it",
                    "give this run another --name or --out",
                )
            return
        again = (
            f"remove {self.folder} to draw again, or draw into another folder: "
            f"spiralrope dit-sample {metadata['source']} --out FOLDER"
        )
        digests = [str(each.get("sha256"))[:12] for each in (before, metadata)]
        if digests[0] != digests[1]:
            raise CheckpointError(
                f"{self.folder} holds samples of other weights: "
                f"sha256 {digests[0]}, now {digests[1]}",
                again,
            )
        if differing := differences(before, metadata, FREE_TO_DIFFER):
            message = f"{self.folder} holds other samples: {differing}"
            raise CheckpointError(message, f"repeat those options, {again}")

    def finished(self, png: bool) -> bool:
        """Whether nothing is left to do, with a file for every image if asked for."""
        return self.npz.exists() and self.grid.exists() and not (png and self.missing_pngs())

    def begin(self, metadata: dict[str, Any]) -> None:
        """Makes the files for all images, unless an earlier run did."""
        if self.npz.exists():
            return
        part, done = self._part, self._done
        known = (self.folder / METADATA_FILE).exists()  # else nobody knows what the parts are of
        whole = part.is_file() and part.stat().st_size >= self._end
        write_whole(self.folder / METADATA_FILE, json.dumps(metadata, indent=2))
        if not (known and whole and done.is_file() and done.stat().st_size == self.num):
            with part.open("wb") as file:
                file.truncate(self._end)
            write_whole(done, bytes(self.num))

    def missing(self) -> list[int]:
        """Images that are not there yet, in order."""
        if self.npz.exists():
            return []
        if not (self._done.is_file() and (self.folder / METADATA_FILE).exists()):
            return list(range(self.num))
        done = np.frombuffer(self._done.read_bytes(), dtype=np.uint8)
        return np.flatnonzero(done == 0).tolist()

    def put(self, indices: Sequence[int], images: Tensor) -> None:
        """Writes images at their places: [B, 3, H, W] uint8."""
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        # Plain writes: pages of a mapped file would count as this process's memory.
        with self._part.open("r+b") as file:
            for index, image in zip(indices, pixels, strict=True):
                file.seek(self._start + index * self._image_bytes)
                file.write(image.tobytes())
            file.flush()
            os.fsync(file.fileno())  # whatever happens, what is marked as done is there
        with self._done.open("r+b") as file:
            for index in indices:
                file.seek(index)
                file.write(b"\x01")

    def finish(self, metadata: dict[str, Any]) -> None:
        """Turns the part into the `.npz`; interrupted at any moment, it can be done again."""
        if not self.npz.exists():
            if self._end > SAY_ABOVE:
                say("all are drawn; their checksum is taken, for the archive")
            os.truncate(self._part, self._end)  # a killed run may have written the list of entries
            entry = self._entry(self._checksum())
            with self._part.open("r+b") as file:
                file.write(self._headers(entry))
                file.seek(self._end)
                # What it writes here, where the file is, is the list of its entries.
                with zipfile.ZipFile(file, "w") as archive:
                    archive.comment = _comment(metadata)
                    archive.filelist.append(entry)
            flush(self._part)
            os.replace(self._part, self.npz)
        for path in (self._part, self._done):
            path.unlink(missing_ok=True)

    def _checksum(self) -> int:
        """Of the array: its header and all images."""
        checksum = zlib.crc32(self._array_header)
        with self._part.open("rb") as file:
            file.seek(self._start)
            while chunk := file.read(CHUNK):
                checksum = zlib.crc32(chunk, checksum)
        return checksum

    def _images(self, part: range, at_once: int) -> Iterator[np.ndarray]:
        """Finished images, [B, H, W, 3] uint8 at a time."""
        return stream_rows(self.npz, "arr_0", read_headers(self.npz)["arr_0"], part, at_once)

    def write_grid(self, metadata: dict[str, Any]) -> None:
        """The first images as one that says what made it."""
        count = min(self.num, GRID_IMAGES)
        (first,) = self._images(range(count), count)
        grid = image_grid(torch.from_numpy(first).permute(0, 3, 1, 2))
        _save_png(grid, self.grid, metadata)

    def missing_pngs(self) -> int:
        """How many images have no file of their own yet."""
        folder = self.folder / PNG_FOLDER
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        return sum(self.png(index).name not in there for index in range(self.num))

    def write_pngs(self, metadata: dict[str, Any], part: range) -> Iterator[int]:
        """Gives each image of a part its file, one after the other, and yields its number."""
        (self.folder / PNG_FOLDER).mkdir(exist_ok=True)
        for index, image in zip(part, self._images(part, 1), strict=True):
            path = self.png(index)
            if not path.exists():
                _save_png(Image.fromarray(image[0]), path, {**metadata, "index": index})
                yield index


def _comment(metadata: dict[str, Any]) -> bytes:
    """Metadata as an archive can carry it: without a list of classes that is too long for it."""
    whole = json.dumps(metadata).encode()
    if len(whole) < zipfile.ZIP_MAX_COMMENT:
        return whole
    return json.dumps({**metadata, "classes": f"{len(metadata['classes'])} classes"}).encode()


def npz_metadata(npz: Path) -> dict[str, Any]:
    """What made the samples of an `.npz`, empty where it does not tell."""
    try:
        with zipfile.ZipFile(npz) as archive:
            return dict(json.loads(archive.comment or b"{}"))
    except (OSError, ValueError, TypeError, zipfile.BadZipFile):
        return {}


def read_metadata(folder: Path) -> dict[str, Any] | None:
    """What made the samples in a folder, None where there are none.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / METADATA_FILE
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read", "choose another --out") from error


def _save_png(image: Image.Image, path: Path, metadata: dict[str, Any]) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("spiralrope", json.dumps(metadata))
    with atomic_write(path, sole=True) as beside:
        image.save(beside, "png", pnginfo=text)
