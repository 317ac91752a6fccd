"""Tests of the training table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tomocpt_stream.errors import FormatError
from tomocpt_stream.training_table import read_table

if TYPE_CHECKING:
    from pathlib import Path


def test_places_of_a_table_are_relative_to_it_or_say_where_they_are(tmp_path: Path) -> None:
    """As a spreadsheet saves it: with a mark of the byte order, and lines that end in two characters."""
    there = (tmp_path / "far away" / "TS_1.mrc").as_uri()
    assert "far%20away" in there
    text = f"\ufefftomogram,picks,diameter,annotated\r\n{there}, p q.star ,80,s3://bucket/mask.mrc\r\n"
    (tmp_path / "table.csv").write_bytes(text.encode())
    (one,) = read_table(tmp_path / "table.csv")
    assert one.tomogram == str(tmp_path / "far away" / "TS_1.mrc")
    assert one.picks == str(tmp_path / "p q.star")
    assert one.annotated == "s3://bucket/mask.mrc"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("TS_1.mrc,p.star,zero", "row 3 of .*could not convert"),
        ("TS_1.mrc,p.star,-80", "row 3 of .*a diameter of -80"),
        ("TS_1.mrc,p.star,nan", "row 3 of .*a diameter of nan"),
        ("TS_1.mrc,p.star,80,grey", "row 3 of .*contrast 'grey'"),
        ("TS_1.mrc,,80", "row 3 of .*none in picks"),
        ("TS_1.mrc,p.star,80,dark,too many", "row 3 of .*has 5 cells"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: str, message: str) -> None:
    table = tmp_path / "table.csv"
    table.write_text(f"tomogram,picks,diameter,contrast\nTS_0.mrc,q.star,80,dark\n{row}\n")
    with pytest.raises(FormatError, match=message):
        read_table(table)


@pytest.mark.parametrize(
    "text",
    ["", "tomogram,picks,diameter\n", "tomogram,picks\na,b\n", "tomogram,picks,diameter,size\na,b,1,2\n",
     "tomogram,picks,picks,diameter\na,b,b,1\n", "\x00\ufffd", 'tomogram,picks,diameter\n"a,b,1\n'],
)  # fmt: skip
def test_what_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(FormatError, match=r"table\.csv"):
        read_table(tmp_path / "table.csv")


@pytest.mark.parametrize(
    ("columns", "cells", "message"),
    [
        ("partial", "perhaps", "row 2 of .*partial 'perhaps'"),
        ("weight", "0", "row 2 of .*a weight of 0.0"),
        ("weight", "nan", "row 2 of .*a weight of nan"),
        ("weight", "1e9", "row 2 of .*a weight of 1000000000.0"),
        ("weight", "much", "row 2 of .*could not convert"),
        ("voxel_size", "10 Å", "row 2 of .*could not convert"),
        ("voxel_size", "0", "row 2 of .*a voxel size of 0.0"),
        ("others", "*", r"row 2 of .*others '\*' without a file of several kinds"),
    ],
)
def test_a_bad_cell_of_these_is_named(tmp_path: Path, columns: str, cells: str, message: str) -> None:
    table = tmp_path / "table.csv"
    table.write_text(f"tomogram,picks,diameter,{columns}\nTS_1.mrc,p.star,80,{cells}\n")
    with pytest.raises(FormatError, match=message):
        read_table(table)


def test_empty_cells_at_the_end_of_lines_are_no_columns(tmp_path: Path) -> None:
    """As spreadsheets write a table whose widest row once was wider."""
    (tmp_path / "table.csv").write_text("tomogram,picks,diameter,,\nTS_1.mrc,p.star,80,,,\n,,,,\n")
    (one,) = read_table(tmp_path / "table.csv")
    assert (one.diameter, one.picks) == (80.0, str(tmp_path / "p.star"))
