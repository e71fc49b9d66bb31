from __future__ import annotations

import pickle
import zipfile
from unittest.mock import Mock

import numpy as np
import pytest
from numpy.lib import format as npy

from spiralrope_cli.core.data.npz import read_array, read_headers, stream_rows
from spiralrope_cli.core.errors import DataError

IMAGES = np.random.default_rng(0).integers(0, 256, (23, 5, 4, 3)).astype(np.uint8)


@pytest.fixture(params=[np.savez, np.savez_compressed], ids=["stored", "compressed"])
def file(request, tmp_path):
    request.param(tmp_path / "a.npz", IMAGES, mu=np.arange(3.0), words="a word")
    return tmp_path / "a.npz"


@pytest.mark.parametrize("part", [range(23), range(7), range(9, 23), range(4, 18), range(0)])
@pytest.mark.parametrize("rows", [1, 6, 100])
def test_any_part_streams_in_order(file, part, rows):
    header = read_headers(file)["arr_0"]
    assert header.shape == IMAGES.shape
    pieces = list(stream_rows(file, "arr_0", header, part, rows))
    assert [len(piece) for piece in pieces[:-1]] == [rows] * (len(pieces) - 1)
    found = np.concatenate([IMAGES[:0], *pieces])
    np.testing.assert_array_equal(found, IMAGES[part.start : part.stop])


def test_small_arrays_are_read_whole(file):
    assert read_array(file, "mu").tolist() == [0, 1, 2]
    assert str(read_array(file, "words")) == "a word"


def test_pickled_objects_are_refused_before_they_are_read(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", np.array([{}, 1], dtype=object))
    monkeypatch.setattr(pickle, "load", None)
    with pytest.raises(DataError, match="pickled objects"):
        read_headers(tmp_path / "a.npz")


@pytest.mark.parametrize("where", [200, 400])
def test_a_changed_byte_is_found_when_all_is_read(file, where):
    content = bytearray(file.read_bytes())
    content[content.index(b"arr_0.npy") + where] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        list(stream_rows(file, "arr_0", read_headers(file)["arr_0"], range(23), 4))


def test_a_header_that_promises_more_than_there_is(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("x.npy", "w") as stream:
        np.lib.format.write_array_header_1_0(
            stream, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 8, 8, 3)}
        )
        stream.write(b"few")
    with pytest.raises(DataError, match="but its header needs"):
        read_headers(tmp_path / "a.npz")


def test_a_header_that_unpacks_to_gigabytes_is_not_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("x.npy", "w") as stream:
        stream.write(npy.magic(2, 0) + (1 << 24).to_bytes(4, "little") + b" " * (1 << 24))
    with pytest.raises(DataError, match=r"x\.npy is not a numpy array .*got 65524"):
        read_headers(tmp_path / "a.npz")


def test_a_file_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZipFile", Mock(side_effect=PermissionError(13, "denied")))
    with pytest.raises(DataError, match=r"a\.npz cannot be read: denied"):
        read_headers(tmp_path / "a.npz")
