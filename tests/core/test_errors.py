"""Errors of the operating system are recognised however a library words them."""

from __future__ import annotations

import errno
import resource

import pytest

from spiralrope_cli.core.errors import (
    CheckpointError,
    DiskError,
    LaunchError,
    SpiralRopeError,
    errno_of,
    system_error,
)

IN_A_WORKER = (
    "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
    "OSError: [Errno 24] Too many open files: 'a/b.png'"
)
UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a"), errno.ENOSPC),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), errno.EDQUOT),
        (RuntimeError("PytorchStreamWriter failed: No space left on device"), errno.ENOSPC),
        (RuntimeError("[enforce fail at inline_container.cc] unexpected pos 64"), errno.ENOSPC),
        (Exception("Error while serializing: I/O error: (os error 28)"), errno.ENOSPC),
        (Exception("Error while serializing: I/O error: (os error 27)"), errno.EFBIG),
        (OSError(IN_A_WORKER), errno.EMFILE),
        (RuntimeError("received 0 items of ancdata"), errno.EMFILE),
        (MemoryError("Unable to allocate 4.00 GiB for an array"), errno.ENOMEM),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"), errno.ENOMEM),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), errno.ENOMEM),
        (RuntimeError("can't start new thread"), errno.EAGAIN),
        (RuntimeError("Symlink loop from '/a/b'"), errno.ELOOP),
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:4711"), errno.ECONNRESET),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ValueError("a bug"), None),
        (KeyError("step"), None),
    ],
)
def test_an_error_is_recognised_however_it_is_worded(error, code, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda what: UNLIMITED)
    assert errno_of(error) == code
    assert (system_error(error) is None) is (code is None)


def test_torch_says_the_same_of_a_full_disk_and_of_a_size_limit(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda what: (64, 64))
    assert errno_of(RuntimeError("PytorchStreamWriter: file write failed")) == errno.EFBIG


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(errno.ENOSPC, "No space"), DiskError, "no space left on the disk of runs/one"),
        (OSError(errno.ENOSPC, "No space", "a"), DiskError, "no space left on the disk of a"),
        (
            RuntimeError(
                "unable to allocate shared memory(shm) for file </torch_1>: No space left"
            ),
            SpiralRopeError,
            "no space left in shared memory (/dev/shm)",
        ),
        (OSError(errno.EFBIG, "x"), DiskError, "a file reached the size limit"),
        (OSError(errno.EACCES, "Permission denied", "b"), SpiralRopeError, "b: Permission denied"),
        (RuntimeError("Symlink loop from '/a/b'"), SpiralRopeError, "/a/b: Too many levels of"),
        (OSError(IN_A_WORKER), SpiralRopeError, "too many files are open (ulimit -n)"),
        (MemoryError("Unable to allocate 4.00 GiB"), SpiralRopeError, "out of memory: 4.00 GiB"),
        (RuntimeError("Connection reset by peer"), LaunchError, "the connection to another"),
        (RuntimeError("Timed out waiting 9ms for recv"), LaunchError, "another process did not"),
        (RuntimeError("DataLoader worker (pid 4) is killed"), LaunchError, "a data loader worker"),
    ],
)
def test_it_becomes_one_line_that_names_the_path(error, kind, message, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda what: UNLIMITED)
    told = system_error(error, "runs/one")
    assert isinstance(told, kind)
    assert told.message.startswith(message)
    assert "\n" not in told.message + told.hint


def test_a_full_disk_without_any_path_is_that_of_the_output():
    told = system_error(OSError(errno.ENOSPC, "No space left on device"))
    assert told.message == "no space left on the disk of the output"


def test_the_hint_survives_the_way_between_processes():
    import pickle

    back = pickle.loads(pickle.dumps(CheckpointError("what", "what to do")))
    assert (back.message, back.hint) == ("what", "what to do")
