from __future__ import annotations

import csv
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tables import SHAPE, VOXEL_SIZE, refused, some_picks, survives
from tomocpt_stream import receipts
from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats import delimited, read_kinds, read_picks, write_picks
from tomocpt_stream.formats.csv_tables import MATRIX
from tomocpt_stream.picks import Picks

if TYPE_CHECKING:
    from pathlib import Path

HEADER = "tomogram,particle,x [voxel],y [voxel],z [voxel],score\n"


@settings(max_examples=60, deadline=None)
@given(
    zyx=st.lists(st.tuples(*[st.floats(-1e6, 1e6)] * 3), max_size=4),
    turned=st.booleans(),
    names=st.tuples(*[st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1, max_size=9)] * 2),
    voxel_size=st.none() | st.floats(1e-3, 1e3),
    shape=st.none() | st.tuples(*[st.integers(1, 10**6)] * 3),
    suffix=st.sampled_from([".csv", ".tsv"]),
)
def test_nothing_is_lost(
    tmp_path_factory: pytest.TempPathFactory,
    zyx: list[tuple[float, float, float]],
    turned: bool,
    names: tuple[str, str],
    voxel_size: float | None,
    shape: Any,
    suffix: str,
) -> None:
    tomogram, particle = (name.strip() or "x" for name in names)
    if not (tomogram + particle).isprintable():
        return
    path = tmp_path_factory.getbasetemp() / f"lossless{suffix}"
    turns = some_picks(len(zyx), turned=turned).rotations
    score = np.random.default_rng(0).random(len(zyx)).astype(np.float32)
    picks = Picks(np.array(zyx), score, turns, voxel_size, tomogram, shape, particle)
    write_picks(picks, path)
    (found,) = read_kinds(path)
    np.testing.assert_array_equal(found.zyx, picks.zyx)
    np.testing.assert_array_equal(found.score, picks.score)
    assert (found.rotations is None) is (picks.rotations is None)
    if picks.rotations is not None:
        np.testing.assert_array_equal(found.rotations, picks.rotations)
    said = (found.voxel_size, found.shape, found.tomogram, found.particle)
    assert said == (voxel_size, shape, tomogram, particle)


def test_pandas_reads_what_is_written(tmp_path: Path) -> None:
    picks = [some_picks(3, turned=True), some_picks(2, seed=1, tomogram='TS "02", b', particle="")]
    write_picks(picks, tmp_path / "a.csv")
    table = pd.read_csv(tmp_path / "a.csv")
    assert list(table)[:6] == ["tomogram", "particle", "x [voxel]", "y [voxel]", "z [voxel]", "score"]
    assert list(table)[6:10] == ["voxel size [angstrom]", *(f"size {axis} [voxel]" for axis in "xyz")]
    assert list(table)[10:] == MATRIX
    assert table["tomogram"].tolist() == ["TS_01"] * 3 + ['TS "02", b'] * 2
    np.testing.assert_array_equal(table["x [voxel]"][:3], picks[0].zyx[:, 2])
    np.testing.assert_array_equal(table[MATRIX][:3], picks[0].rotations.reshape(3, 9))  # type: ignore[union-attr]
    assert table[MATRIX][3:].isna().all(axis=None)
    assert (table["voxel size [angstrom]"] == VOXEL_SIZE).all()


def test_columns_come_in_any_order_and_number(tmp_path: Path) -> None:
    path = tmp_path / "TS_09.csv"
    path.write_text("\ufeffz [angstrom],note,x [angstrom],y [angstrom]\r\n30,a,10,20\r\n60,b,20,40\r\n\r\n")
    found = read_picks(path, voxel_size=10.0)["TS_09"]
    np.testing.assert_allclose(found.zyx, [[3, 2, 1], [6, 4, 2]])
    assert found.score.tolist() == [1, 1]
    with pytest.raises(FormatError, match=r"voxel size of tomogram TS_09.*voxel_size="):
        read_picks(path)


def test_rows_of_several_tomograms_and_kinds_may_be_mixed(tmp_path: Path) -> None:
    rows = "b,r,1,1,1,.5\na,r,2,2,2,.25\nb,s,3,3,3,1\na,r,4,4,4,.75\n"
    (tmp_path / "a.csv").write_text(HEADER + rows)
    found = read_kinds(tmp_path / "a.csv")
    assert [(one.tomogram, one.particle, one.zyx[:, 0].tolist()) for one in found] == [
        ("b", "r", [1]),
        ("a", "r", [2, 4]),
        ("b", "s", [3]),
    ]
    assert found[1].score.tolist() == [0.25, 0.75]
    with pytest.raises(FormatError, match=r"2 kinds of particles in b: 'r', 's'"):
        read_picks(tmp_path / "a.csv")


def test_tables_of_the_czii_challenge(tmp_path: Path) -> None:
    path = tmp_path / "submission.csv"
    path.write_text(
        "id,experiment,particle_type,x,y,z\n0,TS_5_4,beta-amylase,2983.596,3154.13,764.896\n"
        "1,TS_5_4,apo-ferritin,100.12,200.24,300.36\n2,TS_69_2,apo-ferritin,1,2,3\n"
    )
    found = read_picks(path, voxel_size=VOXEL_SIZE, particle="apo-ferritin")
    np.testing.assert_allclose(found["TS_5_4"].zyx, [[30, 20, 10]])
    assert set(found) == {"TS_5_4", "TS_69_2"}
    with pytest.raises(FormatError, match="voxel size"):
        read_picks(path)
    write_picks([some_picks(3), some_picks(2, tomogram="b")], tmp_path / "ours.csv", format="czii")
    with (tmp_path / "ours.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["id"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert list(rows[0]) == ["id", "experiment", "particle_type", "x", "y", "z"]
    assert float(rows[0]["x"]) == pytest.approx(some_picks(3).zyx[0, 2] * VOXEL_SIZE)


def test_a_table_without_units_is_asked_about(shared_data: Path, tmp_path: Path) -> None:
    for name in ("points", "points_with_header", "points_with_header_pipe_delim"):
        with pytest.raises(FormatError, match=r"a header that says the units.*portal_csv"):
            read_picks(shared_data / "portal" / "in" / f"{name}.csv")
    found = read_picks(shared_data / "portal" / "in" / "tardis.csv", voxel_size=2.0)["tardis"]
    assert found.zyx[0].tolist() == [6, 4, 2]
    assert "three columns" in refused(tmp_path / "a.csv", "1,2,3,4\n", "portal_csv")
    assert "three columns" in refused(tmp_path / "a.csv", "", "portal_csv")


def test_a_side_file_gives_scores_by_place(tmp_path: Path) -> None:
    """A file that was edited takes no score that is another pick's."""
    picks = some_picks(5)
    write_picks(picks, tmp_path / "TS_01.csv", format="portal_csv")
    lines = (tmp_path / "TS_01.csv").read_text().splitlines()
    (tmp_path / "TS_01.csv").write_text("\n".join([lines[0], lines[3], "7,8,9", lines[1]]) + "\n")
    found = read_picks(tmp_path / "TS_01.csv", format="portal_csv")["TS_01"]
    np.testing.assert_array_equal(found.score, [picks.score[2], 1, picks.score[0]])
    assert (found.particle, found.voxel_size, found.shape) == ("ribosome", VOXEL_SIZE, SHAPE)
    (tmp_path / "TS_01.csv.scores.csv").unlink()
    bare = read_picks(tmp_path / "TS_01.csv", format="portal_csv")["TS_01"]
    assert bare.score.tolist() == [1, 1, 1]


def test_scores_beside_an_address_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_picks(some_picks(3), tmp_path / "TS_01.csv", format="portal_csv")
    stored = {f"s3://bucket/{one.name}": one.read_bytes() for one in tmp_path.iterdir()}
    monkeypatch.setattr(receipts, "get_object", lambda address, *_: stored.get(address))
    found = read_picks("s3://bucket/TS_01.csv", format="portal_csv")["TS_01"]
    np.testing.assert_array_equal(found.score, some_picks(3).score)
    del stored["s3://bucket/TS_01.csv.scores.csv"]
    assert set(read_picks("s3://bucket/TS_01.csv", format="portal_csv")["TS_01"].score) == {1}

    def refuse(address: str, *_: Any) -> bytes:
        if address in stored:
            return stored[address]
        raise FormatError("403", expected="leave", remedy="ask")

    monkeypatch.setattr(receipts, "get_object", refuse)
    with pytest.warns(UserWarning, match="read without scores: 403"):
        read_picks("s3://bucket/TS_01.csv", format="portal_csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + "a,b,1,2,3,.5\na,b,1,2,3\n", "line 3 of .* has 5 cells"),
        (HEADER + "a,b,1,2,3,.5,6\n", "line 2 of .* has 7 cells"),
        (HEADER + "a,b,1,2,x,.5\n", r"line 2 of .* has z \[voxel\] 'x'"),
        (HEADER + "a,b,1,2,3,high\n", "line 2 of .* has score 'high'"),
        (HEADER + "a,b,1,2,inf,.5\n", "line 2"),
        (HEADER + "a,b,1,nan,3,.5\n", "line 2 of .* lacks one of x, y and z"),
        (HEADER + "a,b,,,,.5\n", "line 2 of .* lacks"),
        (HEADER + f"a,b,1,2,{'9' * 500},.5\n", "line 2"),
        (HEADER + "a,b,1,2,1e300,.5\n", "line 2"),
        (HEADER + ",b,1,2,3,.5\n", "line 2 of .* tomogram name ''"),
        (HEADER + '"a,b,1,2,3,.5\n', "line 2 of .* no row"),
        (HEADER + "a\0,b,1,2,3,.5\n", "line 2 of .* bytes of zero"),
        (HEADER + "a,b,1,2,3,.5\n" + "x" * 70_000, "line 3 of .* characters and more"),
        (HEADER.replace("score", "particle"), "the column particle twice"),
        ("a;b,c\n", "commas and semicolons"),
        ("", "the first line"),
        ("hello\n", "the first line of .* 'hello'"),
        ("tomogram,x [voxel],y [voxel],z [angstrom]\n", "says the units"),
        (HEADER.strip() + ",voxel size [angstrom]\na,b,1,2,3,1,10\na,b,1,2,3,1,11\n", "voxel sizes 10, 11"),
        (HEADER.strip() + ",voxel size [angstrom]\na,b,1,2,3,1,-4\n", "voxel size -4"),
        (HEADER.strip() + "," + ",".join(MATRIX) + "\na,b,1,2,3,1" + ",2" * 9 + "\n", "line 2 of .* r00"),
        (HEADER.strip() + "," + ",".join(MATRIX) + "\na,b,1,2,3,1" + ",1e200" * 9 + "\n", "line 2"),
    ],
)
def test_rows_that_are_wrong_are_named(tmp_path: Path, text: str, message: str) -> None:
    found = refused(tmp_path / "a.csv", text)
    assert re.search(message, found), found


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    assert "no text" in refused(tmp_path / "a.csv", HEADER.encode() + b"a,b,1,2,3,\xff\n")
    assert "no text" in refused(tmp_path / "a.csv", "x [voxel]".encode("utf-16"))


def test_more_names_than_tomograms_can_be_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delimited, "MOST_NAMES", 10)
    rows = "".join(f"a{i},b,1,2,3,1\n" for i in range(11))
    assert "more than 10 names in column tomogram" in refused(tmp_path / "a.csv", HEADER + rows)


def test_a_file_beyond_any_table_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("wb") as file:
        file.truncate(delimited.LARGEST_FILE + 1)
    with pytest.raises(FormatError, match=r"has 1\.1 GB"):
        read_picks(tmp_path / "a.csv")


def test_every_batch_of_a_long_table_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "_BATCH", 7)
    picks = some_picks(50, turned=True)
    write_picks([picks, some_picks(3, tomogram="b")], tmp_path / "a.csv")
    found = read_picks(tmp_path / "a.csv")
    np.testing.assert_array_equal(found["TS_01"].zyx, picks.zyx)
    text = (tmp_path / "a.csv").read_text().splitlines()
    text[40] = text[40].replace("TS_01,ribosome,", "TS_01,ribosome,x")
    assert "line 41 of" in refused(tmp_path / "a.csv", "\n".join(text))


@settings(max_examples=100, deadline=None)
@given(at=st.integers(0, 900), junk=st.binary(max_size=10), end=st.integers(0, 1200), turned=st.booleans())
def test_mutations_of_a_table(
    tmp_path_factory: pytest.TempPathFactory, at: int, junk: bytes, end: int, turned: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "mutant.csv"
    write_picks(some_picks(4, turned=turned), path)
    data = path.read_bytes()
    path.write_bytes((data[:at] + junk + data[at + len(junk) :])[:end])
    survives(lambda: read_kinds(path))
    survives(lambda: read_kinds(path, format="portal_csv"))


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(st.sampled_from('xyz,;\t|"\n\r 019.e-[]voxel'), max_size=60),
    format=st.sampled_from([None, "tsv", "czii", "tardis", "portal_csv", "napari", "coords", "deepetpicker"]),
)
def test_any_text(tmp_path_factory: pytest.TempPathFactory, text: str, format: str | None) -> None:  # noqa: A002
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_text(text)
    survives(lambda: read_kinds(path, format=format, voxel_size=2.0))


def test_scores_beside_a_table_in_angstrom_survive_other_voxels(tmp_path: Path) -> None:
    """The side file says the voxel size; one that is passed is another word on the same places."""
    picks = some_picks(20)
    write_picks(picks, tmp_path / "a.csv", format="czii")
    alone = read_picks(tmp_path / "a.csv")["TS_01"]
    assert (alone.voxel_size, alone.shape) == (VOXEL_SIZE, SHAPE)
    np.testing.assert_allclose(alone.zyx, picks.zyx, atol=1e-5)
    given = read_picks(tmp_path / "a.csv", voxel_size=10.0)["TS_01"]
    np.testing.assert_allclose(given.zyx, picks.zyx * VOXEL_SIZE / 10, atol=1e-5)
    for found in (alone, given):
        np.testing.assert_array_equal(found.score, picks.score)
    assert given.shape == SHAPE  # one size, rounded
    assert read_picks(tmp_path / "a.csv", voxel_size=5.0)["TS_01"].shape is None
