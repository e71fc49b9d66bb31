"""Published weights: where they are here, and how they come, from the Hub or by plain HTTPS.

`huggingface_hub` downloads, goes on after broken connections, and keeps a cache. It compares no
digests and does not look whether the disk can hold a file: that is done here. It reads
HF_ENDPOINT, HF_HOME and HF_TOKEN when it is imported, and takes its time to load: it is imported
inside the functions.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from spiralrope_cli.core.errors import FetchError, NoRouteError
from spiralrope_cli.core.hub.catalog import Row
from spiralrope_cli.core.hub.files import (
    DIGEST,
    check_room,
    digest_like,
    disk_error,
    fetch_file,
    first_line,
    is_right,
    place_copy,
    target_of,
)
from spiralrope_cli.core.runtime.progress import human_size, say


def local_files(row: Row, *, revision: str | None = None) -> list[Path]:
    """The row's files in the cache, in the order of the row; empty unless all are here."""
    if not row.repo:
        target = target_of(row)
        return [target] if target.is_file() else []
    found = [cached(row, file, revision) for file in row.files]
    return [path for path in found if path] if all(found) else []


def local_path(row: Row) -> Path | None:
    """The row in the cache, without asking anyone: its file, or the folder of several files."""
    files = local_files(row)
    return _one_path(files) if files else None


def damaged_files(row: Row) -> list[Path]:
    """The row's files in the cache whose bytes have another digest than they should."""
    bad = []
    for path in local_files(row):
        expected = named_digest(path) if row.repo else row.sha256
        if DIGEST.fullmatch(expected) and not digest_like(path, expected)[1].startswith(expected):
            bad.append(path)
    return bad


def fetch_published(
    row: Row, *, revision: str | None = None, offline: bool = False, out: Path | None = None
) -> Path:
    """Brings a row here, unless it is, and says on stderr what comes and its digest.

    Args:
        row: of the catalogue.
        revision: branch, tag or commit on the Hub; by default its main branch.
        offline: takes what is here, and asks nobody.
        out: folder for a copy under the files' own names.

    Returns:
        Its file, or the folder of several files; with `out`, of the copy.

    Raises:
        FetchError: it cannot be had, or is not what it should be.
    """
    from huggingface_hub import constants

    barred = "HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "--offline" if offline else ""
    if row.repo:
        files = _fetch_from_hub(row, revision, barred, out)
    else:
        if revision:
            say(f"note: --revision has no effect: {row.name} is not on the Hub")
        files = [fetch_file(row, barred, out)]
    return _one_path([place_copy(path, out) for path in files] if out else files)


def _one_path(files: list[Path]) -> Path:
    return files[0] if len(files) == 1 else files[0].parent


def cached(row: Row, file: str, revision: str | None) -> Path | None:
    """A file as the cache last saw that revision."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(row.repo, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def named_digest(path: Path) -> str:
    """The digest that the cache names a file by, empty where it links to none."""
    return Path(os.readlink(path)).name if path.is_symlink() else ""


class HubFile(NamedTuple):
    """What the Hub says of a file."""

    name: str  # path in the repository
    commit: str
    etag: str
    size: int


def look_up(row: Row, revision: str | None, *, timeout: float | None = None) -> list[HubFile]:
    """Asks the Hub for commit, digest and size of each file; `timeout` is in seconds."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    found = []
    for file in row.files:
        try:
            metadata = get_hf_file_metadata(
                hf_hub_url(row.repo, file, revision=revision),
                timeout=timeout or constants.HF_HUB_ETAG_TIMEOUT,
            )
        except HfHubHTTPError as error:
            raise _refusal(row, file, revision, error) from error
        # HTTPError is that of the HTTP library, which changes with huggingface_hub's versions.
        except (HTTPError, OSError) as error:
            raise NoRouteError(
                f"no route to {constants.ENDPOINT}: {first_line(error)}",
                "check network, proxy and HF_ENDPOINT; --offline takes what is here",
            ) from error
        if not metadata.commit_hash or not metadata.etag or metadata.size is None:
            raise FetchError(
                f"{constants.ENDPOINT} does not answer as the Hub does for {row.repo}/{file}",
                "check HF_ENDPOINT and the proxy",
            )
        found.append(HubFile(file, metadata.commit_hash, metadata.etag, metadata.size))
    return found


def _fetch_from_hub(row: Row, revision: str | None, barred: str, out: Path | None) -> list[Path]:
    """The files of a row, of which those come that are not here; each one's digest is checked."""
    from huggingface_hub import constants

    there = local_files(row, revision=revision)
    remotes: list[HubFile] = []
    if not barred:
        try:
            remotes = look_up(row, revision)
        except NoRouteError as error:
            if not there:
                raise
            say(error.message)
    if not remotes:
        return _take_cached(row, there, barred)
    # By commit, because the revision's name may stand for an older one here.
    here = {each.name: cached(row, each.name, each.commit) for each in remotes}
    missing = sum(each.size for each in remotes if here[each.name] is None)
    sizes = {Path(each.name).name: each.size for each in remotes}
    check_room(Path(constants.HF_HUB_CACHE), missing, out, sizes)
    if missing:
        say(f"{row.name}: {human_size(missing)} from {constants.ENDPOINT}/{row.repo}")
    else:
        say(f"{row.name} is here")
    return [_fetch_one(row, each, revision, here[each.name]) for each in remotes]


def _take_cached(row: Row, files: list[Path], barred: str) -> list[Path]:
    """The cached files, checked against the digests that the cache names them by."""
    if not files:
        raise FetchError(f"{row.name} is not here", f"fetch it once without {barred}")
    say(f"{row.name} is here")
    for path in files:
        if not is_right(path, named_digest(path), "the cache"):
            _drop(path)
            again = f"fetch it again without {barred}" if barred else "fetch it again"
            raise FetchError(f"{row.name} was damaged, and is deleted", again)
    return files


def _fetch_one(row: Row, remote: HubFile, revision: str | None, here: Path | None) -> Path:
    """One file, by huggingface_hub, and compared with the Hub's digest."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if here and not is_right(here, remote.etag, "the Hub"):
        _drop(here)
        say(f"  {here.name} was damaged, and is fetched again")
        here = None
    try:
        # Called for files that are here too: it notes which commit the revision stands for.
        path = Path(hf_hub_download(row.repo, remote.name, revision=revision))
    except HfHubHTTPError as error:
        raise _refusal(row, remote.name, revision, error) from error
    # hf_xet, which brings large files from the real Hub, raises RuntimeError.
    except (HTTPError, OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise disk_error(error, Path(constants.HF_HUB_CACHE)) from error
        raise FetchError(
            f"the download of {row.name} broke off: {first_line(error)}",
            "nothing of it was kept; try again",
        ) from error
    if not here and not is_right(path, remote.etag, "the Hub"):
        _drop(path)
        raise FetchError(
            f"{row.repo}/{remote.name} arrived with wrong bytes, their digest is not {remote.etag}",
            "nothing of it was kept; try again, or another HF_ENDPOINT",
        )
    return path


def _drop(path: Path) -> None:
    """Deletes a file from the cache with everything that its name points to."""
    while path.is_symlink():
        target = path.parent / os.readlink(path)
        path.unlink()
        path = target
    path.unlink(missing_ok=True)


def _refusal(row: Row, file: str, revision: str | None, error: BaseException) -> FetchError:
    """One line for an answer of the Hub that is no file."""
    from huggingface_hub import constants

    response = error.response  # type: ignore[attr-defined]
    code, reason = response.status_code, response.headers.get("X-Error-Code", "")
    where = f"{row.repo}/{file}"
    if code == 401:
        return FetchError(
            f"{constants.ENDPOINT} does not let you read {where} (401)",
            "set HF_TOKEN to a token that may; a repository that is not there answers so too",
        )
    if code == 403:
        return FetchError(
            f"your token may not read {where} (403)",
            f"accept the terms on {constants.ENDPOINT}/{row.repo}, or set another HF_TOKEN",
        )
    if code == 404 and reason == "RevisionNotFound":
        return FetchError(
            f"{row.repo} has no revision {revision} (404)",
            "--revision takes a branch, a tag or a commit",
        )
    if code == 404:
        at = f" at revision {revision}" if revision else ""
        return FetchError(
            f"{constants.ENDPOINT} has no {where}{at} (404)", "check HF_ENDPOINT and --revision"
        )
    return FetchError(f"{constants.ENDPOINT} answered {code} for {where}", "try again later")
