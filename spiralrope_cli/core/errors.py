"""Errors that a user can mend; everything else is a bug and may show its traceback."""

from __future__ import annotations

import errno
import os
import re

PLACE, NAME = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST), (errno.ENAMETOOLONG, errno.ELOOP)
RIGHTS = (errno.EACCES, errno.EPERM, errno.EROFS)
"""What the system refuses about a path that the user chose."""

SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How safetensors and torch word a write that the disk cut short.
CUT_SHORT = re.compile(r"\(os error (27|28|122)\)|No space left|unexpected pos|file write failed")


class SpiralRopeError(Exception):
    """What went wrong, and in the hint what to do about it.

    The command line prints both without a traceback and leaves with `exit_code`.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[SpiralRopeError], tuple[str, str]]:
        """Keeps the hint when the error crosses a process border."""
        return type(self), (self.message, self.hint)

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class ConfigError(SpiralRopeError):
    """An option or a config value that cannot work."""

    exit_code = 2


class DataError(SpiralRopeError):
    """A data set that is missing, empty or damaged."""


class UnreadableImageError(DataError):
    """One damaged image, which one process alone may meet."""


class CheckpointError(SpiralRopeError):
    """A checkpoint or run folder that cannot be read, written or continued."""


class DiskError(SpiralRopeError):
    """A disk that cannot hold what would be written."""


class FetchError(SpiralRopeError):
    """Published weights that cannot be had, or that are not what they should be."""


class NoRouteError(FetchError):
    """The server that has them does not answer at all."""


class TrainingError(SpiralRopeError):
    """A training run that must not go on."""


class LaunchError(SpiralRopeError):
    """Workers that could not be started, or that died."""


def is_disk_full(error: Exception) -> bool:
    """Whether a disk could not hold what was written; some libraries say it as text alone."""
    return getattr(error, "errno", None) in SPACE or bool(CUT_SHORT.search(str(error)))


def refused_path(error: OSError, out: str = "") -> SpiralRopeError | None:
    """What the system said about a path, for the user; None where no path was refused.

    A full disk is often told without a path: then it is that of the folder `out`.
    """
    path = out if error.filename is None else os.fsdecode(error.filename)
    if path and is_disk_full(error):
        hint = "free some; the same command then resumes"
        return DiskError(f"no space left on the disk of {path}", hint)
    if error.errno not in (*PLACE, *RIGHTS, *NAME) or error.filename is None:
        return None
    return SpiralRopeError(f"{path}: {os.strerror(error.errno)}")


def dead_loader(error: Exception) -> DataError | None:
    """What torch, or a closed pipe, says of a loader process that was killed; None of all else.

    torch says it from a signal handler, so that it may come out of any line.
    """
    told = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, RuntimeError) and "DataLoader worker" not in told:
        return None
    hint = "often the system ran out of memory: try fewer --workers"
    return DataError(f"a loader process died: {told}", hint)
