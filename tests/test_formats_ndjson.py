from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats import ndjson, read_picks
from tomocpt_stream.formats.ndjson import PointRecords, parse_ndjson, read_ndjson

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FINITE = st.floats(-1e6, 1e6) | st.integers(-(10**6), 10**6)
EYE = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def line(kind: str = "point", x: Any = 1.5, y: Any = 2, z: Any = 3, **more: Any) -> str:
    return json.dumps({"type": kind, "location": {"x": x, "y": y, "z": z}, **more})


def parsed(*lines: str) -> PointRecords:
    return parse_ndjson("\n".join(lines).encode(), "points.ndjson")


def wrong(*lines: str) -> FormatError:
    with pytest.raises(FormatError) as error:
        parsed(*lines)
    return error.value


def expected(shared_data: Path) -> list[tuple[Path, dict[str, Any]]]:
    folder = shared_data / "portal" / "expected_ndjson"
    index = json.loads((folder / "index.json").read_text())
    return [(folder / entry["file"], entry) for entry in index]


def test_every_file_that_the_portal_writes_is_read(shared_data: Path) -> None:
    files = expected(shared_data)
    assert len(files) == 25
    kinds = {"Point": "point", "OrientedPoint": "orientedPoint", "InstanceSegmentation": "instancePoint"}
    for path, entry in files:
        found = parse_ndjson(path.read_bytes(), path.name)
        records = [json.loads(text) for text in path.read_text().splitlines()]
        assert (len(found), found.kind) == (entry["count"], kinds[path.name.split("__")[0]])
        np.testing.assert_array_equal(
            found.zyx[:, ::-1], [[record["location"][axis] for axis in "xyz"] for record in records]
        )
        if found.kind == "orientedPoint":
            assert found.rotations is not None
            np.testing.assert_array_equal(
                found.rotations, [record["xyz_rotation_matrix"] for record in records]
            )
            assert found.instances is None
        elif found.kind == "instancePoint":
            assert found.instances is not None
            assert found.instances.tolist() == [record["instance_id"] for record in records]
            assert found.objects == len(set(found.instances.tolist()))
        else:
            assert found.rotations is None
            assert found.instances is None
            assert found.objects == len(found)


def test_matrices_are_those_of_the_relion_file_they_came_from(shared_data: Path) -> None:
    star = shared_data / "portal" / "in" / "relion_3_star.star"
    ours = np.concatenate([picks.rotations for picks in read_picks(star).values()])
    seen = 0
    for path, _ in expected(shared_data):
        if path.name.startswith("OrientedPoint__relion3"):
            for matrix in read_ndjson(path).rotations:  # type: ignore[union-attr]
                assert np.abs(ours - matrix).max(axis=(1, 2)).min() < 1e-6
                seen += 1
    assert seen >= 5


def test_a_file_is_read_as_picks(tmp_path: Path) -> None:
    path = tmp_path / "ribosome-1.0_orientedpoint.ndjson"
    turn = Rotation.from_euler("ZYZ", [10, 20, 30], degrees=True).as_matrix()
    lines = [line("orientedPoint", 1.5, 2, 3, xyz_rotation_matrix=turn.tolist())] * 2
    path.write_text("\n".join(lines))
    picks = read_ndjson(path, voxel_size=10.012, shape=(20, 30, 40), particle="ribosome")
    assert picks.zyx.tolist() == [[3, 2, 1.5]] * 2
    assert picks.score.tolist() == [1, 1]
    assert picks.rotations is not None
    np.testing.assert_array_equal(picks.rotations[1], turn)
    assert (picks.voxel_size, picks.shape) == (10.012, (20, 30, 40))
    assert (picks.tomogram, picks.particle) == ("ribosome-1.0_orientedpoint", "ribosome")
    assert read_ndjson(path, tomogram="TS_1").tomogram == "TS_1"
    with pytest.raises(FormatError, match=r"no file .*none\.ndjson"):
        read_ndjson(tmp_path / "none.ndjson")


def test_lines_may_be_empty_and_end_as_on_windows() -> None:
    found = parse_ndjson(
        b"\xef\xbb\xbf\r\n" + line(x=1).encode() + b"\r\n\n  \n" + line(x=2).encode() + b"\n", "p"
    )
    assert found.zyx[:, 2].tolist() == [1, 2]
    empty = parse_ndjson(b"", "p")
    assert (len(empty), empty.kind, empty.zyx.shape, empty.objects) == (0, None, (0, 3), 0)
    assert parse_ndjson(b"\n \n", "p").kind is None


def test_keys_that_nobody_knows_are_passed_over() -> None:
    assert parsed(line(score=0.5, xyz_rotation_matrix="none"))  # points have no matrix


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{", "'{' (Expecting property name"),
        ('{"type": "point", "location": {"x": 1, "y": 2,', '\'{"type": "point", "locat'),
        ("[1, 2, 3]", "[1, 2, 3], which is no object"),
        ("null", "null, which is no object"),
        ('"point"', '"point", which is no object'),
        (line() + line(), "more follows after character"),
        ("\ufffe\x00", "Expecting value"),
        (json.dumps({"location": {"x": 1, "y": 2, "z": 3}}), "no type"),
        (line("Point"), 'type "Point"'),
        (line(["point"]), 'type ["point"]'),  # type: ignore[arg-type]
        (json.dumps({"type": "point"}), "no location"),
        (json.dumps({"type": "point", "location": [1, 2, 3]}), "location [1, 2, 3]"),
        (json.dumps({"type": "point", "location": {"x": 1, "y": 2}}), 'location {"x": 1, "y": 2}'),
        (json.dumps({"type": "point", "location": {}}), "location {}"),
        (line(x=None), '"x": null'),
        (line(y="2"), '"y": "2"'),
        (line(z=True), '"z": true'),
        (line(z=[1]), '"z": [1]'),
        (line(x=float("nan")), '"x": NaN'),
        (line(x=float("-inf")), '"x": -Infinity'),
        (line().replace("1.5", "1e999"), '"x": Infinity'),
        (line(x=1e9), '"x": 1000000000.0'),
        (line(x=10**400), '"x": 1000000'),
        (line().replace("1.5", "9" * 5000), "Exceeds the limit"),
        (line(x="a" * 70000), "bytes"),
        ("[" * 60000, "recursion"),
        (line(y=json.loads("[" * 200 + "]" * 200)), '"y": [[['),
    ],
)
@pytest.mark.parametrize("before", [0, 1, 3])
def test_the_line_to_blame_is_named(text: str, found: str, before: int) -> None:
    error = wrong(*[line()] * before, text, line())
    assert error.found.startswith(f"line {before + 1} of points.ndjson has ")
    assert found in error.found
    assert len(error.found) < 400


def test_bytes_that_are_no_text_are_an_error() -> None:
    with pytest.raises(FormatError, match=r"line 2 of p has .*\\xff"):
        parse_ndjson(line().encode() + b"\n\xff\xfe", "p")


def test_one_file_has_points_of_one_kind() -> None:
    error = wrong(line(), line(), line("orientedPoint", xyz_rotation_matrix=EYE))
    assert error.found == 'line 3 of points.ndjson has type "orientedPoint"'
    assert "'point' as in the lines before" in error.expected


def _turned(change: Callable[[Any], None]) -> Any:
    matrix = Rotation.from_euler("ZYZ", [10, 20, 30], degrees=True).as_matrix()
    change(matrix)
    return matrix.tolist()


@pytest.mark.parametrize(
    "matrix",
    [
        None,
        1,
        "abc",
        [],
        [[1, 0, 0], [0, 1, 0]],
        [[1, 0, 0], [0, 1, 0], [0, 0]],
        [[1, 0, 0, 0, 1, 0, 0, 0, 1]],
        [[1], [0], [0], [0], [1], [0], [0], [0], [1]],
        [[1, 0, 0], "abc", [0, 0, 1]],
        [[1, 0, 0], [0, 1, 0], [0, 0, True]],
        [[1, 0, 0], [0, 1, 0], [0, 0, float("nan")]],
        [[1, 0, 0], [0, 1, 0], [0, 0, 10**400]],
        [[1, 0, 0], [0, 1, 0], [0, 0, 1e200]],
        [[1, 0, 0], [0, 1, 0], [0, 0, -1]],  # a mirror
        [[0] * 3] * 3,
        [[1.002, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[1, 0.002, 0], [0, 1, 0], [0, 0, 1]],
        [[2, 0, 0], [0, 0.5, 0], [0, 0, 1]],
    ],
)
def test_a_matrix_that_is_no_rotation_is_named(matrix: Any) -> None:
    good = line("orientedPoint", xyz_rotation_matrix=EYE)
    error = wrong(good, good, line("orientedPoint", xyz_rotation_matrix=matrix), good)
    assert error.found.startswith("line 3 of points.ndjson has xyz_rotation_matrix ")
    assert "determinant +1" in error.expected


def test_a_rounded_rotation_is_one() -> None:
    assert wrong(line("orientedPoint")).found.endswith("has no xyz_rotation_matrix")
    matrix = np.round(Rotation.from_euler("ZYZ", [10, 20, 30], degrees=True).as_matrix(), 3).tolist()
    found = parsed(line("orientedPoint", xyz_rotation_matrix=matrix))
    assert found.rotations is not None
    assert found.rotations.tolist() == [matrix]


@pytest.mark.parametrize("value", [None, 1.0, "1", True, 2**63, -(2**63) - 1, [1]])
def test_an_instance_is_an_integer(value: Any) -> None:
    good = line("instancePoint", instance_id=2**63 - 1)
    error = wrong(good, line("instancePoint", instance_id=value))
    assert error.found.startswith("line 2 of points.ndjson has instance_id ")
    assert wrong(line("instancePoint")).found.endswith("has no instance_id")


def test_instances_are_counted_once() -> None:
    found = parsed(*(line("instancePoint", instance_id=number) for number in (7, -1, 7, 0)))
    assert found.instances is not None
    assert found.instances.tolist() == [7, -1, 7, 0]
    assert (len(found), found.objects) == (4, 3)


@settings(max_examples=60, deadline=None)
@given(
    points=st.lists(st.tuples(FINITE, FINITE, FINITE), max_size=6),
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(ndjson.KINDS),
)
def test_what_is_written_comes_back(points: list[tuple[float, float, float]], seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    turns = Rotation.random(len(points), rng=rng).as_matrix() if points else np.empty((0, 3, 3))
    marks = rng.integers(-5, 5, len(points))
    more: list[dict[str, Any]] = [{} for _ in points]
    for row, extra in enumerate(more):
        if kind == "orientedPoint":
            extra["xyz_rotation_matrix"] = turns[row].tolist()
        if kind == "instancePoint":
            extra["instance_id"] = int(marks[row])
    found = parsed(*(line(kind, *point, **extra) for point, extra in zip(points, more, strict=True)))
    assert found.zyx[:, ::-1].tolist() == [list(map(float, point)) for point in points]
    if points and kind == "orientedPoint":
        np.testing.assert_array_equal(found.rotations, turns)
    if points and kind == "instancePoint":
        np.testing.assert_array_equal(found.instances, marks)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "location", "x", "y", "z", "instance_id"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(ndjson.KINDS),
    lines=st.lists(
        st.tuples(
            st.sampled_from(["type", "location", "xyz_rotation_matrix", "instance_id", "cut", "whole"]), JSON
        ),
        max_size=4,
    ),
    cut=st.integers(0, 200),
)
def test_anything_else_is_points_or_an_error_that_names_a_line(
    kind: str, lines: list[tuple[str, Any]], cut: int
) -> None:
    texts = [line(kind, xyz_rotation_matrix=EYE, instance_id=1)]
    for what, value in lines:
        record: Any = {"type": kind, "location": {"x": 1, "y": 2, "z": 3}, "xyz_rotation_matrix": EYE}
        record["instance_id"] = 0
        if what == "cut":
            texts.append(json.dumps(record)[:cut])
        else:
            texts.append(json.dumps(value if what == "whole" else {**record, what: value}))
    try:
        found = parsed(*texts)
    except FormatError:
        said = wrong(*texts).found
        number = int(said.split()[1])
        assert 1 < number <= len(texts)
        assert wrong(*texts[:number]).found == said
    else:
        assert len(found) == sum(bool(text.strip()) for text in texts)
        assert np.isfinite(found.zyx).all()


def test_any_depth_is_an_error_that_names_the_line() -> None:
    for depth in range(800, 1000):
        error = wrong(line().replace("1.5", "[" * depth + "]" * depth))
        assert error.found.startswith("line 1 of points.ndjson has ")


@pytest.mark.parametrize("batch", [1, 300])
def test_long_files_are_read_a_batch_at_a_time(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ndjson, "_BATCH", batch)
    marked = parsed(*(line("instancePoint", instance_id=number // 2) for number in range(50)))
    assert marked.instances is not None
    assert marked.instances.tolist() == [number // 2 for number in range(50)]
    assert len(parsed(*[line("orientedPoint", xyz_rotation_matrix=EYE)] * 9).rotations) == 9  # type: ignore[arg-type]
    lines = [line(x=number) for number in range(50)]
    assert parsed(*lines).zyx[:, 2].tolist() == list(range(50))
    lines[40] = line(x="?")
    assert wrong(*lines).found.startswith("line 41 of")
    lines[40] = line("instancePoint", instance_id=1)
    assert wrong(*lines).found == 'line 41 of points.ndjson has type "instancePoint"'
    lines[40] = ""
    assert len(parsed(*lines)) == 49


def test_a_million_points_are_read() -> None:
    text = (line(x=7, y=1.5, z=0) + "\n").encode() * 999_999 + line(x=999_999, y=1.5, z=0).encode()
    found = parse_ndjson(text, "p")
    assert len(found) == 1_000_000
    assert found.zyx[-1].tolist() == [0, 1.5, 999_999]


def test_a_file_too_large_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "points.ndjson"
    path.write_text(line())
    monkeypatch.setattr(ndjson, "LARGEST_FILE", len(line()) - 1)
    monkeypatch.setattr(type(path), "read_bytes", lambda _: pytest.fail("read"))
    with pytest.raises(FormatError, match="a file of points, of at most"):
        read_ndjson(path)
    with pytest.raises(FormatError, match=r"p has 0\.0 GB"):
        parse_ndjson(line().encode(), "p")
    monkeypatch.setattr(ndjson, "LARGEST_FILE", len(line()))
    assert len(parse_ndjson(line().encode(), "p")) == 1
