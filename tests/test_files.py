"""Files appear whole: also where several processes write the same one."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimdiff.files import replacing


def test_two_writers_of_one_file_do_not_touch_each_others(tmp_path: Path):
    path = tmp_path / "report.json"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("one")
        second.write_text("two")
        assert first.read_text() == "one"
    assert path.read_text() == "one", "who ends last stays"
    assert [*tmp_path.iterdir()] == [path]


def test_a_writer_that_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path):
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(KeyError), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]
