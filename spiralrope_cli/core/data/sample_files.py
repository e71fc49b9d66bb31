"""Where samples lie while they are made, and the files that they become.

OUT/samples.json        what makes them, written before the first
OUT/samples.part.npy    all images, each at its place, while not all are there
OUT/samples.done        one byte per image, 1 where it is there
OUT/samples.npz         `arr_0`, uint8 [N, H, W, 3], when all are there
OUT/samples.png         the first ones as a grid
"""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from spiralrope_cli.core.data.grid import picture_grid
from spiralrope_cli.core.errors import CheckpointError

FACTS_FILE, PART_FILE, DONE_FILE = "samples.json", "samples.part.npy", "samples.done"
NPZ_FILE, GRID_FILE, PNG_FOLDER = "samples.npz", "samples.png", "png"
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
        self._head = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            self._head, {"descr": "|u1", "fortran_order": False, "shape": (num, *size, 3)}
        )

    @property
    def npz(self) -> Path:
        """The result."""
        return self.folder / NPZ_FILE

    def begin(self, facts: dict[str, Any]) -> None:
        """Makes the files for all images, unless an earlier run did."""
        part, done = self.folder / PART_FILE, self.folder / DONE_FILE
        _write_whole(self.folder / FACTS_FILE, json.dumps(facts, indent=2).encode())
        if not done.exists() or done.stat().st_size != self.num or not part.exists():
            with part.open("wb") as file:
                file.write(self._head.getvalue())
                file.truncate(len(self._head.getvalue()) + self.num * self._bytes)
            _write_whole(done, bytes(self.num))

    def missing(self) -> list[int]:
        """Images that are not there yet, in order."""
        done = np.frombuffer((self.folder / DONE_FILE).read_bytes(), dtype=np.uint8)
        return np.flatnonzero(done == 0).tolist()

    def put(self, indices: Sequence[int], levels: Tensor) -> None:
        """Writes images at their places: [B, 3, H, W] uint8."""
        pixels = levels.permute(0, 2, 3, 1).contiguous().numpy()
        start = len(self._head.getvalue())
        # Plain writes: pages of a mapped file would count as this process's memory.
        with (self.folder / PART_FILE).open("r+b") as file:
            for index, image in zip(indices, pixels, strict=True):
                file.seek(start + index * self._bytes)
                file.write(image.tobytes())
        with (self.folder / DONE_FILE).open("r+b") as file:
            for index in indices:
                file.seek(index)
                file.write(b"\x01")

    def first(self, count: int) -> Tensor:
        """[count, 3, H, W] uint8, the first images."""
        with (self.folder / PART_FILE).open("rb") as file:
            file.seek(len(self._head.getvalue()))
            pixels = np.frombuffer(file.read(count * self._bytes), dtype=np.uint8)
        pixels = pixels.reshape(-1, *self.size, 3)
        return torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2)

    def write_grid(self, facts: dict[str, Any]) -> Path:
        """The first images as one picture that says what made it."""
        target = self.folder / GRID_FILE
        beside = target.with_suffix(".new")
        grid = picture_grid(self.first(min(self.num, GRID_IMAGES)))
        grid.save(beside, "png", pnginfo=_png_text(facts))
        os.replace(beside, target)
        return target

    def write_pngs(self, facts: dict[str, Any]) -> Path:
        """Every image as a file, named by its number."""
        folder = self.folder / PNG_FOLDER
        folder.mkdir(exist_ok=True)
        digits = max(6, len(str(self.num - 1)))
        with (self.folder / PART_FILE).open("rb") as file:
            file.seek(len(self._head.getvalue()))
            for index in range(self.num):
                image = np.frombuffer(file.read(self._bytes), np.uint8).reshape(*self.size, 3)
                path = folder / f"{index:0{digits}d}.png"
                Image.fromarray(image).save(path, pnginfo=_png_text({**facts, "index": index}))
        return folder

    def finish(self, facts: dict[str, Any]) -> Path:
        """Streams all images into the `.npz`, which then takes the place of the parts."""
        beside = self.npz.with_suffix(".new")
        with zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as archive:
            archive.comment = json.dumps(facts).encode()[:65535]
            entry = zipfile.ZipInfo("arr_0.npy")  # its date is fixed: equal images, equal files
            with (
                archive.open(entry, "w", force_zip64=True) as sink,
                (self.folder / PART_FILE).open("rb") as source,
            ):
                shutil.copyfileobj(source, sink, CHUNK)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, self.npz)
        for name in (PART_FILE, DONE_FILE):
            (self.folder / name).unlink(missing_ok=True)
        return self.npz


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
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read", "choose another --out") from error


def _png_text(facts: dict[str, Any]) -> PngImagePlugin.PngInfo:
    text = PngImagePlugin.PngInfo()
    text.add_text("spiralrope", json.dumps(facts))
    return text


def _write_whole(path: Path, content: bytes) -> None:
    beside = path.with_name(path.name + ".new")
    beside.write_bytes(content)
    os.replace(beside, path)
