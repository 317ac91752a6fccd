from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.tables import SHAPE, VOXEL_SIZE, refused, some_picks
from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats import read_kinds, read_picks, write_picks
from tomocpt_stream.formats.ndjson import parse_ndjson

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("turned", [False, True])
def test_files_are_as_the_portal_has_them(tmp_path: Path, turned: bool) -> None:
    picks = some_picks(6, turned=turned)
    write_picks(picks, tmp_path / "TS_01.ndjson")
    data = (tmp_path / "TS_01.ndjson").read_bytes()
    found = parse_ndjson(data, "a")
    assert not data.endswith(b"\n")
    assert len(data.splitlines()) == 6
    assert found.kind == ("orientedPoint" if turned else "point")
    np.testing.assert_array_equal(found.zyx, picks.zyx)
    if turned:
        np.testing.assert_array_equal(found.rotations, picks.rotations)
    said = json.loads((tmp_path / "TS_01.json").read_text())
    assert said["object_count"] == 6
    assert said["annotation_object"]["name"] == "ribosome"
    assert said["files"] == [
        {
            "format": "ndjson",
            "path": "TS_01.ndjson",
            "shape": "OrientedPoint" if turned else "Point",
            "is_visualization_default": False,
        }
    ]
    assert (said["method_type"], said["ground_truth_status"]) == ("automated", False)


def test_a_folder_has_a_file_for_each_kind(tmp_path: Path) -> None:
    tables = [
        some_picks(4, turned=True),
        some_picks(3, seed=1, particle="Apo ferritin"),
        some_picks(2, seed=2, tomogram="TS 02"),
    ]
    write_picks(tables, tmp_path / "out", format="ndjson")
    names = sorted(str(one.relative_to(tmp_path / "out")) for one in tmp_path.rglob("*.*"))
    assert names == [
        "TS 02/ribosome-1.0.json",
        "TS 02/ribosome-1.0_point.ndjson",
        "TS 02/ribosome-1.0_point.ndjson.scores.csv",
        "TS_01/apo_ferritin-1.0.json",
        "TS_01/apo_ferritin-1.0_point.ndjson",
        "TS_01/apo_ferritin-1.0_point.ndjson.scores.csv",
        "TS_01/ribosome-1.0.json",
        "TS_01/ribosome-1.0_orientedpoint.ndjson",
        "TS_01/ribosome-1.0_orientedpoint.ndjson.scores.csv",
    ]
    found = read_kinds(tmp_path / "out", format="ndjson")
    assert [(table.tomogram, table.particle, len(table)) for table in found] == [
        ("TS 02", "ribosome", 2),
        ("TS_01", "Apo ferritin", 3),
        ("TS_01", "ribosome", 4),
    ]
    np.testing.assert_array_equal(found[2].score, tables[0].score)
    assert (found[1].voxel_size, found[1].shape) == (VOXEL_SIZE, SHAPE)


def test_a_maximum_refined_beyond_the_outermost_centre_is_put_there(tmp_path: Path) -> None:
    picks = some_picks(2, zyx=np.array([[-0.4, 3, 3], [SHAPE[0] - 0.6, SHAPE[1] - 0.5, 7.25]]))
    write_picks(picks, tmp_path / "a.ndjson")
    found = read_picks(tmp_path / "a.ndjson", shape=SHAPE)["TS_01"]
    assert found.zyx.tolist() == [[0, 3, 3], [SHAPE[0] - 1, SHAPE[1] - 1, 7.25]]
    np.testing.assert_array_equal(found.score, picks.score)  # of the side file, by place


@pytest.mark.parametrize("zyx", [[-0.51, 0, 0], [0, 0, SHAPE[2] - 0.4], [SHAPE[0], 3, 3]])
def test_points_outside_are_not_written_and_noticed_when_read(tmp_path: Path, zyx: list[float]) -> None:
    picks = some_picks(2, zyx=np.array([[0, 0, 0], zyx]))
    with pytest.raises(FormatError, match=r"1 outside of the 631 x 630 x 184 voxels.*point 2 at .*--margin"):
        write_picks(picks, tmp_path / "a.ndjson")
    assert not list(tmp_path.iterdir())
    write_picks(some_picks(2, zyx=picks.zyx, shape=None), tmp_path / "a.ndjson")
    with pytest.warns(UserWarning, match="1 outside of the 631 x 630 x 184"):
        assert len(read_picks(tmp_path / "a.ndjson", shape=SHAPE)["TS_01"]) == 2


def test_the_last_voxel_is_inside(tmp_path: Path) -> None:
    write_picks(some_picks(2, zyx=np.array([[0, 0, 0], np.array(SHAPE) - 1])), tmp_path / "a.ndjson")
    assert len(read_picks(tmp_path / "a.ndjson", shape=SHAPE)["TS_01"]) == 2


def test_the_count_of_the_annotation_is_that_of_the_points(tmp_path: Path) -> None:
    path = tmp_path / "ribosome-1.0_point.ndjson"
    path.write_text('{"type": "point", "location": {"x": 1, "y": 2, "z": 3}}')
    (tmp_path / "ribosome-1.0.json").write_text(
        json.dumps({"object_count": 2, "annotation_object": {"name": "cytosolic ribosome"}})
    )
    with pytest.raises(FormatError, match=r"1 objects where ribosome-1\.0\.json says 2"):
        read_picks(path)
    (tmp_path / "ribosome-1.0.json").write_text(
        json.dumps({"object_count": 1, "annotation_object": {"name": "cytosolic ribosome"}})
    )
    (found,) = read_picks(path, voxel_size=5.0).values()
    assert (found.particle, found.voxel_size) == ("cytosolic ribosome", 5.0)


def test_instances_are_counted_once(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "portal" / "expected_ndjson" / "InstanceSegmentation__tardis_binning_2.ndjson"
    path = tmp_path / "filament-1.0_instancesegmentation.ndjson"
    path.write_bytes(source.read_bytes())
    (tmp_path / "filament-1.0.json").write_text('{"object_count": 3}')
    assert len(read_picks(path)["filament-1.0_instancesegmentation"]) == 6


@pytest.mark.parametrize("said", ["{", "[" * 100_000, '{"object_count": 1e999}', '{"object_count": "x"}'])
def test_annotations_that_are_none_are_refused(tmp_path: Path, said: str) -> None:
    (tmp_path / "a.json").write_text(said)
    refused(tmp_path / "a.ndjson", '{"type": "point", "location": {"x": 1, "y": 2, "z": 3}}')


def test_two_tables_of_a_kind_have_no_place(tmp_path: Path) -> None:
    for format in ("ndjson", "copick"):  # noqa: A001
        with pytest.raises(FormatError, match="2 tables"):
            write_picks([some_picks(2), some_picks(3)], tmp_path / "out", format=format)
