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
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from spiralrope_cli.core.atomic import atomic_write, flush, write_whole
from spiralrope_cli.core.data.grid import picture_grid
from spiralrope_cli.core.data.npz import read_headers, stream_rows
from spiralrope_cli.core.errors import CheckpointError
from spiralrope_cli.core.runtime.run_folder import SAMPLES_FILE

FACTS_FILE, PART_FILE, DONE_FILE = "samples.json", "samples.npz.part", "samples.done"
NPZ_FILE, PNG_FOLDER = "samples.npz", "png"
GRID_IMAGES = 64
CHUNK = 1 << 22


class SampleFiles:
    """The files of one run of sampling.

    Args:
        folder: OUT.
        num: N.
        size: (H, W).
    """

    def __init__(self, folder: Path, num: int, size: tuple[int, int]) -> None:
        self.folder, self.num, self.size = folder, num, size
        self._bytes = 3 * size[0] * size[1]
        self._array_head = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            self._array_head, {"descr": "|u1", "fortran_order": False, "shape": (num, *size, 3)}
        )
        with zipfile.ZipFile(head := io.BytesIO(), "w") as archive, _entry(archive):
            self._start = head.tell() + len(self._array_head.getvalue())

    @property
    def _end(self) -> int:
        return self._start + self.num * self._bytes

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
                file.seek(self._start + index * self._bytes)
                file.write(image.tobytes())
            file.flush()
            os.fsync(file.fileno())  # whatever happens, what is marked as done is there
        with (self.folder / DONE_FILE).open("r+b") as file:
            for index in indices:
                file.seek(index)
                file.write(b"\x01")

    def finish(self, facts: dict[str, Any]) -> None:
        """Makes the file of the parts the `.npz`: the disk never holds the images twice."""
        part = self.folder / PART_FILE
        if not self.npz.exists():
            self._write_frame(part, facts)
            flush(part)
            os.replace(part, self.npz)
        for path in (part, self.folder / DONE_FILE):
            path.unlink(missing_ok=True)

    def _write_frame(self, part: Path, facts: dict[str, Any]) -> None:
        """Writes what an archive has before and after its images, which are read for their sum."""
        os.truncate(part, self._end)  # a killed run may have come to what follows them
        with _Around(part, range(self._start, self._end)) as file, part.open("rb") as images:
            images.seek(self._start)
            with zipfile.ZipFile(file, "w") as archive:
                archive.comment = _comment(facts)
                with _entry(archive) as sink:
                    sink.write(self._array_head.getvalue())
                    shutil.copyfileobj(images, sink, CHUNK)

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


class _Around(io.BufferedRandom):
    """A file that keeps a range of its bytes: what is written from within it is passed over.

    Archives end themselves where an error finds them, which may be amid the images.
    """

    def __init__(self, path: Path, kept: range) -> None:
        super().__init__(io.FileIO(path, "r+"))
        self._kept = kept

    def write(self, data: Any) -> int:
        if self.tell() not in self._kept:
            return super().write(data)
        size = memoryview(data).nbytes
        self.seek(size, os.SEEK_CUR)
        return size


def _entry(archive: zipfile.ZipFile) -> IO[bytes]:
    """The array's place in a new archive; its date is fixed: equal images, equal files."""
    return archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True)


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
