"""Files that are not on the Hub, by plain HTTPS: resumed, checked, and whole under their name.

`huggingface_hub.file_download.http_get` brings the bytes and goes on after broken connections.
Here is what it leaves out: parts that the next call goes on with, and never with another version
of the file; free disk; the digest. Downloads of torch.hub and torchvision begin anew each time.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from spiralrope_cli import __version__
from spiralrope_cli.core.atomic import flush
from spiralrope_cli.core.config.hub import cache_folder
from spiralrope_cli.core.errors import ConfigError, FetchError, NoRouteError
from spiralrope_cli.core.hub.catalog import Row
from spiralrope_cli.core.hub.files import check_room, disk_error, is_right
from spiralrope_cli.core.runtime.progress import human_size, say

TIMEOUT_SECONDS = 30.0
# Compressed on the way, a file would have another size than the one that was announced.
HEADERS = {"User-Agent": f"spiralrope/{__version__}", "Accept-Encoding": "identity"}


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
