"""Errors that a user can fix. Any other exception is a bug, and shows its traceback."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Sequence

TEXTS = {
    errno.ENOSPC: "No space left|unexpected pos|file write failed",
    errno.ENOMEM: "(allocate|not enough|out of) memory",
    errno.EFBIG: "File too large",
    errno.EMFILE: "Too many open files|received 0 items of ancdata",
    errno.EAGAIN: "can't start new thread",
    errno.ELOOP: "Symlink loop",
    errno.ECONNRESET: "Connection (closed|reset)|Broken pipe|remote process exited"
    "|[Tt]imed out (waiting|connecting)|Connect timeout|socket has timed out|wait timeout after"
    "|failed to recv, got 0 bytes",
}
"""Messages of Python, torch and safetensors for errors of the operating system without errno."""
SPACE = (errno.ENOSPC, errno.EDQUOT)


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


def first_line(error: BaseException) -> str:
    """The first line of a message, as some libraries add help; the error's name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def in_one(errors: Sequence[ConfigError]) -> ConfigError:
    """One error for all."""
    if len(errors) == 1:
        return errors[0]
    return ConfigError("\n".join(str(each).replace("\n", "\n  ") for each in errors))


def errno_of(error: BaseException) -> int | None:
    """The errno of an error of the operating system, also if a library wraps it in text."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    text = str(error)
    if found := re.search(r"(?:\[Errno |\(os error )(\d+)", text):
        return int(found[1])
    code = next((code for code, words in TEXTS.items() if re.search(words, text)), None)
    # torch says the same of a full disk and of a file that may not grow.
    limited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
    return errno.EFBIG if code == errno.ENOSPC and limited else code


def system_error(error: Exception, out: str = "") -> SpiralRopeError | None:
    """The message for an error of the operating system; None for any other error.

    Many of them name no path: `out` is then named.
    """
    if isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error):
        return dead_loader(error)
    named = re.search(r"(?:from|:) '(.+)'", str(error))
    path = os.fsdecode(getattr(error, "filename", None) or (named[1] if named else ""))
    where = path or out or "the output"
    match errno_of(error):
        case None:
            return None
        case code if code in SPACE:
            return _no_space(error, where)
        case errno.EFBIG:
            hint = "raise that limit; the same command then resumes"
            return DiskError(f"a file reached the size limit (ulimit -f): {where}", hint)
        case errno.EMFILE | errno.ENFILE:
            hint = "raise that limit, or use fewer --workers"
            return SpiralRopeError("too many files are open (ulimit -n)", hint)
        case errno.EAGAIN:
            hint = "raise that limit, or use fewer --workers and --nproc"
            return SpiralRopeError("no more processes or threads can start (ulimit -u)", hint)
        case errno.ENOMEM:
            asked = re.search(r"allocate ([\d.]+ \w+)", str(error))
            hint = "try a smaller --batch-size or --micro-batch-size, or fewer --workers"
            whose = ""
            if type(error).__name__ == "OutOfMemoryError":  # torch's, of a device
                hint = (
                    "in training try --micro-batch-size auto, a smaller one, or "
                    "--grad-checkpointing; else a smaller --batch-size"
                )
                whose = "GPU "
            more = f": {asked[1]} more" if asked else ""
            return SpiralRopeError(f"out of {whose}memory{more}", hint)
        case errno.ECONNRESET if not isinstance(error, OSError):
            return lost_process(error)
        case code:
            reason = getattr(error, "strerror", None) or os.strerror(code)
            return SpiralRopeError(f"{path}: {reason}" if path else reason)


def lost_process(error: Exception) -> LaunchError:
    """The message for a process that was lost, or that others waited for in vain."""
    hint = "it was killed, or the network failed: see its own output"
    if re.search("timed out|timeout", str(error), re.IGNORECASE):
        return LaunchError("another process did not answer in time", f"it hangs; or {hint}")
    return LaunchError("the connection to another process was lost", hint)


def _no_space(error: Exception, where: str) -> SpiralRopeError:
    if "shared memory" in str(error):
        hint = "in Docker give a larger --shm-size; or use fewer --workers, or --workers 0"
        return SpiralRopeError("no space left in shared memory (/dev/shm)", hint)
    hint = "free some; the same command then resumes"
    return DiskError(f"no space left on the disk of {where}", hint)


def dead_loader(error: Exception) -> LaunchError | None:
    """The message for a data loader worker that was killed; None for any other error.

    torch raises it from a signal handler, so any line may raise it.
    """
    message = first_line(error)
    if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in message:
        return None
    hint = "often the system ran out of memory: try fewer --workers"
    return LaunchError(f"a data loader worker died: {message}", hint)
