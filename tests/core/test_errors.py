"""A full disk is recognised however it is told."""

from __future__ import annotations

import errno

import pytest

from spiralrope_cli.core.errors import DiskError, is_disk_full, refused_path


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (RuntimeError("PytorchStreamWriter failed: No space left on device"), True),
        (RuntimeError("[enforce fail at inline_container.cc] unexpected pos 64 vs 0"), True),
        (Exception("Error while serializing: I/O error: (os error 28)"), True),
        (OSError(errno.EACCES, "Permission denied", "a"), False),
        (RuntimeError("CUDA out of memory"), False),
    ],
)
def test_a_full_disk_is_told_from_other_errors(error, full):
    assert is_disk_full(error) is full


def test_a_full_disk_without_a_path_is_that_of_the_run():
    error = OSError(errno.ENOSPC, "No space left on device")
    assert refused_path(error) is None
    refused = refused_path(error, "runs/one")
    assert isinstance(refused, DiskError)
    assert refused.message == "no space left on the disk of runs/one"
