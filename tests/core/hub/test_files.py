"""Plain downloads against a real server: whole, resumed, checked, or a line that says why not."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import random
import threading
from pathlib import Path

import pytest
from hub_server import HubServer, goes_on_within_the_call

from spiralrope_cli.core.errors import ConfigError, DiskError, FetchError, NoRouteError
from spiralrope_cli.core.hub.catalog import find_row
from spiralrope_cli.core.hub.download import fetch_published, local_path
from spiralrope_cli.core.hub.files import disk_error, file_version, new_path

NAME = "VIRTUAL_imagenet512.npz"
CONTENT = random.Random(0).randbytes(3_000_000)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("SPIRALROPE_CACHE", str(tmp_path / "cache"))
    # huggingface_hub keeps whole pieces alone; of 10 MB, this file would never have one.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100_000)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    server = HubServer()
    server.plain[NAME] = CONTENT
    yield server
    server.close()


@pytest.fixture
def row(server):
    """A reference batch, which has no published digest."""
    return dataclasses.replace(find_row("imagenet512-ref"), url=f"{server.url}/plain/{NAME}")


@pytest.fixture
def checked(row):
    return dataclasses.replace(row, sha256=hashlib.sha256(CONTENT).hexdigest()[:8])


def parts(tmp_path):
    return sorted((tmp_path / "cache" / "weights").glob(".*.part"))


def test_a_file_comes_whole_and_is_then_here(row, server, capsys):
    assert local_path(row) is None
    assert file_version(row).size == len(CONTENT)
    path = fetch_published(row)
    assert path.read_bytes() == CONTENT
    assert path.name == NAME
    assert local_path(row) == path
    assert hashlib.sha256(CONTENT).hexdigest() in capsys.readouterr().err
    before = len(server.asked)
    assert fetch_published(row) == path
    assert fetch_published(row, offline=True) == path
    assert len(server.asked) == before


@goes_on_within_the_call
def test_a_broken_connection_goes_on_within_the_call(row, server, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(
        "huggingface_hub.file_download.logger.warning",
        lambda message, *values: messages.append(message % values),
    )
    server.cut[NAME] = [len(CONTENT), 1_000_000, 700_000]
    assert fetch_published(row).read_bytes() == CONTENT
    assert [each.range for each in server.bodies()[2:]] == ["bytes=1000000-", "bytes=1700000-"]
    assert [row.url in message and "resume" in message for message in messages] == [True, True]
    assert not parts(tmp_path)


def test_a_later_call_goes_on_where_the_last_one_ended(row, server, tmp_path):
    server.cut[NAME] = [len(CONTENT), 2_000_000, *[0] * 5]
    with pytest.raises(FetchError, match=r"failed after 2 MB of 3 MB(.|\n)*it resumes"):
        fetch_published(row)
    server.cut.clear()
    assert local_path(row) is None
    assert parts(tmp_path)[0].stat().st_size == 2_000_000
    asked = len(server.asked)
    assert fetch_published(row).read_bytes() == CONTENT
    assert [each.range for each in server.asked[asked:]] == ["", "bytes=2000000-"]


def test_a_part_of_another_version_is_not_continued(row, server, tmp_path):
    server.cut[NAME] = [len(CONTENT), 2_000_000, *[0] * 5]
    with pytest.raises(FetchError):
        fetch_published(row)
    server.cut.clear()
    server.plain[NAME] = newer = CONTENT[::-1]
    assert fetch_published(row).read_bytes() == newer
    assert not parts(tmp_path)


def test_a_part_that_is_too_long_is_not_continued(row, server, tmp_path):
    server.cut[NAME] = [len(CONTENT), 2_000_000, *[0] * 5]
    with pytest.raises(FetchError):
        fetch_published(row)
    server.cut.clear()
    parts(tmp_path)[0].write_bytes(CONTENT + b"more")
    assert fetch_published(row).read_bytes() == CONTENT
    assert server.bodies()[-1].range == ""


@goes_on_within_the_call
def test_a_file_that_changes_in_the_middle_never_mixes(row, server, monkeypatch):
    server.cut[NAME] = [len(CONTENT), 2_000_000]
    newer = CONTENT[::-1]

    def changes(seconds):
        server.plain[NAME] = newer

    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", changes)
    assert fetch_published(row).read_bytes() == newer


@goes_on_within_the_call
def test_a_server_without_ranges_starts_anew(row, server):
    server.ranges = False
    server.cut[NAME] = [len(CONTENT), 2_000_000]
    assert fetch_published(row).read_bytes() == CONTENT


def test_wrong_bytes_never_get_the_name(checked, server, tmp_path):
    server.wrong.add(NAME)
    with pytest.raises(FetchError, match="sent a wrong file: its sha256 does not begin with"):
        fetch_published(checked)
    assert local_path(checked) is None
    assert not parts(tmp_path)
    server.wrong.clear()
    path = fetch_published(checked)
    assert path.read_bytes() == CONTENT
    path.write_bytes(CONTENT[:-1] + b"x")
    assert fetch_published(checked).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "asks for a login"), (403, "refuses access"), (404, "no such file"), (500, "500")],
)
def test_refusals_are_one_line(row, server, status, message):
    server.refuse[NAME] = (status, "")
    with pytest.raises(FetchError, match=message) as refused:
        fetch_published(row)
    assert len(str(refused.value).splitlines()) <= 2
    assert refused.value.exit_code == 1


def test_a_web_page_is_no_file(row, server):
    server.content_type = "text/html; charset=utf-8"
    with pytest.raises(FetchError, match="does not answer with a file"):
        fetch_published(row)


def test_nobody_answers(row, server):
    server.close()
    with pytest.raises(NoRouteError, match=r"no route to http://127(.|\n)*check network"):
        fetch_published(row)
    with pytest.raises(FetchError, match=r"is not downloaded\nfetch it once without --offline"):
        fetch_published(row, offline=True)


def test_a_mirror_must_be_a_web_address(monkeypatch, server):
    monkeypatch.setenv("SPIRALROPE_INCEPTION_URL", "ftp://example.org/i.pth")
    with pytest.raises(ConfigError, match="SPIRALROPE_INCEPTION_URL is ftp"):
        fetch_published(find_row("inception"))


def test_too_little_disk_is_told_before_a_byte_comes(row, server, tmp_path):
    server.announce[NAME] = 10**18
    with pytest.raises(DiskError, match="free, and 1,000,000 TB are needed for the download"):
        fetch_published(row)
    assert not parts(tmp_path)


def test_a_copy_is_whole_and_never_replaces_another_file(row, tmp_path):
    out = tmp_path / "new" / "folder"
    assert fetch_published(row, out=out) == out / NAME
    assert (out / NAME).read_bytes() == CONTENT
    assert fetch_published(row, out=out) == out / NAME
    (out / NAME).write_text("mine")
    with pytest.raises(FetchError, match="exists and differs"):
        fetch_published(row, out=out)
    assert (out / NAME).read_text() == "mine"
    assert [path.name for path in out.iterdir()] == [NAME]


def test_two_writers_of_one_new_file_do_not_mix(tmp_path):
    target = tmp_path / "export.pt"
    slower = new_path(target)
    slower.__enter__().write_text("slower")
    with new_path(target) as faster:
        faster.write_text("faster")
    with pytest.raises(FetchError, match="exists already"):
        slower.__exit__(None, None, None)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"export.pt": "faster"}


def test_two_at_once_download_once(row, server):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch_published(row))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert found[0].read_bytes() == CONTENT
    assert len(server.bodies()) == 2, "one question for the size, one download"


def test_a_full_disk_names_the_variable_of_another():
    error = disk_error(OSError(errno.ENOSPC, "No space left on device"), Path("hub"))
    assert error.message == "the disk is full: hub cannot hold the file"
    assert "HF_HOME" in error.hint
