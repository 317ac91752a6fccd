from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import zarr
from zarr.storage import FsspecStore, LocalStore, LoggingStore, MemoryStore, ObjectStore, ZipStore

from tests.test_tomogram import TRUTH, whole
from tomocpt_stream.errors import PlanError, SourceError
from tomocpt_stream.tomogram import open_tomogram
from tomocpt_stream.voxels import is_shared, planes, shared
from tomocpt_stream.zarrays import CheckedStore


def test_whole_planes_up_to_32_mb_read_best() -> None:
    assert planes((300, 100, 100)) == (300, 100, 100)
    assert planes((300, 1024, 1024)) == (8, 1024, 1024)
    assert planes((300, 8192, 8192)) == (1, 8192, 8192)


@pytest.mark.parametrize("shape", [(4, 4), (2, 4, 4, 4), (0, 4, 4), ()])
@pytest.mark.parametrize("make", [np.zeros, da.zeros])
def test_arrays_have_three_axes(shape: tuple[int, ...], make: Any) -> None:
    with pytest.raises(SourceError, match="expected three axes z, y, x"):
        open_tomogram(make(shape), voxel_size=3)


@pytest.mark.parametrize("kind", ["c8", "c16", "U3", "O", "M8[s]", [("a", "f4")]])
def test_arrays_hold_real_numbers(kind: Any) -> None:
    with pytest.raises(SourceError, match="expected real numbers"):
        open_tomogram(np.zeros((3, 3, 3), kind), voxel_size=3)


@pytest.mark.parametrize("kind", ["bool", "u1", "i1", "i2", "u2", "i4", "i8", "f2", "f4", "f8", ">f4", ">i2"])
def test_real_numbers_come_out_as_float32(kind: str) -> None:
    volume = (TRUTH * 30).astype(kind) if kind != "u1" else np.abs(TRUTH * 30).astype(kind)
    for source in (
        volume,
        da.from_array(volume),
        np.asfortranarray(volume),
        volume[::-1, :, ::-1][::-1, :, ::-1],
    ):
        tomogram = open_tomogram(source, voxel_size=3)
        assert tomogram.dtype == kind
        found = whole(tomogram)
        assert found.dtype == np.float32
        assert found.dtype.isnative
        np.testing.assert_array_equal(found, volume.astype("f4"))


def test_nan_and_infinity_are_what_they_are() -> None:
    volume = np.array([np.nan, np.inf, -np.inf, 1e300, -1e300, 1.0, 2.0, 3.0]).reshape(2, 2, 2)
    found = whole(open_tomogram(volume, voxel_size=3)).ravel()
    assert np.isnan(found[0])
    assert found[1:].tolist() == [np.inf, -np.inf, np.inf, -np.inf, 1, 2, 3]


def test_opening_reads_no_voxel_of_any_array(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(block: Any) -> Any:
        raise AssertionError("a voxel was computed")

    lazy = da.map_blocks(explode, da.zeros((8, 8, 8), chunks=4), dtype="f4", meta=np.empty((0, 0, 0), "f4"))
    tomogram = open_tomogram(lazy, voxel_size=3)
    assert tomogram.remarks() == []
    assert tomogram.describe()["kind"] == "dask array"
    assert tomogram.fingerprint["graph"] == lazy.name
    store = MemoryStore()
    stored = zarr.create_array(store, shape=(8, 8, 8), dtype="f4")
    stored[:] = 1
    keys: list[str] = []
    real = MemoryStore.get

    async def watched(self: MemoryStore, key: str, *arguments: Any, **options: Any) -> Any:
        keys.append(key)
        return await real(self, key, *arguments, **options)

    monkeypatch.setattr(MemoryStore, "get", watched)
    tomogram = open_tomogram(stored, voxel_size=3)
    assert tomogram.describe()["stored_shape"] == [8, 8, 8]
    assert keys == []
    whole(tomogram)
    assert keys == ["c/0/0/0"]


def test_arrays_in_memory_do_not_travel(tmp_path: Path) -> None:
    stored = zarr.create_array(tmp_path / "a.zarr", shape=(4, 4, 4), dtype="f4")
    in_memory = zarr.create_array(MemoryStore(), shape=(4, 4, 4), dtype="f4")
    for source in (np.zeros((4, 4, 4)), da.from_zarr(stored), in_memory):
        tomogram = open_tomogram(source, voxel_size=3)
        assert not tomogram.travels
        tomogram.confirm()
    for source in (stored, tmp_path / "a.zarr"):
        assert open_tomogram(source, voxel_size=3).travels


def test_stores_that_other_processes_see(tmp_path: Path) -> None:
    assert is_shared(LocalStore(tmp_path))
    assert is_shared(CheckedStore(LocalStore(tmp_path), "a", "error", blosc=False))
    assert is_shared(ZipStore(tmp_path / "a.zip", mode="w"))
    assert is_shared(FsspecStore.from_url(f"file://{tmp_path}"))
    assert not is_shared(LocalStore(Path("a")))  # workers have working directories of their own
    assert not is_shared(MemoryStore())
    assert not is_shared(CheckedStore(LoggingStore(MemoryStore()), "a", "error", blosc=False))
    assert not is_shared(FsspecStore.from_url("memory://a"))
    obstore = pytest.importorskip("obstore.store")
    assert not is_shared(ObjectStore(obstore.MemoryStore()))
    assert is_shared(ObjectStore(obstore.LocalStore(tmp_path)))


def test_stores_that_workers_can_write_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shared(LocalStore(Path("a"), read_only=True)) == LocalStore(tmp_path / "a", read_only=True)
    store = CheckedStore(LocalStore(tmp_path), "a", "error", blosc=False)
    assert shared(store) is store
    zipped = ZipStore(tmp_path / "a.zip", mode="w")
    for wrong in (MemoryStore(), LoggingStore(MemoryStore()), zipped):
        with pytest.raises(PlanError, match="which only this process can use"):
            shared(wrong)


def test_arrays_are_opened_without_importing_dask() -> None:
    code = (
        "import sys, numpy; from tomocpt_stream.tomogram import open_tomogram;"
        "open_tomogram(numpy.zeros((2, 2, 2)), voxel_size=3).read((slice(0, 2),) * 3);"
        "print([m for m in ('dask', 'distributed', 'torch') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
