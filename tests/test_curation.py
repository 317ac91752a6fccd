from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tables import SHAPE, VOXEL_SIZE, some_picks
from tomocpt_stream.curation import curate, read_curated, write_curated
from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats import read_picks, write_picks
from tomocpt_stream.formats.side import same_places

if TYPE_CHECKING:
    from pathlib import Path

    from tomocpt_stream.picks import Picks


def edited(picks: Picks, keep: list[int], added: list[list[float]]) -> Picks:
    """Picks of which some were taken away, in another order, and some were added with any score."""
    return replace(
        picks,
        zyx=np.concatenate([picks.zyx[keep], np.reshape(added, (-1, 3))]),
        score=np.full(len(keep) + len(added), 0.123, np.float32),
        rotations=None,
    )


def test_kept_added_and_removed_picks() -> None:
    written = some_picks(10)
    found = curate(written, edited(written, [7, 2, 5], [[1, 2, 3], [4, 5, 6]]))
    np.testing.assert_array_equal(found.picks.score, [*written.score[[7, 2, 5]], 1, 1])
    assert found.manual.tolist() == [False] * 3 + [True] * 2
    np.testing.assert_array_equal(found.removed.zyx, written.zyx[[0, 1, 3, 4, 6, 8, 9]])
    np.testing.assert_array_equal(found.removed.score, written.score[[0, 1, 3, 4, 6, 8, 9]])
    assert str(found) == "TS_01: 3 kept, 2 added, 7 removed"
    assert (found.picks.voxel_size, found.picks.shape, found.picks.particle) == (
        VOXEL_SIZE,
        SHAPE,
        "ribosome",
    )


@pytest.mark.parametrize(("moved", "kept"), [(0.0099, 1), (0.0101, 0), (3.0, 0)])
def test_a_pick_that_was_moved_is_another(moved: float, kept: int) -> None:
    written = some_picks(1)
    found = curate(written, replace(written, zyx=written.zyx + np.array([0, moved, 0])))
    assert np.count_nonzero(~found.manual) == kept
    assert len(found.removed) == 1 - kept
    if kept:
        np.testing.assert_array_equal(found.picks.zyx, written.zyx)


def test_an_edit_in_napari(tmp_path: Path) -> None:
    """napari gives a new point the features of the one before."""
    written = some_picks(6, turned=True)
    write_picks(written, tmp_path / "a.csv", format="napari")
    lines = (tmp_path / "a.csv").read_text().splitlines()
    cells = lines[-1].split(",")
    new = ",".join(["6", "50.0", "60.0", "70.0", *cells[4:]])
    (tmp_path / "a.csv").write_text("\n".join([lines[0], *lines[2:5], *lines[6:], new]) + "\n")
    back = read_picks(tmp_path / "a.csv")["TS_01"]
    assert back.score[-1] == written.score[5]
    found = curate(written, back)
    np.testing.assert_array_equal(found.picks.score, [*written.score[[1, 2, 3, 5]], 1])
    assert found.manual.tolist() == [False] * 4 + [True]
    np.testing.assert_array_equal(found.removed.zyx, written.zyx[[0, 4]])
    assert found.picks.rotations is not None
    assert written.rotations is not None
    np.testing.assert_array_equal(found.picks.rotations[:4], written.rotations[[1, 2, 3, 5]])


def test_an_edit_in_3dmod(tmp_path: Path) -> None:
    """3dmod rewrites the contour; places are numbers of four bytes."""
    written = some_picks(5)
    write_picks(written, tmp_path / "a.mod")
    data = (tmp_path / "a.mod").read_bytes()
    at = data.index(b"CONT") + 4
    points = data[at + 16 : at + 16 + 60]
    moved = struct.pack(">3f", 10.5, 20.5, 30.0)
    head = struct.pack(">iIii", 5, 0, 0, 0)
    cut = data[: at - 4] + b"CONT" + head + points[12:] + moved + b"IEOF"
    (tmp_path / "a.mod").write_bytes(cut)
    found = curate(written, read_picks(tmp_path / "a.mod")["TS_01"])
    assert found.manual.tolist() == [False] * 4 + [True]
    np.testing.assert_array_equal(found.picks.zyx[:4], written.zyx[1:])
    np.testing.assert_array_equal(found.picks.zyx[4], [30, 20, 10])
    np.testing.assert_array_equal(found.picks.score[:4], written.score[1:])


def test_marks_survive_in_a_table_that_is_read_as_labels(tmp_path: Path) -> None:
    written = some_picks(8, turned=True)
    one = curate(written, replace(written.take(np.array([0, 1, 2])), tomogram="TS_01"))
    other = some_picks(4, seed=3, tomogram="TS_02", shape=None, voxel_size=None)
    two = curate(other, edited(other, [1], [[1, 2, 3]]))
    write_curated([one, two], tmp_path / "a.csv")
    labels = read_picks(tmp_path / "a.csv")
    assert {name: len(table) for name, table in labels.items()} == {"TS_01": 3, "TS_02": 2}
    assert labels["TS_02"].score[1] == 1
    for found, before in zip(read_curated(tmp_path / "a.csv"), (one, two), strict=True):
        np.testing.assert_array_equal(found.picks.zyx, before.picks.zyx)
        np.testing.assert_array_equal(found.picks.score, before.picks.score)
        np.testing.assert_array_equal(found.manual, before.manual)
        np.testing.assert_array_equal(found.removed.zyx, before.removed.zyx)
        assert (found.picks.rotations is None) is (before.picks.rotations is None)
    write_picks(other, tmp_path / "b.csv")
    with pytest.raises(FormatError, match="a curated table"):
        read_curated(tmp_path / "b.csv")


def test_all_may_be_removed(tmp_path: Path) -> None:
    written = some_picks(3)
    write_curated(curate(written, written.take(np.zeros(3, dtype=bool))), tmp_path / "a.csv")
    assert [(len(table), table.voxel_size) for table in read_picks(tmp_path / "a.csv").values()] == [
        (0, VOXEL_SIZE)
    ]
    (found,) = read_curated(tmp_path / "a.csv")
    assert (len(found.picks), len(found.removed)) == (0, 3)


def test_a_tomogram_without_particles_stays_one(tmp_path: Path) -> None:
    none, some = some_picks(0), some_picks(3, tomogram="TS_02")
    write_curated([curate(none, none), curate(some, some)], tmp_path / "a.csv")
    assert {name: len(one) for name, one in read_picks(tmp_path / "a.csv").items()} == {
        "TS_01": 0,
        "TS_02": 3,
    }
    found = read_curated(tmp_path / "a.csv")
    assert [(one.picks.tomogram, len(one.picks), len(one.removed)) for one in found] == [
        ("TS_01", 0, 0),
        ("TS_02", 3, 0),
    ]


@pytest.mark.parametrize("mark", ["Removed", ""])
def test_a_mark_that_nobody_knows_loses_no_row(tmp_path: Path, mark: str) -> None:
    written = some_picks(3)
    write_curated(curate(written, written), tmp_path / "a.csv")
    text = (tmp_path / "a.csv").read_text()
    (tmp_path / "a.csv").write_text(text.replace("picked", mark, 1))
    with pytest.raises(FormatError, match=rf"line 2 of .* has the mark '{mark}'"):
        read_curated(tmp_path / "a.csv")


def test_other_voxels_are_refused() -> None:
    with pytest.raises(FormatError, match=r"10\.012 Å and edited in voxels of 5\.0 Å"):
        curate(some_picks(2), some_picks(2, voxel_size=5.0))


@settings(max_examples=60, deadline=None)
@given(
    places=st.lists(st.integers(0, 3), min_size=0, max_size=12),
    keep=st.lists(st.booleans(), min_size=12, max_size=12),
    seed=st.integers(0, 1000),
)
def test_of_several_at_one_place_as_many_are_kept_as_there_are(
    places: list[int], keep: list[bool], seed: int
) -> None:
    first = np.array(places, dtype=float)[:, None] * [1.0, 2.0, 3.0]
    rows = np.random.default_rng(seed).permutation(len(first))
    rows = rows[np.array(keep[: len(first)], dtype=bool)[rows]] if len(rows) else rows
    second = first[rows] + np.random.default_rng(seed).uniform(-1e-5, 1e-5, (len(rows), 3))
    ours, theirs = same_places(first, second)
    assert len(set(theirs.tolist())) == len(theirs) == len(second)
    assert len(set(ours.tolist())) == len(ours)
    assert (np.abs(first[ours] - second[theirs]) < 1e-4).all()


def test_a_hundred_thousand_at_one_place_take_no_longer() -> None:
    places = np.zeros((100_000, 3))
    ours, theirs = same_places(places, places[:50_000])
    assert len(ours) == 50_000
    np.testing.assert_array_equal(ours, theirs)
