from __future__ import annotations

import gzip
import json
import os
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.mrc_writer import write_mrc
from tests.test_omezarr import binned, scale, translation, write_image
from tomocpt_stream.errors import BrokenSourceError, SourceError
from tomocpt_stream.frame import turn
from tomocpt_stream.tomogram import open_tomogram

if TYPE_CHECKING:
    from collections.abc import Callable

    from tomocpt_stream.frame import Box
    from tomocpt_stream.tomogram import Tomogram

TRUTH = np.random.default_rng(0).normal(size=(6, 11, 9)).astype("f4")


def whole(tomogram: Tomogram) -> Any:
    z, y, x = tomogram.shape
    return tomogram.read((slice(0, z), slice(0, y), slice(0, x)))


def turned(volume: Any) -> Any:
    """The volume turned by its definition: new z is y, new y is z from the far face."""
    return volume.transpose(1, 0, 2)[:, ::-1, :]


def mrc_path(folder: Path) -> Path:
    return write_mrc(folder / "TS_01.mrc", TRUTH)


def gzip_path(folder: Path) -> Path:
    path = folder / "TS_01.mrc.gz"
    path.write_bytes(gzip.compress(mrc_path(folder).read_bytes()))
    return path


def array_path(folder: Path) -> Path:
    make = {"shape": TRUTH.shape, "dtype": "f4", "chunks": (3, 4, 5)}
    zarr.create_array(folder / "TS_01.zarr", **make)[:] = TRUTH  # type: ignore[arg-type]
    return folder / "TS_01.zarr"


def image_path(folder: Path) -> Path:
    path = folder / "TS_01.ome.zarr"
    write_image(str(path), {"0": TRUTH}, form=2, transforms={"0": [scale(10, 10, 10)]})
    return path


def stored_array(folder: Path) -> Any:
    return zarr.open_array(array_path(folder), mode="r")


SOURCES: dict[str, Callable[[Path], Any]] = {
    "mrc": mrc_path,
    "mrc.gz": gzip_path,
    "zarr": array_path,
    "ome.zarr": image_path,
    "zarr array": stored_array,
    "numpy": lambda _: TRUTH,
    "dask": lambda _: da.from_array(TRUTH, chunks=(3, 4, 5)),
    "zarr in memory": lambda _: zarr.array(TRUTH, chunks=(3, 4, 5)),
}


@pytest.mark.parametrize("beam_axis", ["z", "y"])
@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_reads_alike(tmp_path: Path, kind: str, beam_axis: Any) -> None:
    source = SOURCES[kind](tmp_path)
    tomogram = open_tomogram(source, voxel_size=10, beam_axis=beam_axis)
    expected = TRUTH if beam_axis == "z" else turned(TRUTH)
    assert tomogram.shape == expected.shape
    assert tomogram.voxel_size == 10
    assert tomogram.dtype == np.float32
    assert all(0 < edge <= n for edge, n in zip(tomogram.chunks, tomogram.shape, strict=True))
    np.testing.assert_array_equal(whole(tomogram), expected)
    box = (slice(1, 5), slice(2, 6), slice(3, 8))
    for reader in (tomogram, pickle.loads(pickle.dumps(tomogram))):
        found = reader.read(box)
        np.testing.assert_array_equal(found, expected[box])
        assert found.dtype == np.float32
        assert found.flags.c_contiguous
        assert found.flags.writeable
        found[:] = 0  # the array is the caller's own
        np.testing.assert_array_equal(reader.read(box), expected[box])
    lazy = tomogram.to_dask()
    assert lazy.dtype == np.float32
    assert lazy.chunksize == tomogram.chunks
    np.testing.assert_array_equal(lazy[box].compute(scheduler="threads"), expected[box])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(lazy)).compute(scheduler="sync"), expected)
    fingerprint = open_tomogram(source, voxel_size=10, beam_axis=beam_axis).fingerprint
    assert fingerprint == tomogram.fingerprint
    assert fingerprint != open_tomogram(source, voxel_size=11, beam_axis=beam_axis).fingerprint
    other = open_tomogram(source, voxel_size=10, beam_axis="y" if beam_axis == "z" else "z")
    assert fingerprint != other.fingerprint


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_box_of_a_turned_volume_is_the_turned_volumes_box(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(*[st.integers(1, 6)] * 3))
    volume = np.arange(np.prod(shape), dtype="f4").reshape(shape)
    tomogram = open_tomogram(volume, voxel_size=3, beam_axis="y")
    edges = [
        sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True)))
        for n in tomogram.shape
    ]
    box: Any = tuple(slice(start, stop) for start, stop in edges)
    np.testing.assert_array_equal(tomogram.read(box), turned(volume)[box])


def test_the_frame_brings_turned_voxels_back_to_the_file() -> None:
    tomogram = open_tomogram(TRUTH, voxel_size=3, beam_axis="y")
    read = whole(tomogram)
    assert tomogram.frame.beam_axis == "y"
    assert tomogram.frame.file_shape == TRUTH.shape
    for index in [(0, 0, 0), (10, 5, 8), (3, 1, 7)]:
        z, y, x = tomogram.frame.to_file([index])[0].astype(int)
        assert read[index] == TRUTH[z, y, x]
        np.testing.assert_array_equal(turn(tomogram.frame.to_file([index]), TRUTH.shape), [index])
        np.testing.assert_array_equal(tomogram.frame.to_source([[z, y, x]]), [index])


@pytest.mark.parametrize("beam_axis", ["z", "y"])
@pytest.mark.parametrize("steps", [[scale(20, 20, 20)], [scale(20, 20, 20), translation(0, 5, 7.5)]])
def test_a_coarser_level_lies_on_the_fine_one(tmp_path: Path, beam_axis: Any, steps: Any) -> None:
    # A voxel's position is written into it, so that its own value says where it should lie.
    shape = (7, 10, 8)
    fine = np.zeros(shape, "f4")
    coarse = np.zeros((4, 5, 4), "f4")
    path = tmp_path / "a.zarr"
    write_image(str(path), {"0": fine, "1": coarse}, transforms={"0": [scale(10, 10, 10)], "1": steps})
    tomogram = open_tomogram(path, level=1, beam_axis=beam_axis)
    assert tomogram.voxel_size == 20
    assert tomogram.frame.file_voxel_size == 10
    assert tomogram.frame.file_shape == shape
    assert tomogram.shape == ((4, 5, 4) if beam_axis == "z" else (5, 4, 4))
    shift = np.array([0.5] * 3 if len(steps) == 1 else [0, 0.5, 0.75])
    in_level = np.array([[0, 0, 0], [3, 4, 3], [1, 2, 3]])
    as_read = in_level if beam_axis == "z" else turn(in_level.astype(float), (4, 5, 4))
    np.testing.assert_allclose(tomogram.frame.to_file(as_read), in_level * 2 + shift)
    np.testing.assert_allclose(tomogram.frame.to_source(in_level * 2 + shift), as_read)


def test_a_level_of_block_means_reads_as_such(tmp_path: Path) -> None:
    fine = np.random.default_rng(1).normal(size=(8, 6, 4)).astype("f4")
    path = tmp_path / "a.zarr"
    write_image(
        str(path),
        {"0": fine, "1": binned(fine)},
        transforms={"0": [scale(5, 5, 5)], "1": [scale(10, 10, 10)]},
    )
    tomogram = open_tomogram(path, level=1)
    np.testing.assert_array_equal(whole(tomogram), binned(fine))
    assert tomogram.fingerprint != open_tomogram(path, voxel_size=10).fingerprint
    # voxel_size is that of level 0, so that a level keeps its ratio.
    assert open_tomogram(path, level=1, voxel_size=7).voxel_size == 14


def test_a_level_coarser_along_one_axis_only_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    write_image(
        str(path),
        {"0": TRUTH, "1": TRUTH[:, ::2, ::2]},
        transforms={"0": [scale(5, 5, 5)], "1": [scale(5, 10, 10)]},
    )
    with pytest.raises(SourceError, match=r"coarser by \(1.0, 2.0, 2.0\) along z, y, x"):
        open_tomogram(path, level=1)


@pytest.mark.parametrize("kind", SOURCES)
def test_other_levels_are_not_there(tmp_path: Path, kind: str) -> None:
    with pytest.raises(SourceError, match="no level 1"):
        open_tomogram(SOURCES[kind](tmp_path), voxel_size=10, level=1)


@pytest.mark.parametrize("kind", ["zarr", "zarr array", "numpy", "dask", "zarr in memory"])
def test_arrays_need_a_voxel_size(tmp_path: Path, kind: str) -> None:
    with pytest.raises(SourceError, match=r"states no voxel size .*; pass voxel_size in Å"):
        open_tomogram(SOURCES[kind](tmp_path))


@pytest.mark.parametrize("size", [0, -3, float("nan"), float("inf")])
def test_a_voxel_size_is_a_positive_length(size: float) -> None:
    with pytest.raises(SourceError, match="expected a positive length in Å"):
        open_tomogram(TRUTH, voxel_size=size)


@pytest.mark.parametrize("voxel", [0.0, 1e-6, 1e9, float("nan")])
def test_a_header_without_a_voxel_size_asks_for_one(tmp_path: Path, voxel: float) -> None:
    path = write_mrc(tmp_path / "a.mrc", TRUTH, voxel=voxel)
    with pytest.raises(SourceError, match=r"states no voxel size .*; pass voxel_size in Å"):
        open_tomogram(path)
    assert open_tomogram(path, voxel_size=4.5).voxel_size == 4.5


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_voxels_that_are_no_cubes_are_refused(tmp_path: Path, axis: int) -> None:
    cell = [9 * 10.0, 11 * 10.0, 6 * 10.0]
    cell[axis] *= 1.02
    path = write_mrc(tmp_path / "a.mrc", TRUTH, cell=cell)
    with pytest.raises(
        SourceError, match=r"10\.2.* Å along z, y, x; expected one voxel size, within 1%.*pass voxel_size"
    ):
        open_tomogram(path)
    assert open_tomogram(path, voxel_size=10).voxel_size == 10
    cell[axis] *= 1.005 / 1.02
    assert open_tomogram(write_mrc(tmp_path / "a.mrc", TRUTH, cell=cell)).voxel_size == pytest.approx(
        10.0166667
    )


def test_a_deposited_map_with_unequal_voxels(shared_data: Path) -> None:
    path = shared_data / "mrc" / "EMD-3001.map"
    with pytest.raises(SourceError, match=r"0\.45875, 0\.3925, 0\.44825 Å along z, y, x"):
        open_tomogram(path)
    tomogram = open_tomogram(path, voxel_size=0.43)
    assert tomogram.shape == (73, 25, 43)
    assert any("0.45875" in remark and "0.43 Å as given is used" in remark for remark in tomogram.remarks())


def test_exactly_one_angstrom_is_a_warning_unless_it_was_given(tmp_path: Path) -> None:
    path = write_mrc(tmp_path / "a.mrc", TRUTH, voxel=1.0)
    with pytest.warns(UserWarning, match=r"a\.mrc.*exactly 1 Å.*pass voxel_size") as caught:
        tomogram = open_tomogram(path)
    assert caught[0].filename == __file__
    assert tomogram.voxel_size == 1
    assert any("exactly 1 Å" in remark for remark in tomogram.remarks())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_tomogram(path, voxel_size=1.0).remarks() == []
        assert open_tomogram(write_mrc(tmp_path / "b.mrc", TRUTH, voxel=1.001)).voxel_size == pytest.approx(
            1.001
        )


def test_a_given_voxel_size_wins_and_is_remarked_where_it_differs(tmp_path: Path) -> None:
    tomogram = open_tomogram(mrc_path(tmp_path), voxel_size=13.48)
    assert tomogram.voxel_size == tomogram.frame.voxel_size == tomogram.frame.file_voxel_size == 13.48
    (remark,) = tomogram.remarks()
    assert "10, 10, 10 Å" in remark
    assert "13.48" in remark
    assert open_tomogram(mrc_path(tmp_path), voxel_size=10.01).remarks() == []


def test_a_thick_z_axis_is_remarked() -> None:
    def remarks(shape: tuple[int, int, int], **options: Any) -> list[str]:
        return open_tomogram(np.zeros(shape, "i1"), voxel_size=5, **options).remarks()

    assert remarks((6, 11, 9)) == []
    assert remarks((6, 6, 6)) == []
    (remark,) = remarks((20, 6, 30))
    assert "z is not the thinnest axis (z 20, y 6, x 30 voxels)" in remark
    assert 'beam_axis="y"' in remark
    assert remarks((20, 6, 30), beam_axis="y") == []
    (remark,) = remarks((20, 30, 6))
    assert "beam_axis" not in remark
    (remark,) = remarks((6, 20, 30), beam_axis="y")
    assert "beam_axis" not in remark


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("TS_01.mrc", "TS_01"),
        ("TS_01.MRC", "TS_01"),
        ("TS_01.mrc.gz", "TS_01"),
        ("TS_01.map.bz2", "TS_01"),
        ("TS_01.rec", "TS_01"),
        ("lam8_ts.005_10.00Apx.mrc", "lam8_ts.005_10.00Apx"),
        ("TS_01.st_rot.rec", "TS_01.st_rot"),
        ("noname", "noname"),
        (".mrc", ".mrc"),
    ],
)
def test_names_come_from_files(tmp_path: Path, path: str, name: str) -> None:
    assert open_tomogram(write_mrc(tmp_path / path, TRUTH)).name == name


def test_names_come_from_folders_and_callers(tmp_path: Path) -> None:
    assert open_tomogram(image_path(tmp_path)).name == "TS_01"
    assert open_tomogram(tmp_path / "TS_01.ome.zarr" / "0", voxel_size=3).name == "TS_01"
    assert open_tomogram(TRUTH, voxel_size=3).name == "tomogram"
    assert open_tomogram(TRUTH, voxel_size=3, name="mine").name == "mine"


def test_paths_may_be_strings_paths_and_file_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "with blank"
    folder.mkdir()
    path = mrc_path(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    for source in [path, str(path), path.as_uri(), "TS_01.mrc", "~/TS_01.mrc", os.fspath(path)]:
        tomogram = open_tomogram(source)
        assert tomogram.source == str(path)
        np.testing.assert_array_equal(whole(tomogram), TRUTH)


@pytest.mark.parametrize("address", ["ftp://host/a.mrc", "s4://bucket/a.zarr", "s3:///a.zarr"])
def test_addresses_of_no_known_kind_are_refused(address: str) -> None:
    with pytest.raises(
        SourceError, match=rf"the address {address[:8]}.*; expected a path, or an address .* s3://"
    ):
        open_tomogram(address)


@pytest.mark.parametrize("source", [None, 7, [[1.0]], b"\x00", {"a": 1}])
def test_other_objects_are_no_source(source: object) -> None:
    with pytest.raises(SourceError, match=f"the source is a {type(source).__name__}"):
        open_tomogram(source)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"there is no file .*nothing\.mrc"):
        open_tomogram(tmp_path / "nothing.mrc")


@pytest.mark.parametrize("options", [{"beam_axis": "x"}, {"missing": "zero"}])
def test_unknown_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SourceError, match="pass one of these"):
        open_tomogram(TRUTH, voxel_size=3, **options)


@pytest.mark.parametrize(
    "box",
    [
        (slice(0, 7), slice(0, 11), slice(0, 9)),
        (slice(-1, 6), slice(0, 11), slice(0, 9)),
        (slice(0, 6), slice(3, 3), slice(0, 9)),
        (slice(0, 6), slice(4, 3), slice(0, 9)),
        (slice(0, 6, 2), slice(0, 11), slice(0, 9)),
        (slice(6, None), slice(0, 11), slice(0, 9)),
        (slice(0, 6), slice(0, 11)),
        (slice(0, 6), slice(0, 11), 3),
        (slice(0, 6), slice(0, 11), slice(0, 9), slice(0, 1)),
    ],
)
def test_boxes_outside_are_refused(box: Any) -> None:
    with pytest.raises(IndexError):
        open_tomogram(TRUTH, voxel_size=3).read(box)


def test_boxes_may_leave_a_face_out_and_count_in_numpy_integers() -> None:
    tomogram = open_tomogram(TRUTH, voxel_size=3)
    box: Box = (slice(None), slice(np.int64(2), None), slice(None, np.int32(4)))
    np.testing.assert_array_equal(tomogram.read(box), TRUTH[:, 2:, :4])
    with pytest.raises(TypeError):
        tomogram.read((slice(0.0, 1.0), slice(0, 1), slice(0, 1)))


def test_missing_chunks_of_a_tomogram(tmp_path: Path) -> None:
    path = image_path(tmp_path)
    (chunk,) = (file for file in (path / "0").iterdir() if not file.name.startswith("."))
    chunk.unlink()
    with pytest.raises(SourceError, match=rf"TS_01.ome.zarr has no object 0/{chunk.name}"):
        whole(open_tomogram(path))
    with pytest.raises(SourceError, match="has no object"):
        open_tomogram(path).to_dask().compute(scheduler="sync")
    assert not whole(open_tomogram(path, missing="fill")).any()


def test_describe_is_plain_data(tmp_path: Path) -> None:
    path = write_mrc(tmp_path / "a.rec", TRUTH, ">", label=b"made here", extended=80)
    facts = open_tomogram(path, beam_axis="y").describe()
    assert facts["kind"] == "MRC"
    assert facts["name"] == "a"
    assert facts["source"] == str(path)
    assert facts["mode"] == 2
    assert facts["byte_order"] == "big"
    assert facts["shape"] == [11, 6, 9]
    assert facts["file_shape"] == [6, 11, 9]
    assert facts["voxel_size"] == 10
    assert facts["dtype"] == ">f4"
    assert facts["beam_axis"] == "y"
    assert facts["axis_order"] == [1, 2, 3]
    assert facts["extended_header_bytes"] == 80
    assert facts["stated_minimum"] == pytest.approx(TRUTH.min())
    assert facts["labels"] == ["made here"]
    assert (
        repr(open_tomogram(path)) == f"Tomogram('a', shape=(6, 11, 9), voxel_size=10, source={str(path)!r})"
    )


@pytest.mark.parametrize("kind", SOURCES)
def test_facts_and_fingerprints_are_plain_data(tmp_path: Path, kind: str) -> None:
    tomogram = open_tomogram(SOURCES[kind](tmp_path), voxel_size=10)
    assert json.loads(json.dumps(tomogram.describe())) == tomogram.describe()
    assert json.loads(json.dumps(tomogram.fingerprint)) == tomogram.fingerprint
    assert tomogram.describe()["shape"] == [6, 11, 9]


def test_fingerprints_follow_files_and_arrays(tmp_path: Path) -> None:
    path = mrc_path(tmp_path)
    before = open_tomogram(path).fingerprint
    os.utime(path, ns=(5, 5))
    assert open_tomogram(path).fingerprint != before
    one, other = (open_tomogram(volume, voxel_size=3).fingerprint for volume in (TRUTH, TRUTH + 1))
    assert one != other
    assert one == open_tomogram(np.asfortranarray(TRUTH), voxel_size=3).fingerprint
    large = np.ones((70, 70, 70), dtype=np.float32)  # zarr stores no chunk of zeros
    edited = large.copy()
    edited[35, 35, 36] = 2
    for kind in (np.asarray, lambda array: zarr.array(array, chunks=(32, 32, 32))):
        marks = [open_tomogram(kind(array), voxel_size=3).fingerprint for array in (large, edited)]
        assert marks[0] != marks[1]


def test_two_lazy_arrays_of_different_files_do_not_mix(tmp_path: Path) -> None:
    first = open_tomogram(write_mrc(tmp_path / "a.mrc", TRUTH)).to_dask()
    second = open_tomogram(write_mrc(tmp_path / "b.mrc", TRUTH * 2)).to_dask()
    np.testing.assert_array_equal((second - first).compute(scheduler="sync"), TRUTH)


def test_a_file_travels_by_its_address(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).normal(size=(64, 64, 64)).astype("f4")
    tomogram = open_tomogram(write_mrc(tmp_path / "a.mrc", volume))
    whole(tomogram)
    assert len(pickle.dumps(tomogram)) < 4000
    assert len(pickle.dumps(open_tomogram(volume, voxel_size=3))) > volume.nbytes
    path = tmp_path / "travelling.pickle"
    path.write_bytes(pickle.dumps(tomogram))
    code = (
        "import pickle, sys, pathlib; t = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes());"
        "print(repr(float(t.read((slice(3, 4), slice(5, 6), slice(7, 8)))[0, 0, 0])))"
    )
    said = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert np.float32(said.stdout) == volume[3, 5, 7]


@pytest.mark.parametrize("kind", SOURCES)
def test_a_tomogram_that_travels_says_where_it_is_not(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    tomogram = open_tomogram(SOURCES[kind](folder), voxel_size=10, missing="fill")
    assert tomogram.travels == (kind not in ("numpy", "dask", "zarr in memory"))
    if tomogram.travels:
        parcel = pickle.dumps(tomogram)
        pickle.loads(parcel).confirm()
        folder.rename(tmp_path / "elsewhere")
        with pytest.raises(
            BrokenSourceError, match=r"finds no .*expected .* that all machines share"
        ) as caught:
            pickle.loads(parcel).confirm()
        assert caught.value.final


def test_a_file_that_was_cut_meanwhile_is_another(tmp_path: Path) -> None:
    path = write_mrc(tmp_path / "a.mrc", TRUTH)
    tomogram = open_tomogram(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BrokenSourceError, match=r"finds a file of 3399 bytes .* expected the file of 3400"):
        tomogram.confirm()


@pytest.mark.parametrize("kind", SOURCES)
def test_threads_read_at_once(tmp_path: Path, kind: str) -> None:
    tomogram = open_tomogram(SOURCES[kind](tmp_path), voxel_size=10, beam_axis="y")
    boxes: list[Box] = [(slice(z, z + 2), slice(y, y + 3), slice(0, 9)) for z in range(9) for y in range(3)]
    with ThreadPoolExecutor(4) as threads:
        for box, found in zip(boxes, threads.map(tomogram.read, boxes), strict=True):
            np.testing.assert_array_equal(found, turned(TRUTH)[box])


def test_the_shared_tomograms_open(shared_data: Path) -> None:
    simulated = open_tomogram(shared_data / "sim10A" / "sim_val_1.mrc")
    assert (simulated.name, simulated.shape, simulated.voxel_size) == ("sim_val_1", (96, 256, 256), 10)
    assert simulated.dtype == np.int8
    assert simulated.remarks() == []
    real = open_tomogram(shared_data / "real" / "microtubule_13pf.mrc")
    assert (real.shape, real.voxel_size) == ((36, 206, 94), 10.52)
    assert real.dtype == np.uint16
    with pytest.raises(SourceError, match="pass voxel_size"):
        open_tomogram(shared_data / "omezarr" / "portal_xyz_v04.zarr")
    portal = open_tomogram(shared_data / "omezarr" / "portal_xyz_v04.zarr", voxel_size=14.08)
    assert portal.shape == (4, 4, 4)
    legacy = open_tomogram(shared_data / "real" / "tardis" / "rec3D.rec")
    assert legacy.voxel_size == pytest.approx(23.2, rel=1e-5)
    assert any("unsigned" in remark for remark in legacy.remarks())
    assert any("thinnest" in remark for remark in legacy.remarks())
    assert Path(legacy.source).name == "rec3D.rec"
