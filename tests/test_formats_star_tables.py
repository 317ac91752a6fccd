from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING

import numpy as np
import pytest
import starfile
from hypothesis import given, settings
from hypothesis import strategies as st

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats import read_picks, tables
from tomocpt_stream.formats.tables import finite_column, name_column, read_tables, render_tables

if TYPE_CHECKING:
    from pathlib import Path

HEADER = "data_particles\n\nloop_\n_rlnCoordinateX #1\n_rlnCoordinateY #2\n_rlnCoordinateZ #3\n"
HEADER += "_rlnMicrographName #4\n"


def _read(
    path: Path, text: str | bytes, *numbers: str, names: tuple[str, ...] = ()
) -> dict[str, tables.Table]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_tables(path, numbers, names)


def test_real_files_are_what_starfile_says_they_are(shared_data: Path) -> None:
    files = [
        path
        for folder in ("star", "portal/in", "sim10A")
        for path in sorted((shared_data / folder).rglob("*.star"))
        if path.name != "empty_loop.star"  # starfile makes a row of zeros of it
    ]
    assert len(files) > 15
    for path in files:
        theirs = starfile.read(path, always_dict=True)
        columns = {column for block in theirs.values() for column in block}
        ours = read_tables(path, columns, columns)
        assert list(ours) == list(theirs)
        for name, block in theirs.items():
            table = ours[name]
            assert table.columns == list(block)
            for column in table.columns:
                values = np.atleast_1d(np.asarray(block[column]))
                assert len(values) == table.rows
                if values.dtype.kind in "if":
                    np.testing.assert_array_equal(table.numbers[column], values)
                else:
                    codes, words = table.names[column]
                    assert [words[code] for code in codes] == [str(value) for value in values]


def test_quotes_comments_blank_lines_and_line_ends(tmp_path: Path) -> None:
    text = (
        "\ufeff# comment\r\n\r\ndata_a\r\nloop_ # of what\r\n\r\n_x #1\r\n_name #2\r\n\r\n"
        "1 \"TS 01\" # first\r\n\r\n  2 'it''s'\t\r\n3 data_x\r\n# 4 b\r\n5e0 \"\"\r\n\r\n"
        "data_b\n_x 'a b' # pair\n\n_y 7\n"
    )
    found = _read(tmp_path / "a.star", text, "x", "y", names=("name", "x"))
    assert list(found) == ["a", "b"]
    assert found["a"].numbers["x"].tolist() == [1, 2, 3, 5]
    codes, names = found["a"].names["name"]
    assert [names[code] for code in codes] == ["TS 01", "it''s", "data_x", ""]
    assert found["b"].names["x"][1] == ["a b"]
    assert found["b"].numbers["y"].tolist() == [7]


def test_rows_keep_their_order_and_number_over_many_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_LINES", 7)
    rows = "".join(f"{i} {i / 3:.6f} 0 t{i % 5}\n" + ("\n" if i % 11 == 0 else "") for i in range(100))
    path = tmp_path / "a.star"
    (table,) = _read(
        path, HEADER + rows, "rlnCoordinateX", "rlnCoordinateY", names=("rlnMicrographName",)
    ).values()
    assert table.numbers["rlnCoordinateX"].tolist() == list(range(100))
    codes, names = name_column(table, ["rlnMicrographName"])
    assert [names[code] for code in codes] == [f"t{i % 5}" for i in range(100)]
    with pytest.raises(FormatError, match=r"line 96 of .* 3 values in data_particles"):
        _read(path, HEADER + rows.replace("80 26.666667 0", "80 26.666667"))
    (table,) = _read(path, HEADER + rows.replace("80 26.666667", "80 x"), "rlnCoordinateY").values()
    with pytest.raises(FormatError, match=r"row 81 of data_particles .* rlnCoordinateY 'x'"):
        finite_column(table, "rlnCoordinateY")


@pytest.mark.parametrize("text", ["nan", "inf", "-Infinity", "1_000", "0x10", "1,5", "", "--1", "9" * 400])
def test_what_is_no_finite_number_is_none(tmp_path: Path, text: str) -> None:
    (table,) = _read(tmp_path / "a.star", f'data_\nloop_\n_x\n_y\n"{text}" 1\n2 2\n', "x", "y").values()
    with pytest.raises(FormatError, match=r"row 1 of data_ .* expected a finite number"):
        finite_column(table, "x")
    assert finite_column(table, "y").tolist() == [1, 2]
    assert table.numbers["x"][1] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('data_\nloop_\n_x\n_y\n1 2\n1 "2\n', r"line 6 .* the quote of '\"2' is not closed"),
        ("data_\nloop_\n_x\n_y\n1 '2 3\n", "line 5 .* is not closed"),
        ("data_\nloop_\n_x\n_x\n1 2\n", "column x twice"),
        ("data_a\nloop_\n_x\n1\ndata_a\n_y 1\n", "line 5 .* data_a once more"),
        ("data_\n1 2\n", "line 2 .* '1 2' outside a loop"),
        ("data_\n_x\n", "line 2 .* '_x' outside a loop"),
        ("data_\nloop_\n1 2\n", "line 3 .* 2 values in data_ .* each of the 0 columns"),
        ("PK\x03\x04\n", "line 1 .* before any block"),
        ("x,y,z\n1,2,3\n", "line 1 .* before any block"),
        ("data_\nloop_\n" + "".join(f"_c{i}\n" for i in range(1001)), "1001 columns"),
        ("\n".join(f"data_{i}" for i in range(10_001)), "data_10000 once more"),
        ("data_\nloop_\n_x\n" + "1 " * (1 << 17), "line 4 of .* has more than 65536 characters"),
        (HEADER.encode() + b"1 2 3 \xff\xfe\n", "rlnMicrographName .* text in UTF-8"),
    ],
)
def test_damaged_files_are_errors_with_their_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        _read(tmp_path / "a.star", text, "x", names=("rlnMicrographName",))


def test_a_truncated_file_is_an_error_wherever_it_ends_in_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.star"
    whole = HEADER + "1.5 2.5 3.5 TS_01\n" * 3
    for end in range(len(HEADER) + 1, len(whole) - 6):
        path.write_text(whole[:end])
        if end > whole.index("TS_01") and whole[:end].split("\n")[-1] == "":
            assert len(read_picks(path)["TS_01"]) in (1, 2)
        elif len(whole[:end].split("\n")[-1].split()) < 4:
            with pytest.raises(FormatError, match=r"line \d+"):
                read_picks(path)


def test_files_larger_than_picks_are_refused_before_they_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.star"
    path.write_text(HEADER + "1 2 3 TS_01\n" * 30_000)
    monkeypatch.setattr(tables, "MOST_ROWS", 20_000)
    tracemalloc.start()
    with pytest.raises(FormatError, match=r"in 30007 lines; expected .* 20000 lines"):
        read_picks(path)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    monkeypatch.setattr(tables, "LARGEST_FILE", 100_000)
    with pytest.raises(FormatError, match=r"at most 0\.0 GB"):
        read_picks(path)


def test_names_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MOST_NAMES", 100)
    path = tmp_path / "a.star"
    path.write_text(HEADER + "".join(f"1 2 3 t{i}\n" for i in range(200)))
    with pytest.raises(FormatError, match="more than 100 different values of rlnMicrographName"):
        read_picks(path)


@settings(max_examples=50, deadline=None)
@given(
    words=st.lists(
        st.text(st.characters(blacklist_categories=["C", "Z"], blacklist_characters="\"'#"), min_size=1),
        max_size=4,
    ),
    values=st.lists(st.floats(-1e6, 1e6), max_size=4),
)
def test_starfile_reads_what_is_written(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], values: list[float]
) -> None:
    path = tmp_path_factory.getbasetemp() / "written.star"
    columns: dict[str, tables.Column] = {"x": ("%.6f", np.array(values)), "n": "a b", "p": "50%s"}
    path.write_bytes(
        render_tables({"t": [columns, columns], "": [{f"w{i}": w for i, w in enumerate(words)}]}, ["c"])
    )
    table = read_tables(path, {"x"}, {"n", "p", *(f"w{i}" for i in range(len(words)))})
    np.testing.assert_allclose(table["t"].numbers["x"], values + values, atol=1e-6)
    assert [table[""].names[f"w{i}"][1] for i in range(len(words))] == [[word] for word in words]
    theirs = starfile.read(path, always_dict=True, parse_as_string=["n", "p"])["t"]
    if values:
        np.testing.assert_allclose(theirs["x"].astype(float), values + values, atol=1e-6)
        assert set(theirs["n"]) == {"a b"}
        assert set(theirs["p"]) == {"50%s"}


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_mutations_of_real_files_are_picks_or_format_errors(
    tmp_path_factory: pytest.TempPathFactory, shared_data: Path, data: st.DataObject
) -> None:
    sources = ["star/m/m_species_particles.star", "star/relion5_cylindra/Picks/job_picks/particles.star"]
    sources += [
        f"portal/in/{name}_star.star" for name in ("relion_3", "relion_4", "stopgap", "tomoman_relion")
    ]
    lines = (shared_data / data.draw(st.sampled_from(sources))).read_bytes().splitlines(keepends=True)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(lines) - 1))
        change = data.draw(st.sampled_from(["drop", "twice", "swap", "cut", "insert", "token"]))
        if change == "drop" and len(lines) > 1:
            del lines[at]
        elif change == "twice":
            lines.insert(at, lines[at])
        elif change == "swap":
            lines[at], lines[0] = lines[0], lines[at]
        elif change == "cut":
            lines[at] = lines[at][: data.draw(st.integers(0, len(lines[at])))]
        elif change == "insert":
            lines[at] = data.draw(st.binary(max_size=8)) + lines[at]
        else:
            odd = [b"nan", b"1e999", b"-1e308", b'"', b"''", b"data_", b"loop_", b"_x", b"#", b"\x00", b"1_0"]
            words = lines[at].split() or [b""]
            words[data.draw(st.integers(0, len(words) - 1))] = data.draw(st.sampled_from(odd))
            lines[at] = b" ".join(words) + b"\n"
    path = tmp_path_factory.getbasetemp() / "mutated.star"
    path.write_bytes(b"".join(lines))
    dialect = data.draw(st.sampled_from([None, "relion4", "stopgap", "m", "warp", "relion5-picker"]))
    try:
        found = read_picks(
            path, format=dialect, voxel_size=10.0, pixel_size=2.0, shape=(9, 9, 9), base_index=1
        )
    except FormatError:
        return
    for picks in found.values():
        assert np.isfinite(picks.zyx).all()
