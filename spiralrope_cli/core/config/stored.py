"""Images that are read in place from larger files: tar archives, WebDataset shards, parquet, Arrow.

Where each image lies is listed once, and kept in the cache folder until one of the files changes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spiralrope_cli.core.config.hub import cache_folder
from spiralrope_cli.core.config.tables import read_table
from spiralrope_cli.core.config.tars import read_tar
from spiralrope_cli.core.storage import parse, write_whole

READERS = {".tar": read_tar, ".parquet": read_table, ".arrow": read_table}
LONG = 1 << 30
"""Bytes of files whose images are not listed at once."""
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


def stored_files(folder: Path, word: str = "") -> list[Path]:
    """The files of one kind in a folder, with a word in their name; none beside class folders."""
    named = re.compile(rf"(?<![a-z]){word}(?!_t3)(?![a-z])", re.IGNORECASE)  # t3: the dogs again
    try:
        inside = list(os.scandir(folder))
    except OSError:
        return []
    if not word and any(each.is_dir() or each.name.endswith((".gz", ".tgz")) for each in inside):
        return []
    files = sorted(Path(each) for each in inside if not word or named.search(each.name))
    kinds = ([path for path in files if path.suffix == suffix] for suffix in READERS)
    return next((kind for kind in kinds if kind), [])


def list_stored(files: Sequence[Path]) -> dict[str, Any]:
    """The kept list of images: `address`, `label` of each, `classes` and `labels_from`."""
    from filelock import FileLock

    names = [str(path.absolute()) for path in files]
    stamp = [[stat.st_size, stat.st_mtime_ns] for stat in (path.stat() for path in files)]
    key = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:32]
    kept = cache_folder() / "indexes" / f"{key}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    if not (index := _read(kept, stamp)):
        # The processes of another launcher all come here; one of them makes the list.
        with FileLock(kept.with_suffix(".lock")):
            index = _read(kept, stamp) or _make(kept, names, stamp)
    places = zip(index["file"], index["place"], strict=True)
    index["address"] = [f"{index['files'][file]}::{place}" for file, place in places]
    return index


def _read(kept: Path, stamp: list[list[int]]) -> dict[str, Any]:
    """The list of these files, empty if there is none or it is of other files."""
    try:
        index = parse(kept.read_text())
        fresh = index["stamp"] == stamp and all(Path(path).exists() for path in index["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return index if fresh else {}


def _make(kept: Path, names: list[str], stamp: list[list[int]]) -> dict[str, Any]:
    if (size := sum(size for size, _ in stamp)) >= LONG:
        sys.stderr.write(f"listing the images in {size >> 30} GiB of {names[0]}, once\n")
    index: dict[str, Any] = {"stamp": stamp, "files": [], "file": [], "place": [], "label": []}
    for number, name in enumerate(names):
        found = READERS[Path(name).suffix](Path(name))
        index["files"].append(str(found.file))
        index |= {"labels_from": found.labels_from, "classes": found.class_names}
        for first, size, member, label in found.rows:
            index["file"].append(number)
            index["place"].append(f"{first}+{size}::{member}")
            index["label"].append(label)
    write_whole(kept, json.dumps(index))
    return index
