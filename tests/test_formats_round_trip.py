"""Every format that is read and written, through every other: what each has a place for comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.tables import ASKED, BOTH, OPTIONS, SHAPE, VOXEL_SIZE, file_of, some_picks
from tomocpt_stream.formats import FORMATS, read_picks, write_picks

if TYPE_CHECKING:
    from pathlib import Path

    from tomocpt_stream.picks import Picks

# Formats without a place for a matrix; where one of them is on the way, rotations end there.
UNTURNED = {"czii", "portal_csv", "coords", "deepetpicker"}


def through(picks: Picks, folder: Path, format: str) -> Picks:  # noqa: A002
    path = file_of(folder, format)
    write_picks(picks, path, format=format, **ASKED.get(format, {}))
    (found,) = read_picks(path, format=format, **OPTIONS, **ASKED.get(format, {})).values()
    return found


def test_the_formats_of_the_issue_are_there() -> None:
    assert {"relion31", "relion5", "imod", "copick", "ndjson", "csv", "tsv", "napari", "coords"} <= set(BOTH)
    assert FORMATS["dynamo"].reads
    assert not FORMATS["dynamo"].writes


@pytest.mark.parametrize("second", BOTH)
@pytest.mark.parametrize("first", BOTH)
def test_picks_come_through_two_formats(first: str, second: str, tmp_path: Path) -> None:
    picks = some_picks(turned=True)
    found = through(through(picks, tmp_path / "a", first), tmp_path / "b", second)
    np.testing.assert_allclose(found.zyx, picks.zyx, atol=1e-3, rtol=0)
    np.testing.assert_allclose(found.score, picks.score, atol=1e-5, rtol=0)
    assert (found.tomogram, found.shape) == ("TS_01", SHAPE)
    assert found.voxel_size == pytest.approx(VOXEL_SIZE, rel=1e-7)
    if {first, second} & UNTURNED:
        assert found.rotations is None
    else:
        assert found.rotations is not None
        assert picks.rotations is not None
        np.testing.assert_allclose(found.rotations, picks.rotations, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", BOTH)
def test_half_a_voxel_is_not_lost_or_won(name: str, tmp_path: Path) -> None:
    where = np.array([[0.0, 0.0, 0.0], [0.5, 1.25, 2.0], [183.0, 629.0, 630.0]])
    found = through(some_picks(3, zyx=where), tmp_path, name)
    np.testing.assert_allclose(found.zyx, where, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [name for name in BOTH if name != "czii"])
def test_a_tomogram_without_picks_comes_back_as_one(name: str, tmp_path: Path) -> None:
    found = through(some_picks(0), tmp_path, name)
    assert (len(found), found.tomogram) == (0, "TS_01")


@pytest.mark.parametrize("name", BOTH)
def test_two_tomograms_come_back_from_one_place(name: str, tmp_path: Path) -> None:
    """Where a format has one tomogram a file, the place is a folder."""
    tables = {"TS_01": some_picks(5, seed=1), "TS 02": some_picks(4, seed=2, tomogram="TS 02")}
    path = tmp_path / "all" if FORMATS[name].folder else tmp_path / "all.txt"
    write_picks(tables, path, format=name, **ASKED.get(name, {}))
    found = read_picks(path, format=name, **OPTIONS, **ASKED.get(name, {}))
    assert set(found) == set(tables)
    for key, table in tables.items():
        np.testing.assert_allclose(found[key].zyx, table.zyx, atol=1e-3, rtol=0)
        np.testing.assert_allclose(found[key].score, table.score, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [name for name in BOTH if FORMATS[name].folder])
def test_a_file_of_one_tomogram_takes_no_second(name: str, tmp_path: Path) -> None:
    tables = [some_picks(2), some_picks(2, tomogram="TS_02")]
    path = file_of(tmp_path, name)
    with pytest.raises(Exception, match=r"picks of 2 tomograms|2 tables of picks"):
        write_picks(tables, path, format=name)
    assert not path.exists()


@pytest.mark.parametrize("name", [name for name in BOTH if FORMATS[name].folder])
def test_a_tomogram_is_not_a_path(name: str, tmp_path: Path) -> None:
    for bad in ("../TS_01", "a/b", "..", "", "a\\b", "/etc/x", "a\nb"):
        with pytest.raises(Exception, match="tomogram name"):
            write_picks(some_picks(2, tomogram=bad), tmp_path / "inner" / "all", format=name)
    assert not list(tmp_path.rglob("*.*"))
