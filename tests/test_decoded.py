"""Large stored chunks are decoded once while a volume is made, and let go afterwards."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.storage import MemoryStore

from tomocpt_stream import zarrays
from tomocpt_stream.decoded import DECODED, DecodedChunks
from tomocpt_stream.tomogram import open_tomogram
from tomocpt_stream.volume import ingest

ARRAY = np.zeros(100, np.uint8)


def test_nothing_is_kept_unless_asked_for() -> None:
    chunks, made = DecodedChunks(), [0]

    def make() -> Any:
        made[0] += 1
        return ARRAY

    for _ in range(2):
        chunks.get("a", make)
    assert made == [2]
    chunks.keep(1000)
    for _ in range(2):
        assert chunks.get("a", make) is ARRAY
    assert made == [3]
    chunks.forget()
    chunks.get("a", make)
    assert made == [4]


def test_the_least_recently_used_goes_first() -> None:
    chunks = DecodedChunks()
    made: list[str] = []

    def make(name: str) -> Any:
        def decode() -> Any:
            made.append(name)
            return ARRAY

        return chunks.get(name, decode)

    chunks.keep(250)
    for name in "abacab":
        make(name)
    assert made == ["a", "b", "c", "b"]  # c drove out b, not a
    big = np.zeros(300, np.uint8)
    assert chunks.get("big", lambda: big) is big
    assert chunks.get("big", lambda: big.copy()) is not big  # more than may be kept


def test_of_those_that_ask_at_once_one_decodes() -> None:
    chunks, made, begun = DecodedChunks(), [], threading.Barrier(4)
    chunks.keep(1000)

    def make() -> Any:
        made.append(1)
        return ARRAY.copy()

    def ask(_: int) -> Any:
        begun.wait(30)
        return chunks.get("a", make)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(4)))
    assert len(made) == 1
    assert all(one is found[0] for one in found)


def test_a_failed_chunk_is_tried_again() -> None:
    chunks = DecodedChunks()
    chunks.keep(1000)
    with pytest.raises(IndexError):
        chunks.get("a", lambda: ARRAY[None][1])
    assert chunks.get("a", lambda: ARRAY) is ARRAY


def test_those_who_waited_for_a_failed_one_are_counted_once() -> None:
    chunks = DecodedChunks()
    chunks.keep(150)
    failing, fail, decoding, decode = (threading.Event() for _ in range(4))

    def bad() -> Any:
        failing.set()
        assert fail.wait(30)
        raise IndexError

    def slow() -> Any:
        decoding.set()
        assert decode.wait(30)
        return ARRAY.copy()

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(chunks.get, "a", bad)
        assert failing.wait(30)
        second = pool.submit(chunks.get, "a", slow)
        fail.set()
        with pytest.raises(IndexError):
            first.result(30)
        assert decoding.wait(30)
        chunks.get("a", ARRAY.copy)
        decode.set()
        second.result(30)
    assert chunks.get("a", lambda: ARRAY) is not ARRAY  # still kept
    assert (chunks._bytes, len(chunks._kept), chunks._decoding) == (100, 1, {})


def test_an_ingestion_decodes_each_large_chunk_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zarrays, "LARGE_CHUNK", 0)
    monkeypatch.setattr("tomocpt_stream.tiles.TILE_BYTES", 4 * 64 * 90 * 90)  # several tiles
    array = zarr.create_array(
        MemoryStore(), shape=(100, 120, 130), chunks=(50, 60, 65), dtype="float32", zarr_format=2
    )
    array[:] = np.random.default_rng(0).normal(size=array.shape)
    asked: list[str] = []
    real = MemoryStore.get

    async def counted(self: MemoryStore, key: str, *arguments: Any, **options: Any) -> Any:
        asked.append(key)
        return await real(self, key, *arguments, **options)

    tomogram = open_tomogram(array, voxel_size=10.0)
    assert tomogram.fingerprint  # of a source in memory: reads all of it
    with monkeypatch.context() as patched:
        patched.setattr(MemoryStore, "get", counted)
        ingest(tomogram, MemoryStore(), voxel_size=8.0)
    chunks = [key for key in asked if key.count(".") == 2 and key[0].isdigit() and len(key) == 5]
    assert sorted(chunks) == sorted(f"{z}.{y}.{x}" for z in range(2) for y in range(2) for x in range(2))
    assert not DECODED._kept
