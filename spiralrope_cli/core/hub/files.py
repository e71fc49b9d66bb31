"""What every download needs: free disk, digests, whole copies, and words on stderr."""

from __future__ import annotations

import contextlib
import errno
import filecmp
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from safetensors import SafetensorError

from spiralrope_cli.core.errors import FetchError

CHUNK = 1 << 20
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OTHER_DISK = "free some, or name another disk with --out (for downloads HF_HOME, SPIRALROPE_CACHE)"
DISK_REFUSED = re.compile(r"\(os error (27|28|122)\)|unexpected pos|file write failed")
"""How safetensors and torch word a write that the disk cut short."""


def say(line: str, console: Console | None = None) -> None:
    """One plain line on stderr; a console that shows a bar is given, for the bar to make way."""
    (console or Console(stderr=True)).print(line, highlight=False, soft_wrap=True, markup=False)


def human_size(size: float) -> str:
    """Bytes in decimal units, as download pages show them."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3f} TB" if size < 10 else f"{size:,.0f} TB"


def digest_like(path: Path, expected: str) -> tuple[str, str]:
    """Kind and digest of a file, of the kind that `expected` is.

    The Hub names large files by SHA-256, and small ones, that are kept in git, as git does.
    """
    if re.fullmatch("[0-9a-f]{40}", expected):
        kind, state = "git sha1", hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    else:
        kind, state = "sha256", hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            state.update(chunk)
    return kind, state.hexdigest()


def is_digest(text: str) -> bool:
    """Whether a file can be compared with this: a digest, or how one begins."""
    return bool(re.fullmatch("[0-9a-f]{8}|[0-9a-f]{40}|[0-9a-f]{64}", text))


def is_right(path: Path, expected: str, owner: str) -> bool:
    """Compares a file with its published digest and says the outcome.

    Args:
        path: the file.
        expected: the digest or how it begins; anything else cannot be compared.
        owner: whose digest it is, for the line that tells.
    """
    kind, found = digest_like(path, expected)
    comparable = is_digest(expected)
    if comparable and not found.startswith(expected):
        return False
    outcome = f"as {owner} says" if comparable else f"{owner} gives none to compare with"
    say(f"  {path.name}: {human_size(path.stat().st_size)}, {kind} {found}, {outcome}")
    return True


def check_space(*needs: tuple[Path, int]) -> None:
    """Refuses a download that the disks cannot hold.

    Raises:
        FetchError: says where there is too little.
    """
    by_disk: dict[int, tuple[Path, int]] = {}
    for folder, size in needs:
        absolute = folder.absolute()
        there = next(path for path in (absolute, *absolute.parents) if path.exists())
        disk = there.stat().st_dev
        by_disk[disk] = (there, by_disk.get(disk, (there, 0))[1] + size)
    for folder, size in by_disk.values():
        if size > (free := shutil.disk_usage(folder).free):
            raise FetchError(
                f"{folder} has {human_size(free)} free, and {human_size(size)} are needed",
                OTHER_DISK,
            )


@contextlib.contextmanager
def writing(where: Path) -> Iterator[None]:
    """Turns what a disk refuses into one line.

    Raises:
        FetchError: the disk is full, or the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise disk_error(error, where) from error


def disk_error(error: Exception, where: Path) -> FetchError:
    """The line for a write that failed."""
    if getattr(error, "errno", None) in NO_SPACE or DISK_REFUSED.search(str(error)):
        return FetchError(f"the disk is full: {where} cannot hold the file", OTHER_DISK)
    return FetchError(f"{where} cannot be written: {getattr(error, 'strerror', None) or error}")


def refuse_existing(target: Path) -> None:
    """Refuses to write where something already lies; an empty folder is nothing.

    Raises:
        FetchError: there is something.
    """
    empty_folder = target.is_dir() and not any(target.iterdir())
    if (target.is_symlink() or target.exists()) and not empty_folder:
        raise FetchError(f"{target} exists already", "choose another --out, or move it away")


@contextlib.contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A path beside the target to write a file or a folder at; it gets its name when it is whole.

    Raises:
        FetchError: something has that name, the disk is full, or it cannot be written.
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
            beside.unlink(missing_ok=True)


def refuse_other_file(target: Path, size: int) -> None:
    """Refuses to write over a file that is plainly another one.

    Raises:
        FetchError: a file of another size has that name.
    """
    if target.exists() and (not target.is_file() or target.stat().st_size != size):
        raise _other_file(target)


def place_copy(source: Path, folder: Path) -> Path:
    """Copies a file into a folder; it has its name only when it is whole.

    Raises:
        FetchError: another file has that name, or the folder cannot be written.
    """
    target = folder / source.name
    with writing(folder):
        if target.exists():
            if target.is_file() and filecmp.cmp(source, target, shallow=False):
                return target
            raise _other_file(target)
    with whole(target) as beside:
        shutil.copyfile(source, beside)
    return target


def flush(path: Path) -> None:
    """Waits until a file or folder is on the disk, so that a rename never shows less of it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _other_file(target: Path) -> FetchError:
    return FetchError(f"{target} is another file", "choose another --out, or move it away")
