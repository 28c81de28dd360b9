"""Files appear whole or not at all; hashes and errors have one form."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from diptych.errors import describe
from diptych.utils.io import clean, is_temporary, publish, sha256, sha256_file, sha256_json, write_atomic
from raising import raises


def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "one").write_text("old")
    for name in ("file", "folder"):
        with pytest.raises(RuntimeError), publish(tmp_path / name) as partial:
            partial.write_text("half")
            raise RuntimeError
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "one").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_file_and_a_folder_take_the_place_of_either(tmp_path: Path) -> None:
    goal = tmp_path / "deep" / "goal"
    for made in ("file", "folder", "folder", "file", "file"):
        with publish(goal) as partial:
            assert partial.parent == goal.parent and is_temporary(partial.name)
            partial.mkdir() if made == "folder" else partial.write_text("new")
        assert goal.is_dir() if made == "folder" else goal.read_text() == "new"
    assert [path.name for path in goal.parent.iterdir()] == ["goal"]


def test_a_block_that_makes_nothing_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    for name in ("folder", "file"):
        with pytest.raises(FileNotFoundError), publish(tmp_path / name):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with raises("path_unwritable", "file/below"):
        write_atomic(tmp_path / "file" / "below", b"data")


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".a.123.tmp").write_text("half")
    (tmp_path / ".b.xyz.tmp").mkdir()
    (tmp_path / ".b.xyz.tmp" / "b").write_text("half")
    for name in (".lock", "c.tmp", "d"):
        (tmp_path / name).write_text("")
    clean(tmp_path)
    clean(tmp_path / "absent")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "c.tmp", "d"]


def test_hashes_are_plain_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"{}")
    wanted = hashlib.sha256(b"{}").hexdigest()
    assert sha256(b"{}") == sha256("{}") == sha256_json({}) == sha256_file(tmp_path / "file") == wanted
    assert sha256_json({"b": 1, "a": 2}) == sha256('{"a": 2, "b": 1}')
    assert sha256_json({"b": 1, "a": "é"}, sort_keys=False, ensure_ascii=False) == sha256('{"b": 1, "a": "é"}')


def test_an_error_is_one_line() -> None:
    assert describe(ValueError("two\n  lines ")) == "two lines"
    assert describe(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert describe(ValueError("two"), kind=True) == "ValueError: two"
    assert describe(ValueError(), kind=True) == "ValueError: no message"
    assert describe(ValueError("x" * 1000)) == "x" * 300
    assert describe(ValueError("x" * 1000), limit=None) == "x" * 1000
