"""Shards on an object store: their chunks come many at a time, once, and of one version."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from zarr.codecs import BytesCodec, ShardingCodec, ZstdCodec
from zarr.storage import LocalStore

from tomocpt_stream import spool
from tomocpt_stream.errors import BrokenSourceError, SourceError
from tomocpt_stream.tomogram import Tomogram, open_tomogram

if TYPE_CHECKING:
    from pathlib import Path

    from tests.buckets import S3, Asked, Way

EDGE = 32
VOXELS = np.random.default_rng(0).normal(size=(EDGE,) * 3).astype(np.float32)
HALF = (slice(0, 16), slice(0, EDGE), slice(0, EDGE))
ALL = (slice(0, EDGE),) * 3
MIDDLE = (slice(7, 18), slice(5, 17), slice(12, 29))


def put(s3: S3, folder: Path, key: str, shard: int = EDGE, **more: Any) -> int:
    """Store shards of cubes of 4 voxels; return the bytes of the shards."""
    kind: dict[str, Any] = {"chunks": (4,) * 3, "shards": (shard,) * 3, "compressors": ZstdCodec()}
    array = zarr.create_array(
        LocalStore(folder / key), shape=VOXELS.shape, dtype="float32", **{**kind, **more}
    )
    array[:] = VOXELS
    return s3.bucket.put_folder(folder / key, key) - (folder / key / "zarr.json").stat().st_size


def opened(s3: S3, key: str, **options: Any) -> Tomogram:
    return open_tomogram(s3.address(key), voxel_size=10.0, storage_options=s3.options(**options))


def asked(way: Way) -> list[Asked]:
    return [one for one in way.data() if one.method == "GET"]


def test_chunks_of_a_shard_come_many_at_a_time(
    s3: S3, way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = put(s3, tmp_path, "half.zarr")
    monkeypatch.setattr(spool, "PART", 1 << 12)
    tomogram = opened(s3, "half.zarr")
    way.latency = 0.05
    np.testing.assert_array_equal(tomogram.read(HALF), VOXELS[HALF])
    # The index, in parts of so many bytes, then 256 chunks that lie side by side in two or more places.
    assert 16 < len(asked(way)) <= 3 + way.bytes // (1 << 12) + 4
    assert way.most_at_once == 16
    assert 0.5 * stored < way.bytes < 0.54 * stored
    assert not [one for one in way.asked if one.method == "HEAD"]


def test_neighbours_come_in_one_request(s3: S3, way: Way, tmp_path: Path) -> None:
    put(s3, tmp_path, "few.zarr")
    tomogram = opened(s3, "few.zarr")
    np.testing.assert_array_equal(tomogram.read(HALF), VOXELS[HALF])
    assert len(asked(way)) <= 6
    tomogram.read(HALF)
    assert len(asked(way)) <= 6


@pytest.mark.parametrize("shard", [EDGE, 16, 24])  # those of 24 reach beyond the array
def test_what_was_read_in_part_is_not_fetched_again(shard: int, s3: S3, way: Way, tmp_path: Path) -> None:
    stored = put(s3, tmp_path, f"part-{shard}.zarr", shard)
    tomogram = opened(s3, f"part-{shard}.zarr")
    for box in (MIDDLE, HALF, ALL, MIDDLE, ALL):
        np.testing.assert_array_equal(tomogram.read(box), VOXELS[box])
    assert way.bytes == stored


def test_whole_shards_come_without_their_index_first(s3: S3, way: Way, tmp_path: Path) -> None:
    stored = put(s3, tmp_path, "whole.zarr", 8)
    way.latency = 0.05
    np.testing.assert_array_equal(opened(s3, "whole.zarr").read(ALL), VOXELS)
    assert len(asked(way)) == 64
    assert way.bytes == stored
    assert way.most_at_once == 16


def test_the_indices_of_several_shards_come_together(s3: S3, way: Way, tmp_path: Path) -> None:
    put(s3, tmp_path, "several.zarr", 8)
    tomogram = opened(s3, "several.zarr")
    box = (slice(4, 20), slice(4, 20), slice(4, 8))
    way.asked.clear()
    way.latency = 0.05
    np.testing.assert_array_equal(tomogram.read(box), VOXELS[box])
    first = [one.range for one in way.asked[:9]]
    assert first == [f"bytes=-{16 * 8 + 4}"] * 9  # of all nine before the first chunk
    assert way.most_at_once >= 9


def test_an_index_at_the_start_is_part_of_what_is_kept(s3: S3, way: Way, tmp_path: Path) -> None:
    layout = ShardingCodec(
        chunk_shape=(4,) * 3,
        codecs=[BytesCodec(), ZstdCodec()],
        index_codecs=[BytesCodec()],
        index_location="start",
    )
    stored = put(
        s3, tmp_path, "start.zarr", serializer=layout, compressors=None, chunks=(16,) * 3, shards=None
    )
    tomogram = opened(s3, "start.zarr")
    for box in (MIDDLE, ALL):
        np.testing.assert_array_equal(tomogram.read(box), VOXELS[box])
    assert way.bytes == stored


@pytest.mark.parametrize("limit", [0, 60_000])
def test_little_room_costs_requests_only(limit: int, s3: S3, way: Way, tmp_path: Path) -> None:
    put(s3, tmp_path, f"room-{limit}.zarr", 16)
    tomogram = opened(s3, f"room-{limit}.zarr", cache_bytes=limit)
    for box in (MIDDLE, ALL, MIDDLE) if limit else ((*MIDDLE[:2], slice(3, 9)),):
        np.testing.assert_array_equal(tomogram.read(box), VOXELS[box])


def test_a_shard_that_is_replaced_is_never_read_with_the_old_index(s3: S3, way: Way, tmp_path: Path) -> None:
    put(s3, tmp_path, "replaced.zarr")
    old = (tmp_path / "replaced.zarr/c/0/0/0").read_bytes()
    new = old[:1000] + old[:-1000]  # as long, with other bytes at every place
    box = (slice(0, 4),) * 3
    tomogram = opened(s3, "replaced.zarr")
    np.testing.assert_array_equal(tomogram.read(box), VOXELS[box])
    s3.bucket.put("replaced.zarr/c/0/0/0", new)
    np.testing.assert_array_equal(tomogram.read(box), VOXELS[box])  # what is kept is of one version
    for _ in range(2):
        with pytest.raises(BrokenSourceError, match=r"replaced\.zarr.* c/0/0/0 was replaced"):
            tomogram.read(ALL)


def test_a_shard_that_is_replaced_after_its_index_came(s3: S3, way: Way, tmp_path: Path) -> None:
    put(s3, tmp_path, "meanwhile.zarr")
    old = (tmp_path / "meanwhile.zarr/c/0/0/0").read_bytes()
    tomogram = opened(s3, "meanwhile.zarr")

    def replace(method: str, path: str, before: int) -> None:
        if before == 1:
            s3.bucket.put("meanwhile.zarr/c/0/0/0", old[:1000] + old[:-1000])

    way.fault = replace
    with pytest.raises(BrokenSourceError, match="c/0/0/0 was replaced"):
        tomogram.read(MIDDLE)


def test_threads_share_what_is_on_its_way(s3: S3, way: Way, tmp_path: Path) -> None:
    stored = put(s3, tmp_path, "threads.zarr", 16)
    tomogram = opened(s3, "threads.zarr")
    way.latency = 0.01
    boxes = [MIDDLE, HALF, ALL, (slice(9, 32), *MIDDLE[1:])] * 2
    with ThreadPoolExecutor(8) as pool:
        for box, found in zip(boxes, pool.map(tomogram.read, boxes), strict=True):
            np.testing.assert_array_equal(found, VOXELS[box])
    assert way.bytes == stored


def test_a_store_that_is_down_is_not_asked_for_everything(s3: S3, way: Way, tmp_path: Path) -> None:
    put(s3, tmp_path, "down.zarr", 8)
    tomogram = opened(s3, "down.zarr", max_retries=0)
    way.asked.clear()
    way.fault = lambda *_: "503"
    with pytest.raises(SourceError, match=r"failed.* to get c/"):
        tomogram.read(ALL)
    assert len({one.path for one in way.asked}) <= 16 + 3  # of 64


def test_what_fails_now_and_then_is_asked_for_again(s3: S3, way: Way, tmp_path: Path) -> None:
    put(s3, tmp_path, "faulty.zarr", 16)
    tomogram = opened(s3, "faulty.zarr")
    way.fault = lambda method, path, before: "503" if before in (0, 3) else None
    np.testing.assert_array_equal(tomogram.read(MIDDLE), VOXELS[MIDDLE])


def test_absent_shards_are_named_or_filled(s3: S3, way: Way, tmp_path: Path) -> None:
    put(s3, tmp_path, "absent.zarr", 16)
    s3.bucket.client.delete_object(Bucket="tomograms", Key="absent.zarr/c/1/0/0")
    with pytest.raises(SourceError, match=r"absent.zarr has no object c/1/0/0"):
        opened(s3, "absent.zarr").read(MIDDLE)
    filled = open_tomogram(
        s3.address("absent.zarr"), voxel_size=10.0, missing="fill", storage_options=s3.options()
    )
    truth = VOXELS.copy()
    truth[16:, :16, :16] = 0
    for box in (MIDDLE, ALL):
        np.testing.assert_array_equal(filled.read(box), truth[box])
    assert sum(one.path.endswith("c/1/0/0") for one in way.asked) == 2  # each tomogram once
