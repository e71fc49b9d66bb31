"""Published weights: in the cache, or downloaded from the Hub or by plain HTTPS.

`huggingface_hub` downloads, resumes and caches. It checks neither digests nor disk space, so this
is done here. It reads HF_ENDPOINT, HF_HOME and HF_TOKEN at import, and is slow to import: it is
imported inside functions.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spiralrope_cli.core.errors import FetchError, NoRouteError, first_line
from spiralrope_cli.core.hub.catalog import Row, listed_file
from spiralrope_cli.core.hub.files import (
    DIGEST,
    check_room,
    digest_like,
    disk_error,
    fetch_file,
    is_right,
    place_copy,
    target_of,
)
from spiralrope_cli.core.runtime.progress import human_size, say

LIST_SECONDS = 30.0


def local_files(row: Row) -> list[Path]:
    """Cached files of a row, in its order; empty unless all are cached."""
    if not row.repo:
        target = target_of(row)
        return [target] if target.is_file() else []
    try:
        row = listed_file(row, _cached_names(row)) if row.listed else row
    except FetchError:
        return []
    found = [cached(row, file, row.revision) for file in row.files]
    return [path for path in found if path] if all(found) else []


def local_path(row: Row) -> Path | None:
    """The cached file of a row, or the folder of a VAE; does not use the network."""
    files = local_files(row)
    return _one_path(row, files) if files else None


def damaged_files(row: Row) -> list[Path]:
    """Cached files of a row with a wrong digest."""
    bad = []
    for path in local_files(row):
        expected = named_digest(path) if row.repo else row.sha256
        if DIGEST.fullmatch(expected) and not digest_like(path, expected)[1].startswith(expected):
            bad.append(path)
    return bad


def fetch_published(row: Row, *, offline: bool = False, out: Path | None = None) -> Path:
    """The file or folder of a row, downloaded if needed and checked; with `out` a copy in it."""
    from huggingface_hub import constants

    barred = "HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "--offline" if offline else ""
    files = _fetch_from_hub(row, barred, out) if row.repo else [fetch_file(row, barred, out)]
    return _one_path(row, [place_copy(path, out) for path in files] if out else files)


def _one_path(row: Row, files: list[Path]) -> Path:
    return files[-1].parent if row.kind == "vae" else files[-1]


def _cached_names(row: Row) -> list[str]:
    """Paths in the repository of all cached files of a revision."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        place = snapshot_download(row.repo, revision=row.revision, local_files_only=True)
    except LocalEntryNotFoundError:
        return []
    files = (path for path in Path(place).rglob("*") if path.is_file())
    return [path.relative_to(place).as_posix() for path in files]


def cached(row: Row, file: str, revision: str | None) -> Path | None:
    """The cached file of a revision, or None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(row.repo, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def named_digest(path: Path) -> str:
    """The digest in the cache's name of a file; empty if it is not a link to one."""
    return Path(os.readlink(path)).name if path.is_symlink() else ""


@contextlib.contextmanager
def _asking(row: Row, file: str = "") -> Iterator[None]:
    """Errors of a request for a file, or for the list of a repository, as ours."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except HfHubHTTPError as error:
        raise _refusal(row, file, error) from error
    # HTTPError is that of the HTTP library, which depends on the version of huggingface_hub.
    except (HTTPError, OSError) as error:
        raise NoRouteError(
            f"no route to {constants.ENDPOINT}: {first_line(error)}",
            "check network, proxy and HF_ENDPOINT",
        ) from error


def list_repo_files(row: Row) -> Row:
    """The row with its files, for which the Hub is asked where the row does not say them."""
    from huggingface_hub import HfApi

    if not row.listed:
        return row
    with _asking(row):
        info = HfApi().model_info(row.repo, revision=row.revision, timeout=LIST_SECONDS)
    return listed_file(row, [each.rfilename for each in info.siblings or ()])


def look_up(row: Row, *, timeout: float | None = None) -> dict[str, Any]:
    """Path of each file -> its `HfFileMetadata`, from the Hub; `timeout` is in seconds."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    found = {}
    for file in row.files:
        with _asking(row, file):
            metadata = get_hf_file_metadata(
                hf_hub_url(row.repo, file, revision=row.revision),
                timeout=timeout or constants.HF_HUB_ETAG_TIMEOUT,
            )
        if not metadata.commit_hash or not metadata.etag or metadata.size is None:
            raise FetchError(
                f"{constants.ENDPOINT} does not answer like the Hub for {row.repo}/{file}",
                "check HF_ENDPOINT and the proxy",
            )
        found[file] = metadata
    return found


def _fetch_from_hub(row: Row, barred: str, out: Path | None) -> list[Path]:
    """The files of a row; missing ones are downloaded, and all digests are checked."""
    from huggingface_hub import constants

    there = local_files(row)
    remotes: dict[str, Any] = {}
    if not barred:
        try:
            row = list_repo_files(row)
            remotes = look_up(row)
        except NoRouteError as error:
            if not there:
                raise
            say(error.message)
    if not remotes:
        if not there:
            raise FetchError(f"{row.name} is not downloaded", f"fetch it once without {barred}")
        say(f"{row.name} is here")
        for path in there:
            if not is_right(path, named_digest(path), "the cache"):
                _drop(path)
                again = f"fetch it again without {barred}" if barred else "fetch it again"
                raise FetchError(f"{row.name} was damaged, and was deleted", again)
        return there
    # By commit: in the cache the name of the revision may refer to an older one.
    here = {file: cached(row, file, each.commit_hash) for file, each in remotes.items()}
    missing = sum(each.size for file, each in remotes.items() if here[file] is None)
    sizes = {Path(file).name: each.size for file, each in remotes.items()}
    check_room(Path(constants.HF_HUB_CACHE), missing, out, sizes)
    if missing:
        say(f"{row.name}: {human_size(missing)} from {constants.ENDPOINT}/{row.repo}")
    else:
        say(f"{row.name} is here")
    return [_fetch_one(row, file, each.etag, here[file]) for file, each in remotes.items()]


def _fetch_one(row: Row, file: str, etag: str, here: Path | None) -> Path:
    """One file by huggingface_hub, compared with the digest of the Hub."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if here and not is_right(here, etag, "the Hub"):
        _drop(here)
        say(f"  {here.name} was damaged; downloading it again")
        here = None
    try:
        # Also called for cached files: it records the commit of the revision.
        path = Path(hf_hub_download(row.repo, file, revision=row.revision))
    except HfHubHTTPError as error:
        raise _refusal(row, file, error) from error
    # hf_xet, which downloads large files from the real Hub, raises RuntimeError.
    except (HTTPError, OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise disk_error(error, Path(constants.HF_HUB_CACHE)) from error
        raise FetchError(
            f"the download of {row.name} failed: {first_line(error)}", "nothing was kept; try again"
        ) from error
    if not here and not is_right(path, etag, "the Hub"):
        _drop(path)
        raise FetchError(
            f"{row.repo}/{file} has a wrong digest after the download, not {etag}",
            "nothing was kept; try again, or another HF_ENDPOINT",
        )
    return path


def _drop(path: Path) -> None:
    """Deletes a file from the cache, with the targets of its links."""
    while path.is_symlink():
        target = path.parent / os.readlink(path)
        path.unlink()
        path = target
    path.unlink(missing_ok=True)


def _refusal(row: Row, file: str, error: BaseException) -> FetchError:
    """The error for an HTTP status of the Hub, for a file or the list of a repository."""
    from huggingface_hub import constants

    response = error.response  # type: ignore[attr-defined]
    code, reason = response.status_code, response.headers.get("X-Error-Code", "")
    where = f"{row.repo}/{file}" if file else row.repo
    if code == 401 and reason != "GatedRepo":
        return FetchError(
            f"{constants.ENDPOINT} does not let you read {where} (401)",
            "set HF_TOKEN; the Hub gives the same answer if the repository does not exist",
        )
    if code in (401, 403):
        return FetchError(
            f"your token has no access to {where} ({code})",
            f"accept the terms on {constants.ENDPOINT}/{row.repo}, or set another HF_TOKEN",
        )
    if code == 404 and reason == "RevisionNotFound":
        return FetchError(
            f"{row.repo} has no revision {row.revision} (404)",
            "a revision is a branch, a tag or a commit",
        )
    if code == 404:
        at = f" at revision {row.revision}" if row.revision else ""
        return FetchError(
            f"{constants.ENDPOINT} has no {where}{at} (404)",
            "check the name, the revision and HF_ENDPOINT; a private repository needs HF_TOKEN",
        )
    return FetchError(f"{constants.ENDPOINT} answered {code} for {where}", "try again later")
