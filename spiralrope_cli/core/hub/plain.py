"""Plain HTTPS for files that are not on the Hub: resumed, checked, and whole under their name."""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from spiralrope_cli import __version__
from spiralrope_cli.core.atomic import flush
from spiralrope_cli.core.config.hub import cache_folder
from spiralrope_cli.core.errors import ConfigError, FetchError, NoRouteError
from spiralrope_cli.core.hub.catalog import Row
from spiralrope_cli.core.hub.files import (
    CHUNK,
    OTHER_DISK,
    is_right,
    refuse_other_file,
    writing,
)
from spiralrope_cli.core.runtime.progress import console, human_size, say
from spiralrope_cli.core.runtime.run_folder import check_space

TIMEOUT_SECONDS = 30.0
RETRIES = 5
"""How often in a row a download may break without having brought anything."""
RETRY_SECONDS = 1.0


class Remote(NamedTuple):
    """What a server says of a file; `validator` names this very version of it."""

    size: int
    validator: str


def target_of(row: Row) -> Path:
    """Where the file is kept."""
    return cache_folder() / "weights" / row.file_name


def fetch_file(row: Row, *, offline: bool, out: Path | None) -> Path:
    """Downloads one file, unless it is here.

    Raises:
        FetchError: it cannot be had, or it is not what it should be.
    """
    from huggingface_hub.utils import WeakFileLock

    target = target_of(row)
    with writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(target.with_name(f".{target.name}.lock")):
        if target.is_file():
            say(f"{row.name} is here")
            if is_right(target, row.sha256, "its name"):
                return target
            target.unlink()
            say("  it was damaged, and is deleted")
        if offline:
            raise FetchError(f"{row.name} is not here", "fetch it once without --offline")
        _download(row, target, out)
    return target


def look_up(row: Row) -> Remote:
    """Asks for a file's size without reading it.

    Raises:
        FetchError: it cannot be had there.
    """
    url = row.source_url
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{row.url_variable} is {url}; it must begin with https:// or http://")
    try:
        with _open(url, {}) as answer:
            length = answer.headers.get("Content-Length", "")
            if answer.headers.get_content_type() == "text/html" or not length.isdigit():
                raise FetchError(f"{url} answers with something other than a file", _mirror(row))
            etag = answer.headers.get("ETag", "")
            validator = etag if etag.startswith('"') else answer.headers.get("Last-Modified", "")
            return Remote(int(length), validator)
    except urllib.error.HTTPError as error:
        raise _refusal(row, error.code) from error
    except (OSError, http.client.HTTPException) as error:
        raise NoRouteError(
            f"no route to {url}: {getattr(error, 'reason', error)}",
            f"check network and proxy{'; ' if _mirror(row) else ''}{_mirror(row)}",
        ) from error


def _open(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    agent = {"User-Agent": f"spiralrope/{__version__}", **headers}
    return urllib.request.urlopen(
        urllib.request.Request(url, headers=agent), timeout=TIMEOUT_SECONDS
    )


def _download(row: Row, target: Path, out: Path | None) -> None:
    remote = look_up(row)
    part = _part_of(row, target, remote)
    have = part.stat().st_size if part.exists() else 0
    needs = [(target.parent, remote.size - have)]
    if out:
        refuse_other_file(out / target.name, remote.size)
        needs.append((out, remote.size))
    check_space(*needs, what="the download", hint=OTHER_DISK)
    at = f", going on at {human_size(have)}" if have else ""
    say(f"{row.name}: {human_size(remote.size)} from {row.source_url}{at}")
    _bring(row, part, remote)
    if not is_right(part, row.sha256, "its name"):
        part.unlink()
        raise FetchError(
            f"{row.source_url} sent wrong bytes: sha256 does not begin with {row.sha256}",
            _mirror(row) or "nothing of it was kept; try again later",
        )
    with writing(target.parent):
        flush(part)
        os.replace(part, target)


def _part_of(row: Row, target: Path, remote: Remote) -> Path:
    """Where the pieces gather; named by the version, so that two never mix in one file."""
    version = hashlib.sha256(repr(remote).encode()).hexdigest()[:12]
    part = target.with_name(f".{target.name}.{version}.part")
    for other in target.parent.glob(f".{target.name}.*.part"):
        # Without a name for the version and without a digest nothing would show a mixture.
        if other != part or not (remote.validator or row.sha256):
            other.unlink()
    return part


def _bring(row: Row, part: Path, remote: Remote) -> None:
    """Appends to the part until it has its size, over broken connections."""
    shown_on = console(stderr=True)
    bar = Progress(
        TextColumn(row.file_name[:30]),
        BarColumn(None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=shown_on,
        disable=not shown_on.is_terminal,
    )
    with writing(part.parent):
        part.touch()
    broken, have = 0, part.stat().st_size
    with bar:
        task = bar.add_task("", total=remote.size, completed=have)
        while have < remote.size:
            why = _append(row, part, remote, lambda size: bar.update(task, completed=size))
            now = part.stat().st_size
            broken = 0 if now > have else broken + 1
            have = now
            if broken > RETRIES:
                raise FetchError(
                    f"the download broke off at {human_size(have)} of {human_size(remote.size)}"
                    f": {why}",
                    "the same command goes on from there",
                )
            if have < remote.size:
                say(f"  broken off at {human_size(have)} ({why}), going on", shown_on)
                time.sleep(RETRY_SECONDS)
    if have > remote.size:
        part.unlink()
        raise FetchError(f"{row.source_url} sent more than the {remote.size} bytes it announced")


def _append(row: Row, part: Path, remote: Remote, moved: Callable[[int], None]) -> str:
    """One connection's worth of bytes; gives back why it ended."""
    have = part.stat().st_size
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and remote.validator:
        headers["If-Range"] = remote.validator
    try:
        with _open(row.source_url, headers) as answer, part.open("ab") as sink:
            begins = f"bytes {have}-"
            if have and not answer.headers.get("Content-Range", "").startswith(begins):
                sink.truncate(0)
                have = 0
            while chunk := answer.read(CHUNK):
                with writing(part.parent):
                    sink.write(chunk)
                    sink.flush()
                have += len(chunk)
                moved(have)
    except urllib.error.HTTPError as error:
        raise _refusal(row, error.code) from error
    except (OSError, http.client.HTTPException) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
    return "connection closed"


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
