from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.tables import OPTIONS, refused, some_picks
from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats import read_kinds, read_picks, write_picks


def test_three_columns_without_a_header(tmp_path: Path) -> None:
    picks = some_picks(5)
    write_picks(picks, tmp_path / "TS_01.coords")
    rows = [line.split(" ") for line in (tmp_path / "TS_01.coords").read_text().splitlines()]
    np.testing.assert_allclose(np.array(rows, dtype=float), picks.zyx[:, ::-1], atol=1e-6)


def test_foreign_files_are_read(tmp_path: Path) -> None:
    """TomoTwin and crYOLO put tabs or blanks, whole numbers or not."""
    (tmp_path / "TS_02.coords").write_text("10 20 30\n11.5\t21\t31\n\n  1e1   2 3 \n")
    found = read_picks(tmp_path / "TS_02.coords", **OPTIONS)["TS_02"]
    assert found.zyx.tolist() == [[30, 20, 10], [31, 21, 11.5], [3, 2, 10]]
    assert found.score.tolist() == [1, 1, 1]


def test_classes_come_first_for_deepetpicker(tmp_path: Path) -> None:
    tables = [some_picks(3), some_picks(2, seed=1, particle="apo-ferritin")]
    write_picks(tables, tmp_path / "TS_01.coords", format="deepetpicker")
    rows = np.loadtxt(tmp_path / "TS_01.coords")
    assert rows[:, 0].tolist() == [1, 1, 1, 2, 2]
    found = read_kinds(tmp_path / "TS_01.coords", format="deepetpicker")
    assert [(table.particle, len(table)) for table in found] == [("ribosome", 3), ("apo-ferritin", 2)]
    np.testing.assert_array_equal(found[1].score, tables[1].score)
    (tmp_path / "TS_01.coords.scores.csv").unlink()
    found = read_kinds(tmp_path / "TS_01.coords", format="deepetpicker")
    assert [(table.particle, len(table)) for table in found] == [("1", 3), ("2", 2)]
    with pytest.raises(FormatError, match="deepetpicker"):
        read_kinds(tmp_path / "TS_01.coords")
    with pytest.raises(FormatError, match="one kind of particle"):
        write_picks(tables, tmp_path / "b.coords")


@pytest.mark.parametrize(
    ("text", "format", "message"),
    [
        ("1 2 3\n4 5\n", None, "line 2 of"),
        ("x y z\n1 2 3\n", None, "the first line"),
        ("1 2 nan\n", None, "line 1 of"),
        ("1,2,3\n", None, "the first line"),
        ("1 1 2 3\n1.5 1 2 3\n", "deepetpicker", "the class 1.5"),
        ("1 2 3\n", "deepetpicker", "class x y z"),
    ],
)
def test_other_rows_are_refused(tmp_path: Path, text: str, format: str | None, message: str) -> None:  # noqa: A002
    assert message in refused(tmp_path / "a.coords", text, format)


def test_points_and_scores_are_replaced_together_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.coords"
    write_picks(some_picks(3), path)
    before = {one.name: one.read_bytes() for one in tmp_path.iterdir()}
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if "scores" in self.name:
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_picks(some_picks(3, seed=1), path)
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == before
