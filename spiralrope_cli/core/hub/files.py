"""Files that come or are written: digests, free disk, copies, and downloads by plain HTTPS.

What is not on the Hub comes by `huggingface_hub.file_download.http_get`, which goes on after broken
connections. Here is what it leaves out: parts that the next call goes on with, and never with
another version of the file; free disk; the digest. Downloads of torch.hub and torchvision begin
anew each time.
"""

from __future__ import annotations

import contextlib
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
from spiralrope_cli.core.atomic import flush
from spiralrope_cli.core.config.hub import cache_folder
from spiralrope_cli.core.errors import ConfigError, FetchError, NoRouteError, is_disk_full
from spiralrope_cli.core.hub.catalog import Row
from spiralrope_cli.core.runtime.progress import human_size, say
from spiralrope_cli.core.runtime.run_folder import check_space

OTHER_DISK = "free some, or name another disk with --out (for downloads HF_HOME, SPIRALROPE_CACHE)"
# A whole SHA-256, how one begins, or git's SHA-1; anything else cannot be compared with.
DIGEST = re.compile("[0-9a-f]{8}|[0-9a-f]{40}|[0-9a-f]{64}")

TIMEOUT_SECONDS = 30.0
# Compressed on the way, a file would have another size than the one that was announced.
HEADERS = {"User-Agent": f"spiralrope/{__version__}", "Accept-Encoding": "identity"}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            state.update(chunk)
    return state.hexdigest()


def digest_like(path: Path, expected: str) -> tuple[str, str]:
    """Kind and digest of a file, of the kind that `expected` is.

    The Hub names large files by SHA-256, and small ones, that are kept in git, as git does.
    """
    if len(expected) != 40:
        return "sha256", sha256_of(path)
    content = path.read_bytes()
    return "git sha1", hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


def is_right(path: Path, expected: str, owner: str, *, name: str = "") -> bool:
    """Compares a file with its owner's digest, or how that begins, and says the outcome.

    What is no digest, as the ETag of some servers, counts as right, and the outcome says so.
    """
    comparable = DIGEST.fullmatch(expected)
    kind, found = digest_like(path, expected if comparable else "")
    if comparable and not found.startswith(expected):
        return False
    outcome = f"as {owner} says" if comparable else f"{owner} gives none to compare with"
    say(f"  {name or path.name}: {human_size(path.stat().st_size)}, {kind} {found}, {outcome}")
    return True


def disk_error(error: Exception, where: Path) -> FetchError:
    """The line for a write that failed."""
    if is_disk_full(error):
        return FetchError(f"the disk is full: {where} cannot hold the file", OTHER_DISK)
    return FetchError(f"{where} cannot be written: {getattr(error, 'strerror', None) or error}")


def refuse_existing(target: Path) -> None:
    """Refuses to write where something already lies; an empty folder is nothing."""
    empty_folder = target.is_dir() and not any(target.iterdir())
    if (target.is_symlink() or target.exists()) and not empty_folder:
        raise FetchError(f"{target} exists already", "choose another --out, or move it away")


@contextlib.contextmanager
def new_path(target: Path) -> Iterator[Path]:
    """A path beside the target to write a file or a folder at; it gets its name when it is whole.

    Unlike `atomic_write` it takes folders, replaces nothing, and words what the disk refused.
    """
    refuse_existing(target)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        for path in (*beside.glob("*"), beside):
            flush(path)
        os.rename(beside, target)
        flush(target.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise disk_error(error, target) from error
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                beside.unlink()


def check_room(cache: Path, missing: int, out: Path | None, sizes: dict[str, int]) -> None:
    """Refuses, before a byte comes, what the disks cannot hold, and a copy over another file.

    Args:
        cache: where the download goes.
        missing: bytes of it that are not there yet.
        out: folder of the copy, if one is wanted.
        sizes: file name -> bytes of the copy.
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
    """Copies a file into a folder, unless it is there; another file is never replaced."""
    target = folder / source.name
    if target.is_file() and filecmp.cmp(source, target, shallow=False):
        return target
    if target.exists():
        raise _other_file(target)
    with new_path(target) as beside:
        shutil.copyfile(source, beside)
    return target


def _other_file(target: Path) -> FetchError:
    return FetchError(f"{target} is another file", "choose another --out, or move it away")


# --- Downloads by plain HTTPS


class FileVersion(NamedTuple):
    """What a server says of a file; `validator` names this very version of it."""

    size: int
    validator: str


def target_of(row: Row) -> Path:
    """Where the file is kept."""
    return cache_folder() / "weights" / row.file_name


def fetch_file(row: Row, barred: str, out: Path | None) -> Path:
    """Downloads one file, unless it is here.

    Args:
        row: of the catalogue.
        barred: the option or variable that forbids a download, empty where none does.
        out: folder of the copy that is made afterwards.
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
            say("  it was damaged, and is deleted")
        if barred:
            raise FetchError(f"{row.name} is not here", f"fetch it once without {barred}")
        _download(row, target, out)
    return target


def file_version(row: Row) -> FileVersion:
    """Asks for a file's size without reading it."""
    url = row.source_url
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{row.url_variable} is {url}; it must begin with https:// or http://")
    asked = urllib.request.Request(url, headers=HEADERS)
    try:
        # Not HEAD: addresses that are signed for a download, as GitHub's, may refuse it.
        with urllib.request.urlopen(asked, timeout=TIMEOUT_SECONDS) as answer:
            length = answer.headers.get("Content-Length", "")
            if answer.headers.get_content_type() == "text/html" or not length.isdigit():
                raise FetchError(f"{url} answers with something other than a file", _mirror(row))
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
    at = f", going on at {human_size(have)}" if have else ""
    say(f"{row.name}: {human_size(version.size)} from {row.source_url}{at}")
    # A server that has another version by now sends that one whole.
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
            f"the download broke off at {human_size(have)} of {human_size(version.size)}: "
            f"{first_line(error)}",
            "the same command goes on from there",
        ) from error
    if not right:
        part.unlink()
        raise FetchError(
            f"{row.source_url} sent wrong bytes: sha256 does not begin with {row.sha256}",
            _mirror(row) or "nothing of it was kept; try again later",
        )


def _part_of(row: Row, target: Path, version: FileVersion) -> Path:
    """Where the pieces gather; named by the version, so that two never mix in one file."""
    digest = hashlib.sha256(repr(version).encode()).hexdigest()[:12]
    part = target.with_name(f".{target.name}.{digest}.part")
    for other in target.parent.glob(f".{target.name}.*.part"):
        # Without a name for the version and without a digest nothing would show a mixture.
        mixed = not (version.validator or row.sha256) or other.stat().st_size > version.size
        if other != part or mixed:
            other.unlink()
    return part


def first_line(error: BaseException) -> str:
    """What went wrong, without the help that some libraries add."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
