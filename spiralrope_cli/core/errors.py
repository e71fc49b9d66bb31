"""Errors that a user can fix. Any other exception is a bug, and shows its traceback."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence

PLACE, NAME = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST), (errno.ENAMETOOLONG, errno.ELOOP)
RIGHTS = (errno.EACCES, errno.EPERM, errno.EROFS)
"""Errors of the operating system about a path that the user chose."""

SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Messages of safetensors and torch for a write that failed because the disk is full.
CUT_SHORT = re.compile(r"\(os error (27|28|122)\)|No space left|unexpected pos|file write failed")


class SpiralRopeError(Exception):
    """What went wrong (`message`), and what to do (`hint`).

    The command line prints both without a traceback and exits with `exit_code`.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[SpiralRopeError], tuple[str, str]]:
        """Keeps the hint when the error is pickled between processes."""
        return type(self), (self.message, self.hint)

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class ConfigError(SpiralRopeError):
    """An option or a config value that cannot work."""

    exit_code = 2


class DataError(SpiralRopeError):
    """A data set that is missing, empty or damaged."""


class UnreadableImageError(DataError):
    """One damaged image; other processes may not see it."""


class CheckpointError(SpiralRopeError):
    """A checkpoint or run folder that cannot be read, written or continued."""


class DiskError(SpiralRopeError):
    """Too little disk space."""


class FetchError(SpiralRopeError):
    """Published weights that cannot be downloaded, or that have a wrong checksum."""


class NoRouteError(FetchError):
    """Their server does not answer."""


class TrainingError(SpiralRopeError):
    """A training run that must not go on."""


class LaunchError(SpiralRopeError):
    """Worker processes that could not be started, or that died."""


def in_one(errors: Sequence[ConfigError]) -> ConfigError:
    """One error for all."""
    if len(errors) == 1:
        return errors[0]
    return ConfigError("\n".join(str(each).replace("\n", "\n  ") for each in errors))


def is_disk_full(error: Exception) -> bool:
    """Whether the disk was full; some libraries give no errno, only text."""
    return getattr(error, "errno", None) in SPACE or bool(CUT_SHORT.search(str(error)))


def refused_path(error: OSError, out: str = "") -> SpiralRopeError | None:
    """An error of the operating system about a path, as a message; None for any other error.

    Errors of a full disk often name no path: `out` is then named.
    """
    path = out if error.filename is None else os.fsdecode(error.filename)
    if path and is_disk_full(error):
        hint = "free some; the same command then resumes"
        return DiskError(f"no space left on the disk of {path}", hint)
    if error.errno not in (*PLACE, *RIGHTS, *NAME) or error.filename is None:
        return None
    return SpiralRopeError(f"{path}: {os.strerror(error.errno)}")


def dead_loader(error: Exception) -> DataError | None:
    """The message for a data loader worker that was killed; None for any other error.

    torch raises it from a signal handler, so any line may raise it.
    """
    message = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, RuntimeError) and "DataLoader worker" not in message:
        return None
    hint = "often the system ran out of memory: try fewer --workers"
    return DataError(f"a data loader worker died: {message}", hint)
