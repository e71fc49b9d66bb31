"""Where samples lie while they are made, and the files that they become.

OUT/samples.json        what makes them, written before the first
OUT/samples.npz.part    all images, each at its place, while not all are there
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
from spiralrope_cli.core.data.images import picture_grid
from spiralrope_cli.core.data.npz import read_headers, stream_rows
from spiralrope_cli.core.errors import CheckpointError
from spiralrope_cli.core.runtime.run_folder import (
    NPZ_FILE,
    SAMPLES_FILE,
    differences,
    refuse_run,
)

FACTS_FILE, PART_FILE, DONE_FILE = "samples.json", "samples.npz.part", "samples.done"
PNG_FOLDER = "png"
GRID_IMAGES = 64
CHUNK = 1 << 22
FREE_TO_DIFFER = ("made_by", "source", "versions", "trained", "data", "num_classes")
"""What may change between two runs that go on with the same images, or follows from the weights."""


class SampleFiles:
    """The files of one run of sampling.

    Args:
        folder: OUT.
        num: N.
        size: (H, W).
    """

    def __init__(self, folder: Path, num: int, size: tuple[int, int]) -> None:
        self.folder, self.num, self.size = folder, num, size
        self._image_bytes = 3 * size[0] * size[1]
        array_header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            array_header, {"descr": "|u1", "fortran_order": False, "shape": (num, *size, 3)}
        )
        self._array_header = array_header.getvalue()
        # 50 000 images must not be on the disk twice: they are put where the archive will have
        # them, and finishing it writes what stands before them, as long whatever it says, and
        # what follows them.
        self._start = len(self._head(self._entry(checksum=0)))
        self._end = self._start + num * self._image_bytes

    def _entry(self, checksum: int) -> zipfile.ZipInfo:
        """The array as the archive lists it, as `zipfile` does but for its sizes, known before."""
        entry = zipfile.ZipInfo("arr_0.npy")  # its date is fixed: equal images, equal files
        entry.external_attr = 0o600 << 16
        entry.header_offset, entry.CRC = 0, checksum
        entry.file_size = len(self._array_header) + self.num * self._image_bytes
        entry.compress_size = entry.file_size
        return entry

    def _head(self, entry: zipfile.ZipInfo) -> bytes:
        """What stands before the first image."""
        return entry.FileHeader(zip64=True) + self._array_header

    @property
    def npz(self) -> Path:
        """The result."""
        return self.folder / NPZ_FILE

    @property
    def grid(self) -> Path:
        """The picture to look at."""
        return self.folder / SAMPLES_FILE

    def png(self, index: int) -> Path:
        """File of one image."""
        digits = max(6, len(str(self.num - 1)))
        return self.folder / PNG_FOLDER / f"{index:0{digits}d}.png"

    def bytes_needed(self, png: bool) -> int:
        """What is still to be written, with a file for every image if asked for."""
        all_images, part = self.num * self._image_bytes, self.folder / PART_FILE
        here_already = part.stat().st_blocks * 512 if part.exists() else 0
        needed = 0 if self.npz.exists() else all_images - here_already
        return needed + (all_images if png else 0)

    def check_same(self, facts: dict[str, Any]) -> None:
        """Refuses to go on in a folder that holds other images.

        Args:
            facts: what is to make the images.

        Raises:
            CheckpointError: names the first options that differ, with both values.
        """
        refuse_run(self.folder)
        another, before = "give this run another --name or --out", read_facts(self.folder)
        if before is None:
            if self.npz.exists():
                message = f"{self.npz} is there, and no {FACTS_FILE} says what made it"
                raise CheckpointError(message, another)
            return
        digests = [str(each.get("sha256"))[:12] for each in (before, facts)]
        if digests[0] != digests[1]:
            raise CheckpointError(
                f"{self.folder} holds samples of other weights: "
                f"sha256 {digests[0]}, now {digests[1]}",
                another,
            )
        if differing := differences(before, facts, FREE_TO_DIFFER):
            raise CheckpointError(
                f"{self.folder} holds other samples: {differing}",
                f"repeat those options, or {another}",
            )

    def finished(self, png: bool) -> bool:
        """Whether nothing is left to do, with a file for every image if asked for."""
        return self.npz.exists() and self.grid.exists() and not (png and self.missing_pngs())

    def begin(self, facts: dict[str, Any]) -> None:
        """Makes the files for all images, unless an earlier run did."""
        if self.npz.exists():
            return
        part, done = self.folder / PART_FILE, self.folder / DONE_FILE
        known = (self.folder / FACTS_FILE).exists()  # else nobody knows what the parts are of
        whole = part.is_file() and part.stat().st_size >= self._end
        write_whole(self.folder / FACTS_FILE, json.dumps(facts, indent=2))
        if not (known and whole and done.is_file() and done.stat().st_size == self.num):
            with part.open("wb") as file:
                file.truncate(self._end)
            write_whole(done, bytes(self.num))

    def missing(self) -> list[int]:
        """Images that are not there yet, in order."""
        if self.npz.exists():
            return []
        path = self.folder / DONE_FILE
        if not path.is_file():
            return list(range(self.num))
        done = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        return np.flatnonzero(done == 0).tolist()

    def put(self, indices: Sequence[int], levels: Tensor) -> None:
        """Writes images at their places: [B, 3, H, W] uint8."""
        pixels = levels.permute(0, 2, 3, 1).contiguous().numpy()
        # Plain writes: pages of a mapped file would count as this process's memory.
        with (self.folder / PART_FILE).open("r+b") as file:
            for index, image in zip(indices, pixels, strict=True):
                file.seek(self._start + index * self._image_bytes)
                file.write(image.tobytes())
            file.flush()
            os.fsync(file.fileno())  # whatever happens, what is marked as done is there
        with (self.folder / DONE_FILE).open("r+b") as file:
            for index in indices:
                file.seek(index)
                file.write(b"\x01")

    def finish(self, facts: dict[str, Any]) -> None:
        """Makes the file of the parts the `.npz`; ended at any moment, it can be done again."""
        part = self.folder / PART_FILE
        if not self.npz.exists():
            os.truncate(part, self._end)  # a killed run may have come to what follows the images
            entry = self._entry(self._checksum(part))
            with part.open("r+b") as file:
                file.write(self._head(entry))
                file.seek(self._end)
                # What it writes here, where the file is, is the list of its entries.
                with zipfile.ZipFile(file, "w") as archive:
                    archive.comment = _comment(facts)
                    archive.filelist.append(entry)
            flush(part)
            os.replace(part, self.npz)
        for path in (part, self.folder / DONE_FILE):
            path.unlink(missing_ok=True)

    def _checksum(self, part: Path) -> int:
        """Of the array, its header and all images."""
        checksum = zlib.crc32(self._array_header)
        with part.open("rb") as file:
            file.seek(self._start)
            while chunk := file.read(CHUNK):
                checksum = zlib.crc32(chunk, checksum)
        return checksum

    def _images(self, part: range, at_once: int) -> Iterator[np.ndarray]:
        """Finished images, [B, H, W, 3] uint8 at a time."""
        return stream_rows(self.npz, "arr_0", read_headers(self.npz)["arr_0"], part, at_once)

    def write_grid(self, facts: dict[str, Any]) -> None:
        """The first images as one picture that says what made it."""
        count = min(self.num, GRID_IMAGES)
        (first,) = self._images(range(count), count)
        grid = picture_grid(torch.from_numpy(first).permute(0, 3, 1, 2))
        _save_png(grid, self.grid, facts)

    def missing_pngs(self) -> int:
        """Images that have no file of their own yet."""
        folder = self.folder / PNG_FOLDER
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        return sum(self.png(index).name not in there for index in range(self.num))

    def write_pngs(self, facts: dict[str, Any], part: range) -> Iterator[int]:
        """Gives each image of a part its file, one after the other, and yields its number."""
        (self.folder / PNG_FOLDER).mkdir(exist_ok=True)
        for index, image in zip(part, self._images(part, 1), strict=True):
            path = self.png(index)
            if not path.exists():
                _save_png(Image.fromarray(image[0]), path, {**facts, "index": index})
                yield index


def _comment(facts: dict[str, Any]) -> bytes:
    """The facts as an archive can carry them, without a list of classes that is too long for it."""
    whole = json.dumps(facts).encode()
    if len(whole) < zipfile.ZIP_MAX_COMMENT:
        return whole
    return json.dumps({**facts, "classes": f"{len(facts['classes'])} classes"}).encode()


def facts_in(npz: Path) -> dict[str, Any]:
    """What made the samples of an `.npz`, empty where it does not tell."""
    try:
        with zipfile.ZipFile(npz) as archive:
            return dict(json.loads(archive.comment or b"{}"))
    except (OSError, ValueError, TypeError, zipfile.BadZipFile):
        return {}


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What made the samples in a folder, None where there are none.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / FACTS_FILE
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read", "choose another --out") from error


def _save_png(picture: Image.Image, path: Path, facts: dict[str, Any]) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("spiralrope", json.dumps(facts))
    with atomic_write(path, sole=True) as beside:
        picture.save(beside, "png", pnginfo=text)
