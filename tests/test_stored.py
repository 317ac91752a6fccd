"""Arrays of our own stores: whatever is done to an object, it is named or the voxels are right."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore, WrapperStore

from tomocpt_stream.errors import ActionableError, CheckpointError
from tomocpt_stream.stored import CheckedArray, OwnStore, checked
from tomocpt_stream.tomogram import open_tomogram

if TYPE_CHECKING:
    from pathlib import Path

    from zarr.abc.store import Store

SHAPE = (20, 18, 17)
TRUTH = np.random.default_rng(0).normal(size=SHAPE).astype("f4")
GONE = (slice(8, 16), slice(0, 8), slice(16, 17))  # of the object 0/c/1/0/2
REST = (slice(0, 20), slice(8, 18), slice(0, 17))
POINTS = tuple(np.array(axis) for axis in ([9, 0], [3, 17], [16, 2]))


def made(store: Any, missing: Any = "error", data: Any = TRUTH) -> CheckedArray:
    array: zarr.Array[Any] = zarr.create_array(
        store,
        name="0",
        shape=SHAPE,
        chunks=(8, 8, 8),
        dtype="f4",
        fill_value=np.nan,
        compressors=BloscCodec(),
    )
    array[:] = data
    return checked(array, missing)


def victim(folder: Path) -> Path:
    return folder / "0" / "c" / "1" / "0" / "2"


class Failing(WrapperStore[Any]):
    """A store whose next requests for a chunk fail."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.failures = self.asked = 0
        self.error: Exception = RuntimeError("503 Slow Down")

    async def get(self, key: str, *arguments: Any, **options: Any) -> Any:
        if "/c/" in key:
            self.asked += 1
            if self.failures:
                self.failures -= 1
                raise self.error
        return await super().get(key, *arguments, **options)


def test_whole_arrays_read_as_zarr_reads_them() -> None:
    array = made(MemoryStore())
    for selection in (slice(None), (slice(3, 9), slice(16, 18), slice(0, 17)), (3, ..., slice(2, 5)), -1):
        np.testing.assert_array_equal(array[selection], TRUTH[selection])
    np.testing.assert_array_equal(array.get_coordinate_selection(POINTS), TRUTH[POINTS])
    with pytest.raises(IndexError):
        array[30, 0, 0]


def test_a_lost_object_is_named(tmp_path: Path) -> None:
    array = made(tmp_path)
    victim(tmp_path).unlink()
    np.testing.assert_array_equal(array[REST], TRUTH[REST])
    for read in (array.__getitem__, array.get_coordinate_selection):
        with pytest.raises(CheckpointError, match="has lost its object 0/c/1/0/2") as caught:
            read(slice(None) if read == array.__getitem__ else POINTS)
        assert str(tmp_path) in caught.value.found
        assert "delete this store" in caught.value.remedy
    expected = TRUTH.copy()
    expected[GONE] = np.nan
    sparse = checked(zarr.open_array(tmp_path, path="0", mode="r"), "fill")
    np.testing.assert_array_equal(sparse[:], expected)


@pytest.mark.parametrize("damage", ["empty", "one byte", "header", "half", "short by one"])
@pytest.mark.parametrize("missing", ["error", "fill"])
def test_an_object_cut_short_is_named(tmp_path: Path, damage: str, missing: Any) -> None:
    array = made(tmp_path, missing)
    raw = victim(tmp_path).read_bytes()
    keep = {"empty": 0, "one byte": 1, "header": 15, "half": len(raw) // 2, "short by one": len(raw) - 1}[
        damage
    ]
    victim(tmp_path).write_bytes(raw[:keep])
    with pytest.raises(CheckpointError, match=f"object 0/c/1/0/2 that is cut short: {keep} bytes"):
        array[:]
    np.testing.assert_array_equal(array[REST], TRUTH[REST])


@pytest.mark.parametrize("selection", [slice(None), (slice(8, 9), slice(0, 18), slice(0, 17)), POINTS])
def test_an_object_that_does_not_decode_is_named(tmp_path: Path, selection: Any) -> None:
    array = made(tmp_path)
    raw = bytearray(victim(tmp_path).read_bytes())
    raw[0] ^= 255  # Blosc's own version
    victim(tmp_path).write_bytes(raw)
    with pytest.raises(CheckpointError, match="object 0/c/1/0/2 that cannot be decoded"):
        array.get_coordinate_selection(selection) if selection is POINTS else array[selection]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_damage_to_one_object_is_an_error_or_leaves_the_others_right(data: st.DataObject) -> None:
    store = MemoryStore()
    array = made(store)
    raw = bytearray(store._store_dict["0/c/1/0/2"].to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(raw[: data.draw(st.integers(0, len(raw)))])
    sync(store.set("0/c/1/0/2", default_buffer_prototype().buffer.from_bytes(cut)))
    np.testing.assert_array_equal(array[REST], TRUTH[REST])
    try:
        assert array[:].shape == SHAPE
    except CheckpointError as error:
        assert "0/c/1/0/2" in str(error)  # noqa: PT017


def test_what_the_store_raises_comes_through() -> None:
    store = Failing(MemoryStore())
    array = made(store)
    for failures in (1, 10**9):
        store.failures = failures
        with pytest.raises(RuntimeError, match="503 Slow Down") as caught:
            array[GONE]
        assert not isinstance(caught.value, ActionableError)
    store.failures = 1
    sync(store.delete("0/c/1/0/2"))
    with pytest.raises(CheckpointError, match="lost its object 0/c/1/0/2") as named:  # says more than 503
        array[:]
    assert "decoded" not in str(named.value)


def test_who_fails_for_other_reasons_asks_no_more() -> None:
    store = Failing(MemoryStore())
    array = made(store)
    with pytest.raises(IndexError):
        array[30, 0, 0]
    assert store.asked == 0
    store.failures, store.error = 10**9, ConnectionResetError("reset by peer")
    with pytest.raises(ConnectionResetError):
        array[GONE]
    assert store.asked == 1


def test_whole_chunks_are_written_without_a_look_at_what_is_there(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    array = made(store).with_config({"write_empty_chunks": True})
    assert isinstance(array, CheckedArray)
    victim(tmp_path).unlink()
    array[GONE] = np.nan  # the fill value, stored nevertheless
    assert victim(tmp_path).is_file()
    array[GONE] = TRUTH[GONE]
    np.testing.assert_array_equal(array[:], TRUTH)


def test_only_the_objects_of_the_array_are_looked_at(tmp_path: Path) -> None:
    array = made(tmp_path)
    store = array.async_array.store
    assert isinstance(store, OwnStore)
    assert array.store == LocalStore(tmp_path)
    prototype = default_buffer_prototype()
    assert sync(store.get("receipts/heatmap/0.0.0.json", prototype)) is None
    sync(store.set("candidates/0.0.0", prototype.buffer.from_bytes(b"")))
    assert sync(store.get("candidates/0.0.0", prototype)) is not None
    with pytest.raises(CheckpointError, match="0/c/9/9/9"):
        sync(store.with_read_only(True).get("0/c/9/9/9", prototype))
    assert checked(array) is array


def test_travels_and_is_a_tomogram_like_any_array(tmp_path: Path) -> None:
    array: Any = pickle.loads(pickle.dumps(made(tmp_path)))
    np.testing.assert_array_equal(array[:], TRUTH)
    plain = open_tomogram(zarr.open_array(tmp_path, path="0", mode="r"), voxel_size=10.0)
    again = open_tomogram(array, voxel_size=10.0)
    assert (again.source, again.fingerprint) == (plain.source, plain.fingerprint)
    victim(tmp_path).unlink()
    with pytest.raises(CheckpointError, match="lost"):
        array[:]
