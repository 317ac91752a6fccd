from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tables import SHAPE, VOXEL_SIZE, refused, some_picks, survives
from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats import read_kinds, read_picks, write_picks
from tomocpt_stream.formats.copick import parse_picks

if TYPE_CHECKING:
    from pathlib import Path

EYE = np.eye(4).tolist()


def point(**changes: Any) -> dict[str, Any]:
    location = {"x": 10.0, "y": 20.0, "z": 30.0}
    return {"location": location, "transformation_": EYE, "instance_id": 0, "score": 1.0, **changes}


def text(*points: Any, **changes: Any) -> str:
    said = {
        "pickable_object_name": "ribosome",
        "user_id": "a",
        "session_id": "1",
        "run_name": "TS_01",
        "voxel_spacing": 10.0,
        "unit": "angstrom",
        "points": list(points),
    }
    return json.dumps(said | changes)


def test_a_project_is_laid_out_as_copick_wants_it(tmp_path: Path) -> None:
    tables = [
        some_picks(4, turned=True),
        some_picks(3, seed=1, particle="apo-ferritin"),
        some_picks(2, seed=2, tomogram="TS 02", particle=""),
    ]
    write_picks(tables, tmp_path / "overlay", format="copick")
    files = sorted(str(one.relative_to(tmp_path / "overlay")) for one in tmp_path.rglob("*.json"))
    assert files == [
        "ExperimentRuns/TS 02/Picks/tomocpt-stream_1_particle.json",
        "ExperimentRuns/TS_01/Picks/tomocpt-stream_1_apo-ferritin.json",
        "ExperimentRuns/TS_01/Picks/tomocpt-stream_1_ribosome.json",
    ]
    said = json.loads((tmp_path / "overlay" / files[2]).read_text())
    assert set(said) == {
        "pickable_object_name",
        "user_id",
        "session_id",
        "run_name",
        "voxel_spacing",
        "unit",
        "trust_orientation",
        "points",
    }
    assert (said["pickable_object_name"], said["run_name"]) == ("ribosome", "TS_01")
    assert (said["voxel_spacing"], said["unit"], said["trust_orientation"]) == (VOXEL_SIZE, "angstrom", True)
    first = said["points"][0]
    assert set(first) == {"location", "transformation_", "instance_id", "score"}
    xyz = tables[0].zyx[0, ::-1] * VOXEL_SIZE
    np.testing.assert_allclose([first["location"][axis] for axis in "xyz"], xyz, atol=1e-6)
    assert first["transformation_"][3] == [0, 0, 0, 1]
    assert not json.loads((tmp_path / "overlay" / files[1]).read_text())["trust_orientation"]
    found = read_kinds(tmp_path / "overlay", format="copick", shape=SHAPE)
    assert [(table.tomogram, table.particle, len(table)) for table in found] == [
        ("TS 02", "particle", 2),
        ("TS_01", "apo-ferritin", 3),
        ("TS_01", "ribosome", 4),
    ]
    assert found[1].rotations is None
    np.testing.assert_allclose(found[2].rotations, tables[0].rotations, atol=1e-12)  # type: ignore[arg-type]
    only = read_picks(tmp_path / "overlay", format="copick", particle="apo-ferritin")
    assert set(only) == {"TS_01"}


def test_the_position_is_location_and_translation(tmp_path: Path) -> None:
    moved = [[1, 0, 0, 5.0], [0, 1, 0, -10.0], [0, 0, 1, 0.0], [0, 0, 0, 1]]
    (tmp_path / "a.json").write_text(text(point(transformation_=moved), point()))
    (found,) = read_picks(tmp_path / "a.json").values()
    np.testing.assert_allclose(found.zyx, [[3.0, 1.0, 1.5], [3.0, 2.0, 1.0]])
    assert found.rotations is None


@pytest.mark.parametrize(("trust", "turned"), [(True, True), (False, False), (None, False)])
def test_identities_turn_only_where_they_are_trusted(tmp_path: Path, trust: Any, turned: bool) -> None:
    (tmp_path / "a.json").write_text(text(point(), trust_orientation=trust))
    assert (read_picks(tmp_path / "a.json")["TS_01"].rotations is not None) is turned


def test_a_distrusted_matrix_is_no_rotation(tmp_path: Path) -> None:
    stretched = [[2, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    (tmp_path / "a.json").write_text(text(point(transformation_=stretched), trust_orientation=False))
    assert read_picks(tmp_path / "a.json")["TS_01"].rotations is None
    assert "does more than turn" in refused(tmp_path / "a.json", text(point(transformation_=stretched)))


def test_the_voxel_size_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text(point(), voxel_spacing=None, run_name=None))
    with pytest.raises(FormatError, match=r"does not say the voxel size of tomogram a.*voxel_size="):
        read_picks(tmp_path / "a.json")
    found = read_picks(tmp_path / "a.json", tomograms={"a": ((10, 20, 30), 5.0)})["a"]
    np.testing.assert_allclose(found.zyx, [[6, 4, 2]])
    assert found.shape == (10, 20, 30)


def test_a_run_is_known_by_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "ExperimentRuns" / "TS_07" / "Picks"
    folder.mkdir(parents=True)
    (folder / "a_1_ribosome.json").write_text(text(point(), run_name=None))
    assert set(read_picks(tmp_path, format="copick")) == {"TS_07"}
    (folder / "b_1_ribosome.json").write_text(text(point(), run_name=None))
    with pytest.raises(FormatError, match=r"b_1_ribosome\.json and a_1_ribosome\.json both have"):
        read_picks(tmp_path, format="copick")


def test_an_object_has_no_underscore(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="beta-amylase"):
        write_picks(some_picks(2, particle="beta_amylase"), tmp_path / "a.json")


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([point(), point(location={"x": 1, "y": 2})], "point 2 .* no whole point"),
        ([point(location={"x": "1", "y": 2, "z": 3})], "point 1 .* has '1'"),
        ([point(location={"x": True, "y": 2, "z": 3})], "point 1 .* has True"),
        ([point(location={"x": float("nan"), "y": 2, "z": 3})], "point 1 .* has nan"),
        ([point(location={"x": 10**400, "y": 2, "z": 3})], "point 1"),
        ([point(transformation_=[[1]])], "4 x 4 numbers"),
        ([point(score="high")], "point 1 .* has 'high'"),
        ([point(score=float("inf"))], "point 1"),
        ([3], "no whole point"),
        ([None], "no whole point"),
    ],
)
def test_points_that_are_not_whole_are_named(tmp_path: Path, points: list[Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_picks(text(*points).encode(), "a.json")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "no JSON"),
        (text(point())[:-40], "no JSON"),
        ("[" * 100_000, "no JSON"),
        ('{"points": ' + "[" * 5000 + "]" * 5000 + "}", ""),
        ("[]", "no object"),
        ('{"config_type": "filesystem"}', "an object without points"),
        (text(point(), unit="nanometer"), "the unit 'nanometer'"),
        (text(point(), voxel_spacing=-3), "voxel_spacing -3"),
        (text(point(), voxel_spacing="x"), "voxel_spacing x"),
        ('{"points": [{"location": {"x": ' + "9" * 10_000 + ', "y": 1, "z": 1}}]}', ""),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, data: str, message: str) -> None:
    assert message in refused(tmp_path / "a.json", data)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(
    key=st.sampled_from(
        ["location", "transformation_", "instance_id", "score", "points", "run_name", "unit"]
    ),
    value=JSON,
)
def test_any_value_anywhere(key: str, value: Any) -> None:
    said = text(point(**{key: value}), point()) if key in point() else text(point(), **{key: value})
    survives(lambda: parse_picks(said.encode(), "a.json"))


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 3700), junk=st.binary(max_size=8), end=st.integers(0, 4000))
def test_mutations_of_a_real_file(shared_data: Path, at: int, junk: bytes, end: int) -> None:
    data = (shared_data / "portal" / "in" / "copick.json").read_bytes()
    survives(lambda: parse_picks((data[:at] + junk + data[at + len(junk) :])[:end], "a.json"))
