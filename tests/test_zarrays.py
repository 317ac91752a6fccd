from __future__ import annotations

import asyncio
import itertools
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import (
    BloscCodec,
    BytesCodec,
    Crc32cCodec,
    GzipCodec,
    ShardingCodec,
    TransposeCodec,
    ZstdCodec,
)
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore

from tomocpt_stream import patience, zarrays
from tomocpt_stream.errors import BrokenSourceError, SourceError
from tomocpt_stream.zarrays import ZarrVoxels, address_of

if TYPE_CHECKING:
    from pathlib import Path

    from tomocpt_stream.frame import Box
    from tomocpt_stream.zarrays import Missing

SHAPE = (20, 18, 17)
ALL: Box = (slice(0, 20), slice(0, 18), slice(0, 17))
TRUTH = np.random.default_rng(0).normal(size=SHAPE).astype("f4")

LAYOUTS: dict[str, dict[str, Any]] = {
    "v2-blosc": {"zarr_format": 2, "compressors": numcodecs.Blosc("lz4")},
    "v2-blosc-noshuffle": {"zarr_format": 2, "compressors": numcodecs.Blosc("zstd", shuffle=0)},
    "v2-zlib": {"zarr_format": 2, "compressors": numcodecs.Zlib()},
    "v2-raw": {"zarr_format": 2, "compressors": None},
    "v3-zstd": {"zarr_format": 3, "compressors": ZstdCodec()},
    "v3-blosc": {"zarr_format": 3, "compressors": BloscCodec(cname="lz4")},
    "v3-gzip": {"zarr_format": 3, "compressors": GzipCodec()},
    "v3-raw": {"zarr_format": 3, "compressors": None},
    "v3-checksum": {"zarr_format": 3, "compressors": [ZstdCodec(), Crc32cCodec()]},
    "shards": {"zarr_format": 3, "chunks": (4, 4, 4), "shards": (8, 8, 8)},
    "shards-blosc": {
        "zarr_format": 3,
        "serializer": ShardingCodec(
            chunk_shape=(4, 4, 4), codecs=[BytesCodec(), BloscCodec(cname="lz4")], index_location="start"
        ),
        "compressors": None,
    },
    "shards-raw-no-checksum": {
        "zarr_format": 3,
        "serializer": ShardingCodec(
            chunk_shape=(4, 4, 4), codecs=[BytesCodec()], index_codecs=[BytesCodec()], index_location="start"
        ),
        "compressors": None,
    },
}


def make(store: Any, layout: str = "v3-zstd", data: Any = TRUTH, **more: Any) -> zarr.Array[Any]:
    options = {"chunks": (8, 8, 8), "fill_value": 0, **LAYOUTS[layout], **more}
    array = zarr.create_array(store, shape=data.shape, dtype=data.dtype, **options)
    array[:] = data
    return array


def voxels(array: zarr.Array[Any], missing: Missing = "error", order: Any = (0, 1, 2)) -> ZarrVoxels:
    return ZarrVoxels(array, order, missing, "some/where.zarr")


def objects(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if path.name not in ("zarr.json", ".zarray", ".zattrs"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_every_layout(tmp_path: Path, layout: str) -> None:
    found = voxels(make(tmp_path, layout))
    assert found.shape == SHAPE
    assert found.chunks == (8, 8, 8)
    np.testing.assert_array_equal(found.read(ALL), TRUTH)
    box = (slice(3, 9), slice(16, 18), slice(0, 17))
    np.testing.assert_array_equal(found.read(box), TRUTH[box])
    assert found.read(box).flags.c_contiguous


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["f4", "i2", ">f8"])
def test_large_chunks_are_read_alike(layout: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zarrays, "LARGE_CHUNK", 0)
    data = (TRUTH * 1000).astype(kind)
    found = voxels(make(MemoryStore(), layout, data.transpose(2, 0, 1)), order=(1, 2, 0))
    for box in (ALL, (slice(3, 9), slice(16, 18), slice(7, 17))):
        np.testing.assert_array_equal(found.read(box), data[box].astype("f4"))
        assert found.read(box).flags.c_contiguous


@pytest.mark.parametrize(("limit", "most"), [(4 * 8**3, 10), (4 * 8**3 - 1, 1)])
def test_large_chunks_are_decoded_one_after_the_other(
    limit: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zarrays, "LARGE_CHUNK", limit)
    array = make(MemoryStore())
    under_way = [0]
    real = MemoryStore.get

    async def counted(self: MemoryStore, *arguments: Any, **options: Any) -> Any:
        under_way.append(under_way[-1] + 1)
        await asyncio.sleep(0)
        found = await real(self, *arguments, **options)
        under_way.append(under_way[-1] - 1)
        return found

    monkeypatch.setattr(MemoryStore, "get", counted)
    with zarr.config.set({"async.concurrency": 10}):  # a worker within this process may have set its own
        np.testing.assert_array_equal(voxels(array).read(ALL), TRUTH)
    assert max(under_way) == most


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("damage", ["empty", "one byte", "half", "short by one"])
def test_an_object_cut_short_is_named(tmp_path: Path, layout: str, damage: str) -> None:
    found = voxels(make(tmp_path, layout))
    victim = objects(tmp_path)[3]
    raw = victim.read_bytes()
    keep = {"empty": 0, "one byte": 1, "half": len(raw) // 2, "short by one": len(raw) - 1}[damage]
    victim.write_bytes(raw[:keep])
    key = victim.relative_to(tmp_path).as_posix()
    with pytest.raises(SourceError, match=f"some/where.zarr has an object {key} ") as caught:
        found.read(ALL)
    assert caught.value.remedy == "copy that object again"
    with pytest.raises(SourceError, match=key):
        voxels(found.array, "fill").read(ALL)


@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3 specification")
@pytest.mark.parametrize("kind", ["codec of format 3", "filter of format 2"])
def test_blosc_is_looked_at_wherever_it_is_last(tmp_path: Path, kind: str) -> None:
    # Of a chunk that lacks some of its end Blosc decodes what lies behind it in memory.
    more: dict[str, Any] = {"zarr_format": 3, "compressors": zarr.codecs.numcodecs.Blosc(cname="lz4")}
    if kind == "filter of format 2":
        more = {"zarr_format": 2, "filters": [numcodecs.Blosc(cname="lz4")], "compressors": None}
    found = voxels(make(tmp_path, "v3-raw", **more))
    np.testing.assert_array_equal(found.read(ALL), TRUTH)
    victim = objects(tmp_path)[0]
    raw = victim.read_bytes()
    for keep in (len(raw) - 1, len(raw) - 8):
        victim.write_bytes(raw[:keep])
        with pytest.raises(SourceError, match=f"is cut short: {keep} bytes"):
            found.read(ALL)


@pytest.mark.parametrize("taken", ["all", "one byte"])
@pytest.mark.parametrize("codec", [BloscCodec(), ZstdCodec(), None])
def test_a_chunk_cut_short_inside_a_shard_is_named(tmp_path: Path, codec: Any, taken: str) -> None:
    layout = ShardingCodec(
        chunk_shape=(4, 4, 4),
        codecs=[BytesCodec(), *([codec] if codec else [])],
        index_codecs=[BytesCodec()],
        index_location="start",
    )
    found = voxels(make(tmp_path, "v3-raw", serializer=layout))
    victim = objects(tmp_path)[0]
    raw = bytearray(victim.read_bytes())
    length = int.from_bytes(raw[8:16], "little")  # of the first chunk, after its offset
    raw[8:16] = (0 if taken == "all" else length - 1).to_bytes(8, "little")
    victim.write_bytes(raw)
    corner = (slice(0, 4), slice(0, 4), slice(0, 4))
    for missing in ("error", "fill"):
        with pytest.raises(SourceError, match=r"some/where.zarr has an object c/0/0/0 "):
            voxels(found.array, missing).read(corner)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_small_boxes_of_an_object_cut_short_are_right_or_an_error(tmp_path: Path, layout: str) -> None:
    found = voxels(make(tmp_path, layout))
    victim = objects(tmp_path)[0]
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    failures = 0
    for corner in itertools.product((0, 4), repeat=3):
        box = tuple(slice(start, start + 4) for start in corner)
        try:
            np.testing.assert_array_equal(found.read(box), TRUTH[box])  # type: ignore[arg-type]
        except SourceError:
            failures += 1
    assert failures >= 3


@pytest.mark.parametrize("layout", ["v2-zlib", "v3-gzip", "v3-checksum"])
def test_an_object_with_a_wrong_byte_is_named(tmp_path: Path, layout: str) -> None:
    found = voxels(make(tmp_path, layout))
    victim = objects(tmp_path)[5]
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 255
    victim.write_bytes(raw)
    with pytest.raises(
        SourceError, match=f"{victim.relative_to(tmp_path).as_posix()} that cannot be decoded"
    ):
        found.read(ALL)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_missing_object_is_an_error_or_the_fill_value(tmp_path: Path, layout: str) -> None:
    array = make(tmp_path, layout, fill_value=7)
    victim = tmp_path / array.metadata.encode_chunk_key((1, 0, 2))
    victim.unlink()
    gone = (slice(8, 16), slice(0, 8), slice(16, 17))
    rest = voxels(array).read((slice(0, 20), slice(8, 18), slice(0, 17)))
    np.testing.assert_array_equal(rest, TRUTH[:, 8:])
    key = array.metadata.encode_chunk_key((1, 0, 2))
    with pytest.raises(BrokenSourceError, match=f'has no object {key}; .*pass missing="fill"'):
        voxels(array).read(ALL)
    expected = TRUTH.copy()
    expected[gone] = 7
    np.testing.assert_array_equal(voxels(array, "fill").read(ALL), expected)


@pytest.mark.parametrize("layout", ["shards", "shards-blosc", "shards-raw-no-checksum"])
def test_a_chunk_missing_inside_a_shard_is_missing_too(tmp_path: Path, layout: str) -> None:
    data = TRUTH.copy()
    data[4:8, 0:4, 12:16] = 0  # zarr does not store a chunk that holds the fill value
    array = make(tmp_path, layout, data)
    strict = voxels(array)
    with pytest.raises(SourceError, match=r"c/0/0/1: of its chunks that are needed 1 are absent"):
        strict.read(ALL)
    with pytest.raises(SourceError, match="c/0/0/1"):
        strict.read((slice(7, 8), slice(3, 4), slice(15, 16)))
    for box in [(slice(0, 4), slice(0, 18), slice(0, 17)), (slice(4, 8), slice(0, 4), slice(0, 12))]:
        np.testing.assert_array_equal(strict.read((*box,)), data[box])
    np.testing.assert_array_equal(voxels(array, "fill").read(ALL), data)


@pytest.mark.filterwarnings("ignore:Combining a `sharding_indexed` codec")
def test_shards_that_could_not_be_checked_are_refused(tmp_path: Path) -> None:
    inner = ShardingCodec(chunk_shape=(2, 2, 2), codecs=[BytesCodec()])
    cases: list[dict[str, Any]] = [
        {"serializer": ShardingCodec(chunk_shape=(4, 4, 4), codecs=[inner]), "compressors": None},
        {"serializer": ShardingCodec(chunk_shape=(4, 4, 4)), "compressors": [Crc32cCodec()]},
        {
            "serializer": ShardingCodec(chunk_shape=(4, 4, 4)),
            "filters": [TransposeCodec(order=(2, 1, 0))],
            "compressors": None,
        },
        {
            "serializer": ShardingCodec(
                chunk_shape=(4, 4, 4), index_codecs=[BytesCodec(endian="big"), Crc32cCodec()]
            ),
            "compressors": None,
        },
    ]
    for number, case in enumerate(cases):
        array = zarr.create_array(tmp_path / str(number), shape=SHAPE, dtype="f4", chunks=(8, 8, 8), **case)
        with pytest.raises(SourceError, match="shards inside shards"):
            voxels(array)


def test_large_shards_are_not_the_reading_chunk(tmp_path: Path) -> None:
    array = zarr.create_array(
        tmp_path, shape=(600, 600, 600), dtype="i1", chunks=(100, 60, 50), shards=(600, 600, 600)
    )
    assert voxels(array).chunks == (100, 60, 50)
    small = make(tmp_path / "small", "shards", np.zeros((5, 30, 30), "f4"))
    assert voxels(small).chunks == (5, 8, 8)


@pytest.mark.parametrize("order", list(itertools.permutations((0, 1, 2))))
def test_axes_are_read_as_z_y_x(order: tuple[int, int, int]) -> None:
    stored = TRUTH.transpose(np.argsort(order))
    found = voxels(make(MemoryStore(), data=stored), order=order)
    assert found.shape == SHAPE
    np.testing.assert_array_equal(found.read(ALL), TRUTH)
    box = (slice(1, 3), slice(4, 18), slice(9, 10))
    np.testing.assert_array_equal(found.read(box), TRUTH[box])


def test_axes_of_length_one_are_dropped_wherever_they_are() -> None:
    stored = TRUTH[None, :, :, None, :]
    found = voxels(make(MemoryStore(), data=stored, chunks=(1, 8, 8, 1, 8)), order=(1, 2, 4))
    assert found.shape == SHAPE
    np.testing.assert_array_equal(found.read(ALL), TRUTH)


@pytest.mark.parametrize("kind", ["bool", "u1", "i1", "i2", "u2", "i4", "f2", "f4", "f8", ">i2", ">f4"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_every_real_type_comes_out_as_float32(kind: str, zarr_format: Any) -> None:
    data = (np.arange(np.prod(SHAPE)).reshape(SHAPE) % 120).astype(kind)
    found = voxels(make(MemoryStore(), "v3-raw", data, zarr_format=zarr_format, fill_value=None))
    read = found.read(ALL)
    assert read.dtype == np.float32
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, data.astype("f4"))


def test_values_beyond_float32_and_nan_are_not_hidden() -> None:
    data = np.full((2, 2, 2), 1e300)
    data[0, 0, 0] = np.nan
    found = voxels(make(MemoryStore(), data=data)).read((slice(0, 2),) * 3)
    assert np.isnan(found[0, 0, 0])
    assert np.isposinf(found[1, 1, 1])


def test_identity_follows_the_voxels(tmp_path: Path) -> None:
    array = make(tmp_path / "a")
    first = voxels(array).identity()
    assert voxels(zarr.open_array(tmp_path / "a", mode="r")).identity() == first
    objects(tmp_path / "a")[0].write_bytes(b"x" * 10)
    assert voxels(array).identity() != first
    shutil.rmtree(tmp_path / "a")
    in_memory = voxels(make(MemoryStore())).identity()
    assert in_memory == voxels(make(MemoryStore())).identity()
    assert in_memory != voxels(make(MemoryStore(), data=TRUTH + 1)).identity()


def test_describes_itself(tmp_path: Path) -> None:
    facts = voxels(make(tmp_path / "a", "v2-blosc")).facts()
    assert facts["kind"] == "zarr, format 2"
    assert facts["codecs"] == ["Blosc"]
    facts = voxels(make(tmp_path / "b", "shards")).facts()
    assert facts["stored_shards"] == [8, 8, 8]
    assert facts["stored_chunks"] == [4, 4, 4]
    assert facts["codecs"] == ["ShardingCodec"]
    assert voxels(make(MemoryStore())).remarks() == []
    assert address_of(make(MemoryStore())) == "zarr array"
    assert "inside/c" in address_of(make(LocalStore(tmp_path / "inside"), name="c"))


def test_travels_and_serves_threads(tmp_path: Path) -> None:
    found: ZarrVoxels = pickle.loads(pickle.dumps(voxels(make(tmp_path, "shards"))))
    boxes = [
        (slice(z, z + 5), slice(0, 18), slice(x, x + 5)) for z in range(0, 20, 5) for x in range(0, 15, 5)
    ]
    with ThreadPoolExecutor(4) as threads:
        for box, read in zip(boxes, threads.map(found.read, boxes), strict=True):
            np.testing.assert_array_equal(read, TRUTH[box])
    objects(tmp_path)[0].unlink()
    with pytest.raises(SourceError, match="has no object"):
        found.read(ALL)


@pytest.mark.parametrize("layout", ["v3-blosc", "shards"])
def test_a_store_that_fails_is_not_called_corrupt(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    store = MemoryStore()
    found = voxels(make(store, layout))
    real, failures = MemoryStore.get, 2

    async def flaky(self: MemoryStore, *arguments: Any, **options: Any) -> Any:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise OSError("reset by peer")
        return await real(self, *arguments, **options)

    monkeypatch.setattr(MemoryStore, "get", flaky)
    monkeypatch.setattr(patience, "_pause", lambda _: 0.0)
    box = (slice(0, 2),) * 3
    np.testing.assert_array_equal(found.read(box), TRUTH[box])
    failures = 1_000
    with pytest.raises(
        SourceError, match=r"failed 3 times to get .*c/0/0/0 .OSError: reset by peer."
    ) as caught:
        found.read(box)
    assert "decoded" not in str(caught.value)


def test_an_object_that_arrives_broken_once_is_not_called_corrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    found = voxels(make(MemoryStore(), "v3-gzip"))
    real, calls = MemoryStore.get, []

    async def garbled(self: MemoryStore, *arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        raw = await real(self, *arguments, **options)
        return raw if len(calls) > 1 else default_buffer_prototype().buffer.from_bytes(b"x" * 100)

    monkeypatch.setattr(MemoryStore, "get", garbled)
    with pytest.raises(SourceError, match=r"could not be read once .*, and could when asked again"):
        found.read((slice(0, 2),) * 3)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damage_to_one_object_is_an_error_or_leaves_the_others_right(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("any")
    found = voxels(make(folder, data.draw(st.sampled_from(sorted(LAYOUTS)))))
    victim = folder / found.array.metadata.encode_chunk_key((0, 1, 0))
    raw = bytearray(victim.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    victim.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    rest = found.read((slice(0, 20), slice(0, 18), slice(8, 17)))
    np.testing.assert_array_equal(rest, TRUTH[:, :, 8:])
    try:
        assert found.read(ALL).shape == SHAPE
    except SourceError as error:
        assert found.array.metadata.encode_chunk_key((0, 1, 0)) in str(error)  # noqa: PT017
