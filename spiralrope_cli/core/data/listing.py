"""Image files in folders, their addresses, and lists of images; those of large folders are kept.

An image is named by an address: the path of its file, or FILE::OFFSET+SIZE::NAME in a larger file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from spiralrope_cli.core.errors import DataError
from spiralrope_cli.core.runtime.launch import is_first_process
from spiralrope_cli.core.runtime.progress import counted
from spiralrope_cli.core.storage import atomic_write, cache_folder, parse

if TYPE_CHECKING:
    import numpy as np

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
LARGER_FILES = (".tar", ".parquet", ".arrow", ".array_record", ".tfrecord")
"""Suffixes of files that hold many images; `stored.py` lists them."""
ADDRESS = re.compile(r"(.+?)::(\d+)\+(\d+)::(.*)", re.DOTALL)

KEPT_FROM = 10_000
"""Images of a folder from which its list is kept; fewer are listed in a moment."""
SLOW_SECONDS = 2.0
"""After which listing shows how far it is."""
TICK = 2_000_000_000
"""Nanoseconds within which a file system may give two changes one time."""
FORMAT = 1


# --- Files and addresses


def place_in(folder: Path | str, address: str) -> str:
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


def suffix_of(path: Path) -> str:
    """The suffix of a file; TensorFlow Datasets adds a number to it: `.tfrecord-00000-of-00001`."""
    return path.suffix.partition("-")[0]


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
    return _of_first_kind(Path(each) for each in inside if not word or named.search(each.name))


def larger_files_below(folder: Path) -> list[Path]:
    """The larger files of one kind at any depth."""
    return _of_first_kind(folder.rglob("*"))


def _of_first_kind(paths: Iterable[Path]) -> list[Path]:
    files = sorted(paths)
    kinds = ([path for path in files if suffix_of(path) == suffix] for suffix in LARGER_FILES)
    return next((kind for kind in kinds if kind), [])


# --- Lists


@dataclass(frozen=True, eq=False)
class ImageList(Sequence[tuple[str, int]]):
    """(address, class number) of each image.

    Three arrays, which the loader workers of a process share: Python objects have counters, so each
    worker would soon have its own copy, of 250 bytes per image.
    """

    root: str  # what all addresses begin with
    names: np.ndarray  # [bytes] uint8, the rest of the addresses one after another
    ends: np.ndarray  # [N] int64, where each ends in `names`
    labels: np.ndarray  # [N] int32

    @classmethod
    def of(cls, images: Iterable[tuple[str, int]], root: str = "") -> ImageList:
        """The list of these, whose addresses begin with `root`."""
        import numpy as np

        if isinstance(images, cls):
            return images
        names, ends, labels = bytearray(), [], []
        for address, label in images:
            names += os.fsencode(address[len(root) :])
            ends.append(len(names))
            labels.append(label)
        arrays = np.frombuffer(names, np.uint8), np.array(ends, np.int64)
        return cls(root, *arrays, np.array(labels, np.int32))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> tuple[str, int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[str, int]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        """One image, or a list of them."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        first = self.ends[index - 1] if index else 0
        name = self.names[first : self.ends[index]].tobytes()
        return self.root + os.fsdecode(name), int(self.labels[index])


def list_class_folders(folder: Path, class_names: Sequence[str]) -> tuple[ImageList, Counter[str]]:
    """The images below the class folders, and suffix -> number of other files.

    The list of a large folder is kept in the cache folder, until a folder in it, at any depth, has
    another time: adding, removing and renaming files and folders changes that.
    """
    if kept := _read_kept(folder):
        return kept
    begun, others = time.time_ns(), Counter[str]()
    seen = [(str(folder), os.stat(folder).st_mtime_ns)]

    def images() -> Iterator[tuple[str, int]]:
        for number, name in enumerate(_said_if_slow(f"listing {folder}", class_names)):
            paths, left_out = images_below(folder / name, seen)
            if not paths:
                raise DataError(
                    f"class folder {folder / name} holds no images{count_files(left_out)}",
                    f"known suffixes: {' '.join(IMAGE_SUFFIXES)}",
                )
            others.update(left_out)
            yield from ((path, number) for path in paths)

    found = ImageList.of(images(), f"{folder}{os.sep}")
    # What is younger may have changed since it was read.
    if len(found) >= KEPT_FROM and max(changed for _, changed in seen) < begun - TICK:
        _keep(folder, found, {"format": FORMAT, "folders": seen, "others": others})
    return found, others


def _said_if_slow(what: str, items: Sequence[str]) -> Iterator[str]:
    """The items, with progress on stderr if they take more than a moment."""
    begun, advance = time.monotonic(), None
    with contextlib.ExitStack() as stack:
        for done, item in enumerate(items, start=1):
            yield item
            if advance:
                advance(1)
            elif time.monotonic() - begun > SLOW_SECONDS:
                shown, unit = is_first_process(), "class folders per second"
                bar = counted(what, len(items), shown=shown, done=done, unit=unit)
                advance = stack.enter_context(bar)


def _read_kept(folder: Path) -> tuple[ImageList, Counter[str]] | None:
    import numpy as np

    try:
        with np.load(_place(folder), allow_pickle=False) as arrays:
            about = parse(arrays["about"].tobytes())
            if about["format"] != FORMAT or any(
                os.stat(where).st_mtime_ns != changed for where, changed in about["folders"]
            ):
                return None
            parts = [arrays[name] for name in ("names", "ends", "labels")]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None  # none, or damaged
    return ImageList(f"{folder}{os.sep}", *parts), Counter(about["others"])


def _keep(folder: Path, images: ImageList, about: dict[str, Any]) -> None:
    import numpy as np

    described = np.frombuffer(json.dumps(about).encode(), np.uint8)
    place = _place(folder)
    with contextlib.suppress(OSError):  # no space, or not ours: the next run lists again
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(place) as beside, beside.open("wb") as file:
            np.savez(
                file, names=images.names, ends=images.ends, labels=images.labels, about=described
            )


def _place(folder: Path) -> Path:
    key = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:32]
    return cache_folder() / "indexes" / f"{key}.npz"
