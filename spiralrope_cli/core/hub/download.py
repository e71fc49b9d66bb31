"""Published weights: where they are here, how large they are there, and how they come."""

from __future__ import annotations

from pathlib import Path

from spiralrope_cli.core.errors import CheckpointError, ConfigError, FetchError
from spiralrope_cli.core.hub import from_hub, plain
from spiralrope_cli.core.hub.catalog import Row, find
from spiralrope_cli.core.hub.files import digest_like, is_digest, place_copy
from spiralrope_cli.core.runtime.progress import say


def local_files(row: Row, *, revision: str | None = None) -> list[Path]:
    """The row's files in the cache, in the order of the row; empty unless all are here."""
    if not row.repo:
        target = plain.target_of(row)
        return [target] if target.is_file() else []
    found = [from_hub.cached(row, file, revision) for file in row.files]
    return [path for path in found if path] if all(found) else []


def damaged_files(row: Row) -> list[Path]:
    """The row's files in the cache whose bytes have another digest than they should."""
    bad = []
    for path in local_files(row):
        expected = from_hub.named_digest(path) if row.repo else row.sha256
        if is_digest(expected) and not digest_like(path, expected)[1].startswith(expected):
            bad.append(path)
    return bad


def local_path(row: Row, *, revision: str | None = None) -> Path | None:
    """The row in the cache, without asking anyone: its file, or the folder of several files."""
    files = local_files(row, revision=revision)
    return _one_path(files) if files else None


def fetch(
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
    if row.repo:
        files = from_hub.fetch_files(row, revision=revision, offline=offline, out=out)
    else:
        if revision:
            say(f"note: --revision has no effect: {row.name} is not on the Hub")
        files = [plain.fetch_file(row, offline=offline, out=out)]
    if out:
        files = [place_copy(path, out) for path in files]
    return _one_path(files)


def _one_path(files: list[Path]) -> Path:
    return files[0] if len(files) == 1 else files[0].parent


def find_inception(given: str) -> tuple[Path, str]:
    """The weights' file and its SHA-256.

    Args:
        given: `--weights`, empty for those that `fetch inception` brings.

    Raises:
        ConfigError: no such file.
        FetchError: nothing was fetched yet.
        CheckpointError: what was fetched is damaged.
    """
    row = find("inception")
    path = Path(given).expanduser() if given else plain.target_of(row)
    if given and not path.is_file():
        raise ConfigError(f"--weights {path} is no file", "spiralrope fetch inception brings one")
    if not path.is_file():
        raise FetchError(
            f"the weights of Inception are not here: there is no {path}",
            "spiralrope fetch inception stores them there (95 MB); --weights FILE takes another",
        )
    _, digest = digest_like(path, "")
    if not given and not digest.startswith(row.sha256):
        raise CheckpointError(
            f"{path} is damaged: its sha256 begins with {digest[:8]} and not {row.sha256}",
            "spiralrope fetch inception brings it again",
        )
    return path, digest
