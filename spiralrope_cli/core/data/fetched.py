"""The bytes of an image in a larger file; a shard of a stream is fetched first, if it is not there.

A shard is fetched by one process of a machine, for all, and is whole or absent. The oldest ones
are removed.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import logging
import os
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO
from urllib.request import urlopen

from spiralrope_cli.core.data.listing import ADDRESS
from spiralrope_cli.core.errors import DataError, SpiralRopeError, first_line, system_error
from spiralrope_cli.core.storage import atomic_write, parse, sha256_of

MOST_SHARDS, MOST_BYTES = 48, 4_000_000_000
"""A split keeps so many shards, or so many bytes if that is more, on the disk."""
TOKEN_HINT = "a token of the Hub is HF_TOKEN; else wds/pipe:curl -fsSL ..."
STATUS_HINTS = {401: TOKEN_HINT, 403: TOKEN_HINT, 404: "check the name and the numbers in it"}
GZIP = b"\x1f\x8b"


def opened(address: str) -> str | io.BytesIO:
    """What PIL opens: the path, or the bytes of an image in a larger file.

    Raises:
        SpiralRopeError: it is in a shard that cannot be fetched.
    """
    if "::" not in address or not (found := ADDRESS.fullmatch(address)):
        return address
    path, first, size, _ = found.groups()
    with _open(Path(path)) as file:
        file.seek(int(first))
        return io.BytesIO(file.read(int(size)))


def shard_sha256(address: str) -> str:
    """SHA-256 that the shard of an image had when it was first read."""
    return str(_known(address.partition("::")[0])["sha256"])


@functools.cache
def _known(path: str) -> dict[str, Any]:
    """URL, checksum and counts of a shard, without the rows of its images."""
    return {**parse(index_of(Path(path)).read_text()), "rows": ()}


def _open(path: Path) -> BinaryIO:
    """A larger file; a missing shard of a stream is fetched, by one process for all."""
    with contextlib.suppress(FileNotFoundError):
        return path.open("rb")
    from filelock import FileLock

    try:
        known = _known(str(path))
    except FileNotFoundError:  # it is no shard of a stream, or its whole folder was removed
        raise DataError(f"{path} is gone", "run the command again once it is back") from None
    with FileLock(path.with_suffix(".lock")):
        with contextlib.suppress(FileNotFoundError):
            return path.open("rb")
        fetch(known["url"], path, known["sha256"])
        return path.open("rb")


def index_of(path: Path) -> Path:
    """The file that says what a shard is, and where its images lie."""
    return path.with_suffix(".json")


def fetch_all(paths: Sequence[Path]) -> None:
    """Fetches shards ahead of their use; errors are those of the use."""
    for path in paths:
        with contextlib.suppress(SpiralRopeError, OSError):
            _open(path).close()
            os.utime(path)  # so it is not the next to be removed


def fetch(url: str, path: Path, expected: str = "") -> str:
    """Fetches a shard, as a plain tar file, and removes the oldest ones; returns its SHA-256.

    The caller holds its lock.
    """
    try:
        with atomic_write(path, sole=True) as beside:
            with beside.open("wb") as file:
                copy_from(url, file)
            _unpack(beside)
            digest = sha256_of(beside)
            if expected not in ("", digest):
                raise DataError(
                    f"{url} is another file than when it was first read",
                    f"delete {path.parent} to read all shards again",
                )
        _remove_old(path.parent)
    except (OSError, EOFError, zlib.error) as error:
        cause = system_error(error, str(path.parent)) if isinstance(error, OSError) else None
        raise cause or DataError(f"{url} cannot be fetched: {first_line(error)}") from error
    return digest


def copy_from(url: str, file: BinaryIO) -> None:
    """Writes what a URL or a command gives."""
    if url.startswith("pipe:"):
        shell = ("bash", "-o", "pipefail", "-c", url.removeprefix("pipe:"))
        # A session of its own: Ctrl-C is for the trainer, which finishes its step.
        own: dict[str, Any] = {"stdin": subprocess.DEVNULL, "start_new_session": True}
        with (
            tempfile.TemporaryFile() as said,
            subprocess.Popen(shell, stdout=subprocess.PIPE, stderr=said, **own) as process,
        ):
            shutil.copyfileobj(process.stdout, file, 1 << 20)  # type: ignore[arg-type]
            if code := process.wait():
                said.seek(0)
                lines = said.read().decode(errors="replace").splitlines()
                raise DataError(f"{url} ended with exit code {code}", "".join(lines[-1:]))
        return
    if url.startswith("file:"):
        with urlopen(url) as source:
            shutil.copyfileobj(source, file, 1 << 20)
        return

    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers, disable_progress_bars

    disable_progress_bars("huggingface_hub.http_get")
    logging.getLogger(http_get.__module__).setLevel(logging.ERROR)  # it tells each new try
    of_hub = url.startswith(f"{constants.ENDPOINT}/")
    headers = {"Accept-Encoding": "identity", **(build_hf_headers() if of_hub else {})}
    try:
        http_get(url, file, headers=headers)
    except (HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # of the disk
            raise
        status = getattr(getattr(error, "response", None), "status_code", 0)
        answer = f"its server answered {status}" if status else first_line(error)
        hint = STATUS_HINTS.get(status, "try again later")
        raise DataError(f"{url} cannot be fetched: {answer}", hint) from error


def _unpack(path: Path) -> None:
    """Replaces a file that gzip compressed by its content."""
    with path.open("rb") as file:
        if file.read(2) != GZIP:
            return
    with atomic_write(path) as beside, gzip.open(path) as packed, beside.open("wb") as file:
        shutil.copyfileobj(packed, file, 1 << 20)


def _remove_old(folder: Path) -> None:
    from filelock import FileLock

    with FileLock(folder / ".lock"):
        stats = [(path.stat(), path) for path in folder.glob("*.tar")]
        by_age = sorted((stat.st_mtime_ns, stat.st_size, path) for stat, path in stats)
        left = sum(size for _, size, _ in by_age)
        for _, size, path in by_age[: max(0, len(by_age) - MOST_SHARDS)]:
            if left > MOST_BYTES:
                path.unlink()
                left -= size
