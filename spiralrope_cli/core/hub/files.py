"""What downloads and exports share: digests, free disk, and files that are new or refused."""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from spiralrope_cli.core.atomic import flush
from spiralrope_cli.core.errors import FetchError, is_disk_full
from spiralrope_cli.core.runtime.progress import human_size, say
from spiralrope_cli.core.runtime.run_folder import check_space

OTHER_DISK = "free some, or name another disk with --out (for downloads HF_HOME, SPIRALROPE_CACHE)"
# A whole SHA-256, how one begins, or git's SHA-1; anything else cannot be compared with.
DIGEST = re.compile("[0-9a-f]{8}|[0-9a-f]{40}|[0-9a-f]{64}")


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
