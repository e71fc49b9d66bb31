"""Image files in folders, and the addresses of images. Standard library only.

An image is named by an address: the path of its file, or FILE::OFFSET+SIZE::NAME in a larger file.
"""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from pathlib import Path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
LARGER_FILES = (".tar", ".parquet", ".arrow")
"""Suffixes of files that hold many images; `stored.py` lists them."""
ADDRESS = re.compile(r"(.+?)::(\d+)\+(\d+)::(.*)", re.DOTALL)


def opened(address: str) -> str | io.BytesIO:
    """What PIL opens: the path, or the bytes of an image in a larger file."""
    if "::" in address and (found := ADDRESS.fullmatch(address)):
        path, first, size, _ = found.groups()
        with open(path, "rb") as file:
            file.seek(int(first))
            return io.BytesIO(file.read(int(size)))
    return address


def place_in(folder: Path, address: str) -> str:
    """The path of an image relative to its folder; in a larger file, its name there."""
    if "::" in address and (found := ADDRESS.fullmatch(address)):
        return found[4]
    return os.path.relpath(address, folder)


def images_below(
    folder: Path, folders_seen: list[tuple[str, int]] | None = None
) -> tuple[list[str], Counter[str]]:
    """Image files at any depth, in the order of their paths; suffix -> number of other files.

    Each folder and its time in nanoseconds is added to `folders_seen`.
    """
    found: list[str] = []
    others: Counter[str] = Counter()
    for where, folders, files in os.walk(folder, followlinks=True):
        if folders_seen is not None:
            folders_seen.append((where, os.stat(where).st_mtime_ns))
        folders[:] = [name for name in folders if not _leads_back(where, name)]
        for name in files:
            if is_image(name):
                found.append(os.path.join(where, name))
            elif name[0] != ".":
                others[os.path.splitext(name)[1].lower()] += 1
    return sorted(found), others


def is_image(name: str) -> bool:
    """Whether it is the name of an image file that is not hidden."""
    return name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "."


def count_files(others: Counter[str]) -> str:
    """`: 3 .heic, 1 .txt`, the most frequent suffixes first."""
    said = [f"{count} {suffix or 'without suffix'}" for suffix, count in others.most_common(5)]
    return f": {', '.join(said)}{', ...' * (len(others) > 5)}" if others else ""


def _leads_back(where: str, name: str) -> bool:
    """Whether a link leads to a folder that it lies in, and so on forever."""
    path = os.path.join(where, name)
    inside = Path(os.path.realpath(where))
    return os.path.islink(path) and inside.is_relative_to(os.path.realpath(path))


def larger_files(folder: Path, word: str = "") -> list[Path]:
    """The larger files of one kind in a folder, with a word in their name.

    Without a word none beside class folders.
    """
    named = re.compile(rf"(?<![a-z]){word}(?!_t3)(?![a-z])", re.IGNORECASE)  # t3: the dogs again
    try:
        inside = list(os.scandir(folder))
    except OSError:
        return []
    if not word and any(each.is_dir() or each.name.endswith((".gz", ".tgz")) for each in inside):
        return []
    files = sorted(Path(each) for each in inside if not word or named.search(each.name))
    kinds = ([path for path in files if path.suffix == suffix] for suffix in LARGER_FILES)
    return next((kind for kind in kinds if kind), [])
