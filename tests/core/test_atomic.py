from __future__ import annotations

import pytest

from spiralrope_cli.core.atomic import atomic_write, write_whole


@pytest.mark.parametrize("options", [{}, {"sole": True}, {"durable": True}])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, options):
    target = tmp_path / "figures.json"
    write_whole(target, "old")

    def fill_the_disk():
        with atomic_write(target, **options) as beside:
            beside.write_text("ne")
            assert target.read_text() == "old"
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        fill_the_disk()
    assert {path: path.read_text() for path in tmp_path.iterdir()} == {target: "old"}
    with atomic_write(target, **options) as beside:
        beside.write_text("new")
    assert {path: path.read_text() for path in tmp_path.iterdir()} == {target: "new"}


def test_a_sole_writer_writes_over_what_a_killed_one_left(tmp_path):
    with atomic_write(tmp_path / "large.npz", sole=True) as left:
        left.write_text("whole")
    left.write_text("half of another")
    with atomic_write(tmp_path / "large.npz", sole=True) as beside:
        assert beside == left
        beside.write_text("again")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["again"]
