from __future__ import annotations

import errno
import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from spiralrope_cli.core.errors import DiskError
from spiralrope_cli.core.runtime.launch import check_space
from spiralrope_cli.core.runtime.run_folder import hold_folder, write_json


@pytest.fixture
def small_disk(monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(10_000, 9_000, 1_000))


def test_what_folders_of_one_disk_need_is_added_up(tmp_path, small_disk):
    half = (tmp_path / "not" / "there", 600)
    check_space(half, what="a thing", hint="free some")
    with pytest.raises(DiskError) as refused:
        check_space(half, (tmp_path, 600), what="two things", hint="free some")
    assert str(refused.value) == (
        f"{tmp_path} has 1 kB free, and 1.2 kB are needed for two things\nfree some"
    )


def test_a_full_disk_where_a_run_folder_begins_is_named(tmp_path, monkeypatch):
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(os, "write", full)
    monkeypatch.setattr(Path, "write_bytes", full)
    with hold_folder(tmp_path / "run"), pytest.raises(OSError, match="No space") as raised:
        write_json(tmp_path / "run" / "sources.json", {})
    assert raised.value.filename == str(tmp_path / "run" / "sources.json")
