"""Files: digests, disk space, copies, and downloads by plain HTTPS.

Files outside the Hub are downloaded by `huggingface_hub.file_download.http_get`, which resumes
broken connections. Added here: the next call resumes a partial download, but never with another
version of the file; disk space and digest are checked. torch.hub and torchvision do not resume.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import hashlib
import http.client
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from spiralrope_cli import __version__
from spiralrope_cli.core.errors import (
    SPACE,
    ConfigError,
    FetchError,
    NoRouteError,
    errno_of,
    first_line,
    system_error,
)
from spiralrope_cli.core.hub.catalog import Row
from spiralrope_cli.core.runtime.launch import check_space
from spiralrope_cli.core.runtime.progress import human_size, say
from spiralrope_cli.core.storage import atomic_write, cache_folder, flush, sha256_of

OTHER_DISK = "free some, or name another disk with --out (for downloads HF_HOME, SPIRALROPE_CACHE)"
# SHA-256, its first 8 digits, or git's SHA-1. Anything else cannot be compared.
DIGEST = re.compile("[0-9a-f]{8}|[0-9a-f]{40}|[0-9a-f]{64}")

TIMEOUT_SECONDS = 30.0
# No compression: a compressed response has another size than the file.
HEADERS = {"User-Agent": f"spiralrope/{__version__}", "Accept-Encoding": "identity"}


def digest_like(path: Path, expected: str) -> tuple[str, str]:
    """Kind and digest of a file; the kind is that of `expected`.

    The Hub uses SHA-256 for large files, and git's SHA-1 for small ones.
    """
    if len(expected) != 40:
        return "sha256", sha256_of(path)
    content = path.read_bytes()
    return "git sha1", hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


def is_right(path: Path, expected: str, owner: str, *, name: str = "") -> bool:
    """Whether a file has the digest `expected` (or its first digits); prints the result.

    If `expected` is not a digest, as the ETag of some servers, the result is True, with a remark.
    """
    comparable = DIGEST.fullmatch(expected)
    kind, found = digest_like(path, expected if comparable else "")
    if comparable and not found.startswith(expected):
        return False
    outcome = f"same as {owner}" if comparable else f"not compared: {owner} gives no digest"
    say(f"  {name or path.name}: {human_size(path.stat().st_size)}, {kind} {found}, {outcome}")
    return True


def disk_error(error: Exception, where: Path) -> FetchError:
    """The error for a failed write."""
    if errno_of(error) in SPACE:
        return FetchError(f"the disk is full: {where} cannot hold the file", OTHER_DISK)
    if errno_of(error) == errno.EFBIG:
        return FetchError(f"{where}: a file reached the size limit (ulimit -f)", "raise that limit")
    cause = system_error(error, where.name)
    reason = getattr(error, "strerror", None) or (cause.message if cause else error)
    return FetchError(f"{where} cannot be written: {reason}")


def refuse_existing(target: Path) -> None:
    """Raises if the target exists; an empty folder is allowed."""
    empty_folder = target.is_dir() and not any(target.iterdir())
    if (target.is_symlink() or target.exists()) and not empty_folder:
        raise FetchError(f"{target} exists already", "choose another --out, or move it away")


@contextlib.contextmanager
def new_path(target: Path) -> Iterator[Path]:
    """`atomic_write` of a file or folder; never replaces one, and raises `FetchError`."""
    refuse_existing(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target, durable=True) as beside:
            yield beside
            refuse_existing(target)  # another process may have been faster
    except (OSError, RuntimeError, SafetensorError) as error:
        raise disk_error(error, target) from error


def check_room(cache: Path, missing: int, out: Path | None, sizes: dict[str, int]) -> None:
    """Before a download of `missing` bytes: raises if a disk is too full, or a copy would replace.

    The copy in `out` has files of `sizes`, name -> bytes; another file of that name is kept.
    """
    needs = [(cache, missing)]
    if out:
        for name, size in sizes.items():
            target = out / name
            if target.exists() and not (target.is_file() and target.stat().st_size == size):
                raise _other_file(target)
        needs.append((out, sum(sizes.values())))
    check_space(*needs, what="the download", hint=OTHER_DISK)


def place_copy(source: Path, folder: Path) -> Path:
    """Copies a file into a folder unless the same file is there; raises if another file is."""
    target = folder / source.name
    if target.is_file() and filecmp.cmp(source, target, shallow=False):
        return target
    if target.exists():
        raise _other_file(target)
    with new_path(target) as beside:
        shutil.copyfile(source, beside)
    return target


def _other_file(target: Path) -> FetchError:
    return FetchError(f"{target} exists and differs", "choose another --out, or move it away")


# --- Downloads by plain HTTPS


class FileVersion(NamedTuple):
    """Size of a file on a server, and an identifier of its version."""

    size: int
    validator: str


def target_of(row: Row) -> Path:
    """Path in the cache."""
    return cache_folder() / ("" if row.kind == "data" else "weights") / row.file_name


def fetch_file(row: Row, barred: str, out: Path | None) -> Path:
    """Downloads one file unless it is cached, or `barred` by an option or a variable.

    `out` is the folder of a later copy, whose disk must have space too.
    """
    from huggingface_hub.utils import WeakFileLock

    target = target_of(row)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, target.parent) from error
    with WeakFileLock(target.with_name(f".{target.name}.lock")):
        if target.is_file():
            say(f"{row.name} is here")
            if is_right(target, row.sha256, "its name"):
                return target
            target.unlink()
            say("  it was damaged, and was deleted")
        if barred:
            raise FetchError(f"{row.name} is not downloaded", f"fetch it once without {barred}")
        _download(row, target, out)
    return target


def file_version(row: Row) -> FileVersion:
    """Size and version of a file, without reading it."""
    url = row.source_url
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{row.url_variable} is {url}; it must begin with https:// or http://")
    asked = urllib.request.Request(url, headers=HEADERS)
    try:
        # Not HEAD: signed download URLs, such as GitHub's, may refuse it.
        with urllib.request.urlopen(asked, timeout=TIMEOUT_SECONDS) as answer:
            length = answer.headers.get("Content-Length", "")
            if answer.headers.get_content_type() == "text/html" or not length.isdigit():
                raise FetchError(f"{url} does not answer with a file", _mirror(row))
            etag = answer.headers.get("ETag", "")
            validator = etag if etag.startswith('"') else answer.headers.get("Last-Modified", "")
            return FileVersion(int(length), validator)
    except urllib.error.HTTPError as error:
        raise _refusal(row, error.code) from error
    except (OSError, http.client.HTTPException) as error:
        raise NoRouteError(
            f"no route to {url}: {getattr(error, 'reason', error)}",
            f"check network and proxy{'; ' if _mirror(row) else ''}{_mirror(row)}",
        ) from error


def _download(row: Row, target: Path, out: Path | None) -> None:
    from huggingface_hub.errors import HfHubHTTPError, HTTPError
    from huggingface_hub.file_download import http_get

    version = file_version(row)
    part = _part_of(row, target, version)
    have = part.stat().st_size if part.exists() else 0
    check_room(target.parent, version.size - have, out, {target.name: version.size})
    at = f", resuming at {human_size(have)}" if have else ""
    say(f"{row.name}: {human_size(version.size)} from {row.source_url}{at}")
    # If the server has another version by now, it sends that one from the start.
    same = {"If-Range": version.validator} if version.validator else {}
    try:
        with part.open("ab") as sink:
            http_get(
                row.source_url,
                sink,
                resume_size=have,
                headers={**HEADERS, **same},
                expected_size=version.size,
                displayed_filename=row.file_name,
            )
        if right := is_right(part, row.sha256, "its name", name=target.name):
            flush(part)
            os.replace(part, target)
    except HfHubHTTPError as error:
        raise _refusal(row, error.response.status_code) from error
    except (HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise disk_error(error, target.parent) from error
        have = part.stat().st_size
        raise FetchError(
            f"the download failed after {human_size(have)} of {human_size(version.size)}: "
            f"{first_line(error)}",
            "run the same command again: it resumes",
        ) from error
    if not right:
        part.unlink()
        raise FetchError(
            f"{row.source_url} sent a wrong file: its sha256 does not begin with {row.sha256}",
            _mirror(row) or "nothing was kept; try again later",
        )


def _part_of(row: Row, target: Path, version: FileVersion) -> Path:
    """Path of a partial download; the version is in its name, so that versions are never mixed."""
    digest = hashlib.sha256(repr(version).encode()).hexdigest()[:12]
    part = target.with_name(f".{target.name}.{digest}.part")
    for other in target.parent.glob(f".{target.name}.*.part"):
        # Without a version and without a digest, a mix of two versions would not be noticed.
        mixed = not (version.validator or row.sha256) or other.stat().st_size > version.size
        if other != part or mixed:
            other.unlink()
    return part


def _refusal(row: Row, code: int) -> FetchError:
    what = {
        401: "asks for a login (401)",
        403: "refuses access (403)",
        404: "has no such file (404)",
    }.get(code, f"answered {code}")
    return FetchError(f"{row.source_url} {what}", _mirror(row))


def _mirror(row: Row) -> str:
    if not row.url_variable:
        return ""
    return (
        f"{row.url_variable} can name {'another' if row.url_variable in os.environ else 'a'} mirror"
    )
