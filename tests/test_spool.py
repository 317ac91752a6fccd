"""What was fetched is kept on the disk: once, whole, bounded, and gone with the process."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from obstore.store import MemoryStore
from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import ObjectStore

from tomocpt_stream import spool
from tomocpt_stream.errors import BrokenSourceError
from tomocpt_stream.remote import NoRangesError, RemoteStore, connect
from tomocpt_stream.spool import Kept, Spool, SpooledStore, together

if TYPE_CHECKING:
    from tests.buckets import S3, Way

PROTOTYPE = default_buffer_prototype()


def put(kept: Spool, key: str, data: bytes) -> bool:
    room = kept.reserve((key, 0, len(data)))
    if room is None or not room.write(data):
        return False
    kept.commit(room)
    return True


def taken(kept: Spool, key: str, size: int) -> bytes | None:
    found, data = kept.find((key, 0, size)), bytearray(size)
    if found is None:
        return None
    found.read(0, memoryview(data))
    return bytes(data)


def test_what_is_kept_comes_back_until_there_is_no_room() -> None:
    kept = Spool(limit=1000)
    for number in range(20):
        assert put(kept, str(number), bytes([number]) * 100)
        assert taken(kept, str(number), 100) == bytes([number]) * 100
    there = [number for number in range(20) if taken(kept, str(number), 100)]
    assert there == list(range(10, 20))  # two halves of 500 bytes each
    assert not kept.takes(501)
    assert not put(kept, "large", bytes(501))
    assert taken(kept, "large", 501) is None


def test_what_is_not_whole_is_not_found() -> None:
    kept = Spool(limit=1000)
    room = kept.reserve(("a", 0, 10))
    assert room is not None
    assert room.write(b"1234567890")
    assert taken(kept, "a", 10) is None
    kept.commit(room)
    assert taken(kept, "a", 10) == b"1234567890"


def test_files_have_no_name_and_are_closed() -> None:
    kept = Spool(limit=1000)
    assert put(kept, "a", bytes(100))
    file = kept._halves[0].file
    assert os.readlink(f"/proc/self/fd/{file}").endswith("(deleted)")  # noqa: PTH115
    del kept
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)


def test_a_full_disk_keeps_nothing_and_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    kept = Spool(limit=1000)
    assert put(kept, "a", b"1")
    monkeypatch.setattr(spool, "write_at", full)
    assert not put(kept, "b", b"2")
    monkeypatch.undo()
    assert kept.reserve(("c", 0, 1)) is None
    assert not kept.takes(1)
    assert taken(kept, "a", 1) == b"1"


def test_a_large_object_comes_in_parts_at_once(s3: S3, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "PART", 1 << 16)
    data = np.random.default_rng(0).bytes(1_000_000)
    s3.bucket.put("large/object", data)
    way.latency = 0.05
    for limit in (1 << 30, 0):  # kept, or put together in memory
        way.asked.clear()
        store = SpooledStore(connect(s3.address("large"), s3.options()), limit)

        async def several(store: SpooledStore = store) -> list[Any]:
            return await asyncio.gather(*(store.get("object", PROTOTYPE) for _ in range(3)))

        assert [found.to_bytes() for found in sync(several())] == [data] * 3
        ranges = [one.range for one in way.asked]
        assert len(ranges) == len(set(ranges)) == 16  # who asks meanwhile waits for the same answer
        assert store.traffic.bytes == len(data)
        assert store.traffic.requests == 16
    assert way.most_at_once >= 8


@pytest.mark.parametrize("size", [0, 1, 65536, 65537])
def test_objects_of_every_size(size: int, s3: S3, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "PART", 65536)
    data = np.random.default_rng(size).bytes(size)
    s3.bucket.put(f"sizes/{size}", data)
    store = SpooledStore(connect(s3.address("sizes"), s3.options()))
    for _ in range(2):
        found = sync(store.get(str(size), PROTOTYPE))
        assert found is not None
        assert found.to_bytes() == data
    assert sync(store.get("absent", PROTOTYPE)) is None
    assert sync(store.get("absent", PROTOTYPE)) is None
    assert sum(one.path.endswith("absent") for one in way.asked) == 1


def test_an_object_that_is_replaced_between_its_parts_is_an_error(
    s3: S3, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "PART", 1000)
    s3.bucket.put("replaced/object", bytes(3000))

    def replace(method: str, path: str, before: int) -> None:
        if before == 1:
            s3.bucket.put("replaced/object", bytes([1]) * 3000)

    way.fault = replace
    store = SpooledStore(connect(s3.address("replaced"), s3.options()))
    for _ in range(2):  # nor may parts of one be given with parts of the other later on
        with pytest.raises(BrokenSourceError, match="object was replaced while it was read"):
            sync(store.get("object", PROTOTYPE))


def test_what_was_fetched_is_read_though_others_took_its_place(s3: S3, way: Way) -> None:
    for number in range(8):
        s3.bucket.put(f"crowd/{number}", bytes([number]) * 1000)
    store = SpooledStore(connect(s3.address("crowd"), s3.options()), 2000)  # two objects at a time
    way.latency = 0.02

    async def together() -> list[Any]:
        return await asyncio.gather(*(store.get(str(number), PROTOTYPE) for number in range(8)))

    assert [found.to_bytes() for found in sync(together())] == [bytes([n]) * 1000 for n in range(8)]
    assert store.traffic.requests == 8


def test_nothing_is_fetched_ahead_where_nothing_can_be_kept(s3: S3, way: Way) -> None:
    s3.bucket.put("ahead/a", bytes(1000))
    for limit, requests in ((0, 1), (1000, 3), (4000, 1)):
        store = SpooledStore(connect(s3.address("ahead"), s3.options()), limit)
        sync(store.fetch([("a", None)]))
        assert sync(store.get("a", PROTOTYPE)) is not None
        sync(store.fetch([("a", None)]))
        assert sync(store.get("a", PROTOTYPE)) is not None
        assert store.traffic.requests == (2 if limit == 0 else requests)


def test_what_waits_for_the_disk_is_bounded(s3: S3, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "PART", 1000)
    monkeypatch.setattr(spool, "REQUESTS", 2)
    s3.bucket.put("slow/a", bytes(10_000))
    held, most = 0, 0
    lock, fetched, real = threading.Lock(), SpooledStore._part, Kept.write

    async def part(self: SpooledStore, *arguments: Any) -> Any:
        nonlocal held, most
        found = await fetched(self, *arguments)
        with lock:
            held += 1
            most = max(most, held)
        return found

    def slow(self: Kept, *arguments: Any) -> bool:
        nonlocal held
        time.sleep(0.05)
        with lock:
            held -= 1
        return real(self, *arguments)

    monkeypatch.setattr(SpooledStore, "_part", part)
    monkeypatch.setattr(Kept, "write", slow)
    store = SpooledStore(connect(s3.address("slow"), s3.options()))
    assert sync(store.get("a", PROTOTYPE)) is not None
    assert held == 0
    assert most <= 2


SIZES = {"a": 5000, "d": 1000}
CONTENTS = {key: np.random.default_rng(size).bytes(size) for key, size in SIZES.items()}
EXTENTS = st.builds(
    lambda start, size: RangeByteRequest(start, start + size), st.integers(0, 999), st.integers(1, 3000)
)
RANGES = st.one_of(st.none(), EXTENTS, st.builds(SuffixByteRequest, st.integers(1, 6000)))
ASKED = st.lists(st.lists(st.tuples(st.sampled_from(["a", "d", "e"]), RANGES), max_size=6), max_size=5)


class WithoutEnds(RemoteStore):
    """As Azure is: a part has to begin somewhere."""

    async def end(self, key: str, count: int) -> Any:
        raise NoRangesError("no end", expected="a start", remedy="ask otherwise")


class WithoutParts(WithoutEnds):
    """As a plain web server is."""

    async def part(self, key: str, start: int, stop: int, etag: str | None = None) -> Any:
        raise NoRangesError("no part", expected="all", remedy="ask otherwise")


KINDS = [RemoteStore, WithoutEnds, WithoutParts]


def remote(kind: type[RemoteStore]) -> RemoteStore:
    store = MemoryStore()
    for key, data in CONTENTS.items():
        store.put(key, data)
    return kind(ObjectStore(store), "memory://")


def part_of(data: Any, byte_range: Any) -> Any:
    if byte_range is None:
        return data
    if isinstance(byte_range, SuffixByteRequest):
        return data[-byte_range.suffix :]
    return data[byte_range.start : byte_range.end]


@settings(deadline=None, max_examples=100)
@given(
    turns=ASKED,
    limit=st.sampled_from([0, 500, 3000, 1 << 20]),
    ahead=st.booleans(),
    kind=st.sampled_from(KINDS),
)
def test_any_parts_come_once_and_are_right(
    turns: Any, limit: int, ahead: bool, kind: type[RemoteStore]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "PART", 700)
        store = SpooledStore(remote(kind), limit)

        async def together(wanted: Any) -> list[Any]:
            return await asyncio.gather(*(store.get(key, PROTOTYPE, where) for key, where in wanted))

        for wanted in turns:
            if ahead:
                sync(store.fetch(wanted))
            for (key, where), found in zip(wanted, sync(together(wanted)), strict=True):
                if key == "e":
                    assert found is None
                else:
                    assert found.to_bytes() == part_of(CONTENTS[key], where)
        if limit == 1 << 20:
            assert store.traffic.bytes == store.traffic.stored
        if limit == 1 << 20 and kind is not WithoutParts:
            needed = {
                (key, byte)
                for key, where in itertools.chain(*turns)
                if key != "e"
                for byte in part_of(range(SIZES[key]), where)
            }
            assert store.traffic.stored == len(needed)


def test_a_server_may_give_parts_of_some_objects_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # Parts of the first wait for their turn when the second says that there are none of it.
    class Some(RemoteStore):
        async def part(self, key: str, start: int, stop: int, etag: str | None = None) -> Any:
            if key == "d":
                await turn.wait()
                raise NoRangesError("no part", expected="all", remedy="ask otherwise")
            if start:
                turn.set()
                await asyncio.sleep(0)
            return await super().part(key, start, stop, etag)

    monkeypatch.setattr(spool, "PART", 10)
    for limit in (0, 1 << 20):
        turn = asyncio.Event()
        store = SpooledStore(remote(Some), limit)

        async def together(store: SpooledStore = store) -> list[Any]:
            return await asyncio.gather(*(store.get(key, PROTOTYPE) for key in "ada"))

        for _ in range(2):
            found = [one.to_bytes() for one in sync(together())]
            assert found == [CONTENTS["a"], CONTENTS["d"], CONTENTS["a"]]


@given(
    st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 300)), max_size=40),
    st.sampled_from([1, 500, 10_000]),
)
def test_neighbours_are_asked_for_together(found: list[tuple[int, int]], most: int) -> None:
    extents = [(start, start + size) for start, size in found]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "PART", most)
        parts = together(extents)
    needed = {byte for extent in extents for byte in range(*extent)}
    covered = {byte for part in parts for byte in range(*part)}
    assert needed <= covered
    assert len(covered) <= 1.05 * len(needed)
    largest = max((stop - start for start, stop in extents), default=0)
    assert all(stop - start <= max(most, largest) for start, stop in parts)


def test_a_small_gap_costs_less_than_a_request() -> None:
    assert together([(0, 100), (200, 300), (105, 200)]) == [(0, 300)]
    assert together([(0, 100), (106, 206)]) == [(0, 100), (106, 206)]
    assert together([(0, 100), (0, 100), (20, 30)]) == [(0, 100)]
    assert together([(0, 1000), (1050, 1051), (1080, 1081)]) == [(0, 1051), (1080, 1081)]
