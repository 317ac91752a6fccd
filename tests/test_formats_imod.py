from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import imodmodel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from tests.tables import SHAPE, VOXEL_SIZE, refused, some_picks, survives
from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats import imod_chunks, read_kinds, read_picks, write_picks
from tomocpt_stream.formats.imod import angles_of, matrices_of
from tomocpt_stream.formats.imod_chunks import HEADER, OBJECT, Contour, Object, parse_model, render_model

if TYPE_CHECKING:
    from pathlib import Path

HEAD = b"IMODV1.2" + bytes(HEADER.size)
OBJT = b"OBJT" + bytes(OBJECT.size)


def contour(*points: tuple[float, float, float], count: int | None = None) -> bytes:
    flat = [value for point in points for value in point]
    head = struct.pack(">iIii", len(points) if count is None else count, 0, 0, 0)
    return b"CONT" + head + struct.pack(f">{len(flat)}f", *flat)


@pytest.mark.parametrize(
    ("name", "kinds", "voxel_size"),
    [
        ("multiple_objects_example", {"chemo-array": 6}, 19.733334),
        ("point_sizes_example", {"SCATTERED_POINT_SIZE": 4, "OPEN_NO_POINTSIZE": 9, "object 3": 5}, 12.399),
        ("slicer_angle_example", {"": 4}, 16.145454),
        ("two_contour_example", {"": 25}, 4.48),
    ],
)
def test_real_models_are_read_as_imodmodel_reads_them(
    shared_data: Path, name: str, kinds: dict[str, int], voxel_size: float
) -> None:
    path = shared_data / "mod" / f"{name}.mod"
    tables = read_kinds(path)
    assert {table.particle: len(table) for table in tables} == kinds
    theirs = imodmodel.read(path)[["x", "y", "z"]].to_numpy()
    ours = np.concatenate([table.zyx for table in tables])[:, ::-1]
    np.testing.assert_allclose(ours, theirs - [0.5, 0.5, 0], atol=1e-6)
    assert {table.tomogram for table in tables} == {name}
    assert tables[0].voxel_size == pytest.approx(voxel_size, rel=1e-6)
    assert tables[0].shape is None
    plain = np.concatenate([table.zyx for table in read_kinds(path, half_voxel=False)])[:, ::-1]
    np.testing.assert_allclose(plain, theirs, atol=1e-6)


def test_a_model_of_several_kinds_asks_which(shared_data: Path) -> None:
    path = shared_data / "mod" / "point_sizes_example.mod"
    with pytest.raises(FormatError, match=r"3 kinds.*'object 3'.*particle="):
        read_picks(path)
    assert len(read_picks(path, particle="object 3")["point_sizes_example"]) == 5
    with pytest.raises(FormatError, match=r"no picks of 'ribosome'.*'object 3'"):
        read_picks(path, particle="ribosome")


def test_a_mesh_has_no_picks(shared_data: Path) -> None:
    with pytest.raises(FormatError, match=r"1 meshes and no point"):
        read_picks(shared_data / "mod" / "sfftk_mesh_only.mod")


def test_slicer_angles_turn_the_points_beside_them(shared_data: Path) -> None:
    path = shared_data / "mod" / "slicer_angle_example.mod"
    (points,) = read_picks(path).values()
    (centres,) = read_picks(path, format="imod_slicer").values()
    assert points.rotations is not None
    np.testing.assert_array_equal(points.rotations, centres.rotations)
    apart = np.abs(points.zyx - centres.zyx).max()
    assert 0.1 < apart < 1
    with pytest.raises(FormatError, match="no slicer angles"):
        read_picks(shared_data / "mod" / "two_contour_example.mod", format="imod_slicer")


def test_imodmodel_reads_what_is_written(tmp_path: Path) -> None:
    kinds = [some_picks(5, turned=True), some_picks(3, seed=1, turned=True, particle="apo-ferritin")]
    write_picks(kinds, tmp_path / "TS_01.mod")
    model = imodmodel.ImodModel.from_file(tmp_path / "TS_01.mod")
    assert [one.header.name for one in model.objects] == ["ribosome", "apo-ferritin"]
    assert all(one.header.flags.scattered for one in model.objects)
    assert (model.header.xmax, model.header.ymax, model.header.zmax) == SHAPE[::-1]
    assert (model.header.pixelsize, model.header.units) == (pytest.approx(1.0012), -9)
    assert model.minx is None
    for one, table in zip(model.objects, kinds, strict=True):
        (points,) = one.contours
        np.testing.assert_allclose(points.points, table.zyx[:, ::-1] + [0.5, 0.5, 0], atol=1e-4)
        assert [(value.type, value.index) for value in points.extra] == [(10, i) for i in range(len(table))]
        np.testing.assert_array_equal([value.value for value in points.extra], table.score)
    assert len(model.slicer_angles) == 8
    angles = imodmodel.read(tmp_path / "TS_01.mod", annotation="slicer_angles")
    turned = matrices_of(angles[["x_rot", "y_rot", "z_rot"]].to_numpy())
    assert kinds[0].rotations is not None
    np.testing.assert_allclose(turned[:5], kinds[0].rotations, atol=1e-6)
    np.testing.assert_allclose(angles["center_z"][:5], kinds[0].zyx[:, 0], atol=1e-4)


def test_a_model_tells_its_tomogram_and_a_foreign_one_its_file(tmp_path: Path) -> None:
    write_picks(some_picks(4), tmp_path / "anything.mod")
    found = read_picks(tmp_path / "anything.mod")
    assert list(found) == ["TS_01"]
    assert (found["TS_01"].voxel_size, found["TS_01"].shape) == (VOXEL_SIZE, SHAPE)
    (tmp_path / "theirs.mod").write_bytes(HEAD + OBJT + contour((1, 2, 3)) + b"IEOF")
    (table,) = read_picks(tmp_path / "theirs.mod").values()
    assert (table.tomogram, table.voxel_size, table.shape) == ("theirs", None, None)
    assert table.score.tolist() == [1]


def test_no_half_voxel_is_written_where_none_is_wanted(tmp_path: Path) -> None:
    picks = some_picks(3, zyx=np.array([[3.0, 2.0, 1.0]] * 3))
    write_picks(picks, tmp_path / "a.mod", half_voxel=False)
    assert imodmodel.read(tmp_path / "a.mod")[["x", "y", "z"]].iloc[0].tolist() == [1, 2, 3]
    np.testing.assert_array_equal(read_picks(tmp_path / "a.mod", half_voxel=False)["TS_01"].zyx, picks.zyx)


def test_a_point_without_a_value_has_score_1(tmp_path: Path) -> None:
    """As 3dmod leaves it where a point was added, and where one was deleted."""
    write_picks(some_picks(4), tmp_path / "a.mod")
    data = (tmp_path / "a.mod").read_bytes()
    at = data.index(b"COST")
    items = data[at + 8 : at + 8 + 4 * 12]
    kept = items[:12] + items[24:36]
    (tmp_path / "a.mod").write_bytes(data[:at] + b"COST" + struct.pack(">i", 24) + kept + data[at + 8 + 48 :])
    score = read_picks(tmp_path / "a.mod")["TS_01"].score
    np.testing.assert_array_equal(score, [some_picks(4).score[0], 1, some_picks(4).score[2], 1])


def test_points_that_were_added_to_turned_ones_are_noticed(tmp_path: Path) -> None:
    write_picks(some_picks(4, turned=True), tmp_path / "a.mod")
    data = (tmp_path / "a.mod").read_bytes()
    at = data.rindex(b"SLAN")
    (tmp_path / "a.mod").write_bytes(data[:at] + b"IEOF")
    with pytest.warns(UserWarning, match="1 of 4 points .* have no slicer angle"):
        assert read_picks(tmp_path / "a.mod")["TS_01"].rotations is None


def test_a_part_of_an_image_is_noticed(tmp_path: Path) -> None:
    head = bytearray(HEAD)
    head[8 + 128 : 8 + 140] = struct.pack(">3i", 500, 500, 200)
    head[8 + 144 : 8 + 148] = struct.pack(">I", 1 << 14)
    moved = struct.pack(">18f", *[1] * 3, 100, 0, 0, *[0] * 3, 10, 10, 10, 0, 0, 0, *[0] * 3)
    parts = [bytes(head), OBJT, contour((1, 2, 3)), b"MINX", struct.pack(">i", 72), moved, b"IEOF"]
    (tmp_path / "a.mod").write_bytes(b"".join(parts))
    with pytest.warns(UserWarning, match=r"part of its image.*\(10\.0, 0\.0, 0\.0\)"):
        (table,) = read_picks(tmp_path / "a.mod").values()
    assert table.voxel_size == 10


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_angles_are_those_of_the_matrix_and_of_the_slicer(seed: int) -> None:
    matrices = Rotation.random(20, rng=np.random.default_rng(seed)).as_matrix()
    angles = angles_of(matrices)
    assert (np.abs(angles[:, 0]) <= 90).all()
    assert (np.abs(angles[:, 1:]) <= 180).all()
    np.testing.assert_allclose(matrices_of(angles), matrices, atol=1e-12)


@pytest.mark.parametrize("angles", [(0, 90, 0), (0, -90, 45), (180, 0, 0), (90, 0, 0), (-90, 180, 17)])
def test_angles_at_the_poles(angles: tuple[float, float, float]) -> None:
    matrices = matrices_of(np.array([angles], dtype=float))
    np.testing.assert_allclose(matrices_of(angles_of(matrices)), matrices, atol=1e-7)


def test_models_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mod"
    assert "begins with" in refused(path, b"")
    assert "begins with" in refused(path, b"imod 1\nobject 0 1 0\n" * 40)
    assert "0 bytes left" in refused(path, HEAD)
    assert "0 bytes left" in refused(path, HEAD + OBJT + contour((1, 2, 3)))
    assert "at byte 244 60 bytes left where an object takes 176" in refused(path, HEAD + OBJT[:64])
    assert "the name of a chunk" in refused(path, HEAD + b"\0\1\2\3")
    assert "outside any object" in refused(path, HEAD + contour((1, 2, 3)) + b"IEOF")
    assert "outside any contour" in refused(path, HEAD + OBJT + b"SIZE" + bytes(8) + b"IEOF")


@pytest.mark.parametrize("count", [2**31 - 1, -1, -(2**31), 178956971, 2])
def test_absurd_counts_are_refused_before_anything_is_read(tmp_path: Path, count: int) -> None:
    data = HEAD + OBJT + contour((1, 2, 3), count=count) + b"IEOF"
    assert f"a contour of {count} points" in refused(tmp_path / "a.mod", data)
    mesh = HEAD + OBJT + b"MESH" + struct.pack(">iiIhh", count, count, 0, 0, 0) + b"IEOF"
    assert "a mesh of" in refused(tmp_path / "a.mod", mesh)
    chunk = HEAD + OBJT + b"VIEW" + struct.pack(">i", count if count != 2 else 99) + b"IEOF"
    assert "the chunk VIEW" in refused(tmp_path / "a.mod", chunk)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_points_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    data = HEAD + OBJT + contour((1, 2, 3), (4, value, 6)) + b"IEOF"
    assert f"at byte 456 a point with y {np.float32(value):g}" in refused(tmp_path / "a.mod", data)


def test_a_long_chain_of_empty_chunks_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = HEAD + OBJT + (b"VIEW" + bytes(4)) * 100_000 + contour((1, 2, 3)) + b"IEOF"
    (tmp_path / "a.mod").write_bytes(data)
    assert len(read_picks(tmp_path / "a.mod")["a"]) == 1
    monkeypatch.setattr(imod_chunks, "MOST_CHUNKS", 1000)
    assert "more than 1000 chunks" in refused(tmp_path / "a.mod", data)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(["point_sizes_example", "slicer_angle_example", "two_contour_example"]),
    at=st.integers(0, 5000),
    junk=st.binary(max_size=12),
    end=st.integers(0, 6000),
)
def test_mutations_of_real_models(shared_data: Path, name: str, at: int, junk: bytes, end: int) -> None:
    data = (shared_data / "mod" / f"{name}.mod").read_bytes()
    survives(lambda: parse_model((data[:at] + junk + data[at + len(junk) :])[:end], "a.mod"))


def test_what_a_model_cannot_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mod"
    for table in (
        some_picks(2, particle="x" * 64),
        some_picks(2, tomogram="x" * 120),
        some_picks(2, rotations=np.zeros((2, 3, 3))),
    ):
        with pytest.raises(FormatError):
            write_picks(table, path)
    with pytest.raises(FormatError, match="rotations beside"):
        write_picks([some_picks(2), some_picks(2, particle="b", turned=True)], path)
    with pytest.raises(FormatError, match="several tables"):
        write_picks([some_picks(2), some_picks(3)], path)
    with pytest.raises(FormatError, match="voxel size"):
        write_picks([some_picks(2), replace(some_picks(2, particle="b"), voxel_size=3.0)], path)
    assert not path.exists()


def test_many_objects_take_no_time_squared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hostile model may have a million: one is never looked for among the others."""
    compared = 0

    def equal(self: Object, other: object) -> bool:
        nonlocal compared
        compared += 1
        return self is other

    monkeypatch.setattr(Object, "__eq__", equal)
    objects = [Object(f"{i}", [Contour(np.array([[1.0, 2.0, 3.0]]))]) for i in range(300)]
    (tmp_path / "a.mod").write_bytes(render_model("", (1, 1, 1), None, objects, np.zeros((0, 6))))
    assert [table.particle for table in read_kinds(tmp_path / "a.mod")] == [f"{i}" for i in range(300)]
    assert compared == 0
