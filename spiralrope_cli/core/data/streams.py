"""WebDataset shards behind URLs and commands: each is fetched when an image in it is read.

`wds/https://host/set-{train-{0000..0127},val-{00..07}}.tar`, `wds/pipe:COMMAND {0000..0127}.tar`.
The first use reads all shards once, and stores where their images lie. From then on an image has an
address as in any tar file; the shard is fetched if it is not on the disk, and old ones are removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from spiralrope_cli.core.data.fetched import (
    MOST_BYTES,
    MOST_SHARDS,
    copy_from,
    fetch,
    fetch_all,
    index_of,
)
from spiralrope_cli.core.data.stored import read_tar
from spiralrope_cli.core.errors import DataError, first_line
from spiralrope_cli.core.runtime.launch import check_space, is_first_process, plan_only
from spiralrope_cli.core.runtime.progress import counted, human_size
from spiralrope_cli.core.storage import cache_folder, parse, write_whole

GROUP = MOST_SHARDS // 3
"""Shards among which images are shuffled. Those of the next group are fetched meanwhile, and
workers may still read those of the one before."""
CONNECTIONS = 4
"""Shards that are fetched at the same time."""
SPLIT_WORD = re.compile(r"(?<![a-z])(train|val|validation|test)(?![a-z])")
CLASS_NAMES = "classnames.txt"
"""A class name per line, beside WebDataset shards whose labels are numbers."""
END_OF_TAR = bytes(512)


# --- What a name stands for


def shard_urls(spec: str, name: str = "") -> list[str]:
    """The URLs or commands of a split by its name; without a name, those of all.

    The last of the words train, val, validation and test in a URL says which split it is of.
    """
    try:
        from braceexpand import braceexpand
    except ImportError as error:
        raise DataError(
            "a stream needs braceexpand, which is not installed", "pip install 'spiralrope[data]'"
        ) from error
    parts = spec.removeprefix("wds/").split("::")
    try:
        urls = [url for part in parts for url in braceexpand(part, escape=False)]
    except ValueError as error:
        raise DataError(
            f"{spec[:200]} has unbalanced braces", "as in set-{0000..0127}.tar"
        ) from error
    return [url for url in urls if not name or [name] == SPLIT_WORD.findall(url)[-1:]]


# --- Where the images lie: read once, and kept


@dataclass(frozen=True)
class Shards:
    """The shards of a split, in order."""

    paths: tuple[Path, ...]  # where each lies while it is on the disk
    counts: tuple[int, ...]  # of their images
    sizes: tuple[int, ...]  # bytes

    @property
    def most_bytes(self) -> int:
        """Bytes that are on the disk at most."""
        return max(sum(sorted(self.sizes)[-MOST_SHARDS:]), min(sum(self.sizes), MOST_BYTES))

    @property
    def note(self) -> str:
        """What a stream loses against shards in a folder, for the plan."""
        total = len(self.paths)
        order = f"images are shuffled within groups of at most {GROUP} of its {total} shards; "
        return (
            f"it is a stream: {order if total > GROUP else ''}a resumed run fetches again the "
            f"shards that it was in; up to {human_size(self.most_bytes)} of shards are kept in "
            f"{self.paths[0].parent}"
        )

    def fetch_ahead(self, shards: Sequence[int]) -> None:
        """Fetches shards in threads that end with the process; errors are those of reading."""
        for first in range(min(CONNECTIONS, len(shards))):
            paths = [self.paths[shard] for shard in shards[first::CONNECTIONS]]
            threading.Thread(target=fetch_all, args=(paths,), daemon=True).start()


def list_shards(spec: str, urls: Sequence[str]) -> tuple[Shards, dict[str, Any]]:
    """The shards, and their images as `list_stored` gives them; reads shards that are not known.

    Raises:
        DataError: a shard cannot be read; or some are not known, and the command only plans.
        DiskError: there is too little space for the shards that are kept.
    """
    folder = cache_folder() / "streams" / hashlib.sha256("\n".join(urls).encode()).hexdigest()[:32]
    paths = [folder / f"{number:05d}-{_name(url)}.tar" for number, url in enumerate(urls)]
    new = [pair for pair in zip(urls, paths, strict=True) if not index_of(pair[1]).exists()]
    if new and plan_only.get():
        raise DataError(
            f"{spec} has to be read once first: {len(new)} of its {len(urls)} shards are not",
            "a run does so at first, but for --dry-run and doctor",
        )
    if new:
        folder.mkdir(parents=True, exist_ok=True)
        what, done = "reading all shards once", len(urls) - len(new)
        unit, shown = "shards per second", is_first_process()
        with (
            counted(what, len(urls), shown=shown, done=done, unit=unit) as advance,
            ThreadPoolExecutor(CONNECTIONS) as pool,
        ):
            for _ in pool.map(_read_once, *zip(*new, strict=True)):
                advance(1)
    kept = [parse(index_of(path).read_text()) for path in paths]
    counts, sizes = (tuple(each[name] for each in kept) for name in ("count", "size"))
    shards = Shards(tuple(paths), counts, sizes)
    there = sum(path.stat().st_size for path in folder.glob("*.tar"))
    hint = "free some, or name another disk with SPIRALROPE_CACHE"
    check_space((folder, shards.most_bytes - there), what="shards", hint=hint)
    addresses: list[str] = []
    for path, each in zip(map(str, paths), kept, strict=True):
        addresses += [f"{path}::{first}+{size}::{name}" for first, size, name, _ in each["rows"]]
    return shards, {
        "address": addresses,
        "label": [row[3] for each in kept for row in each["rows"]],
        "labels_from": next((each["labels_from"] for each in kept if each["rows"]), ""),
        "classes": _class_names(urls[0], folder / CLASS_NAMES),
    }


def _read_once(url: str, path: Path) -> None:
    """Fetches a shard, and lists where its images lie, in one process."""
    from filelock import FileLock

    with FileLock(path.with_suffix(".lock")):
        if index_of(path).exists():
            return
        digest = fetch(url, path)
        try:
            with path.open("rb") as file:
                file.seek(-min(len(END_OF_TAR), path.stat().st_size), os.SEEK_END)
                if file.read() != END_OF_TAR:  # `tarfile` finds no cut between two files
                    raise DataError("its end is missing")
            found = read_tar(path)
        except (DataError, OSError) as error:
            path.unlink()
            reason = first_line(error).replace(str(path), "it")
            raise DataError(
                f"{url} is no whole tar file: {reason}",
                "tar files may be compressed by gzip; the others of this set were kept",
            ) from error
        about = {"url": url, "sha256": digest, "size": path.stat().st_size}
        about |= {"count": len(found.rows), "labels_from": found.labels_from, "rows": found.rows}
        write_whole(index_of(path), json.dumps(about))


def _name(url: str) -> str:
    """The name of the file that a URL or command gives, for messages."""
    return [*re.findall(r"([\w.-]+?)\.(?:tar|tgz)\b", url), "shard"][0]


def _class_names(url: str, kept: Path) -> list[str]:
    """The lines of `classnames.txt` beside a shard; empty if there is none."""
    if not kept.exists():
        with tempfile.TemporaryFile() as file:
            try:
                if not url.startswith("pipe:"):
                    copy_from(urljoin(url, CLASS_NAMES), file)
            except (DataError, OSError) as error:
                response = getattr(error.__cause__, "response", None)
                if getattr(response, "status_code", 0) not in (403, 404) and "http" in url[:4]:
                    raise
                file.truncate(0)
            file.seek(0)
            write_whole(kept, file.read())
    return kept.read_text().splitlines()
