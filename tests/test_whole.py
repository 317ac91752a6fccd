from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from tomocpt_stream.whole import whole, write_together, write_whole

if TYPE_CHECKING:
    from pathlib import Path


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "selection.json"
    write_whole(path, "before")

    def full(_: int) -> None:
        assert path.read_text() == "before"  # nothing of it is to be seen yet
        raise OSError(28, "No space left on device")

    fsync = os.fsync
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]

    def overtaken(number: int) -> None:
        monkeypatch.setattr("os.fsync", fsync)
        write_whole(path, "another's")  # at the same moment
        fsync(number)

    monkeypatch.setattr("os.fsync", overtaken)
    (tmp_path / "reader").hardlink_to(path)
    write_whole(path, "mine")
    assert path.read_text() == "mine"
    assert (tmp_path / "reader").read_text() == "before"  # who has it open reads on
    assert len(list(tmp_path.iterdir())) == 2


def test_the_temporary_file_lies_beside_under_a_name_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "map.mrc"
    with whole(path) as first, whole(path) as second:
        assert first != second
        assert first.parent == second.parent == tmp_path
        # Sweeps of what killed writers left go by this ending.
        assert (first.name[0], first.suffix) == (".", ".partial")
        first.write_bytes(b"first")
        second.write_bytes(b"second")
        assert not path.exists()
    assert path.read_bytes() == b"first"  # the last one to be renamed
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_what_was_there_and_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "map.mrc"
    path.write_bytes(b"before")

    def interrupted() -> None:
        with whole(path) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"before"
    with pytest.raises(FileNotFoundError), whole(path):
        pass  # nothing was written
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_as_long_as_names_can_be_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)
    write_whole(path, "all")
    assert path.read_text() == "all"


def test_the_file_has_the_permissions_of_any_new_one(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_whole(tmp_path / "text", "é")
    write_together({tmp_path / "bytes": b"1"})
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1
    assert (tmp_path / "text").read_bytes() == "é".encode()


def test_of_files_written_together_none_appears_before_all_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, said = tmp_path / "new" / "points.ndjson", tmp_path / "other" / "points.json"
    order: list[str] = []
    replace = type(data).replace

    def watched(self: Path, target: Path) -> Path:
        assert len(list(tmp_path.rglob("*.partial"))) == 2 - len(order)
        order.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(type(data), "replace", watched)
    write_together({data: b"points", said: b"what they are"})
    assert order == ["points.ndjson", "points.json"]
    assert (data.read_bytes(), said.read_bytes()) == (b"points", b"what they are")


def test_of_files_written_together_none_appears_where_one_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        write_together({tmp_path / "first": b"1", tmp_path / "file" / "second": b"2"})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
