"""A remote file as a memory map: the blocks that are asked for, each once."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tomocpt_stream import files
from tomocpt_stream.errors import BrokenSourceError, SourceError
from tomocpt_stream.files import RemoteFile
from tomocpt_stream.remote import connect

if TYPE_CHECKING:
    from pathlib import Path

    from tests.buckets import S3, Way

SHAPE = (20, 50, 40)
DATA = np.random.default_rng(0).integers(-9, 9, SHAPE).astype("<i2")
OFFSET = 1024


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PART", 4096)


@pytest.fixture
def file(s3: S3, way: Way) -> RemoteFile:
    s3.bucket.put("files/a.bin", bytes(OFFSET) + DATA.tobytes())
    return RemoteFile(connect(s3.address("files"), s3.options()), "a.bin")


def planes(file: RemoteFile, start: int, stop: int, rows: slice = slice(0, 50)) -> Any:
    offset = OFFSET + start * 50 * 40 * 2
    return file.map(offset, np.dtype("<i2"), (stop - start, 50, 40), rows)


def test_only_what_is_looked_at_is_fetched(file: RemoteFile, way: Way) -> None:
    way.asked.clear()
    np.testing.assert_array_equal(planes(file, 10, 12), DATA[10:12])
    blocks = range((OFFSET + 10 * 4000) // 4096, (OFFSET + 12 * 4000 - 1) // 4096 + 1)
    assert sorted(one.range or "" for one in way.asked) == [
        f"bytes={block * 4096}-{min(file.size, (block + 1) * 4096) - 1}" for block in blocks
    ]
    planes(file, 10, 12)
    assert len(way.asked) == len(blocks)  # none of them again
    way.asked.clear()
    found = planes(file, 0, 20, slice(10, 12))  # 160 bytes of each plane
    np.testing.assert_array_equal(found[:, 10:12], DATA[:, 10:12])
    assert len(way.asked) < 20


def test_threads_share_what_comes(file: RemoteFile, way: Way) -> None:
    way.asked.clear()
    way.latency = 0.02
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: planes(file, 0, 20).sum(), range(4)))
    assert found == [DATA.sum()] * 4
    ranges = [one.range for one in way.asked]
    assert len(ranges) == len(set(ranges)) == -(-file.size // 4096) - 1  # the first came with the size
    assert file.traffic is not None
    assert file.traffic.bytes == file.size


def test_a_stream_reads_all_of_it(file: RemoteFile) -> None:
    with file.stream() as stream:
        assert stream.read(7) == bytes(7)
        assert bytes(7) + stream.read() == bytes(OFFSET) + DATA.tobytes()


def test_what_travels_is_the_address(file: RemoteFile) -> None:
    planes(file, 0, 20)
    data = pickle.dumps(file)
    assert len(data) < 4000
    there = pickle.loads(data)
    assert there.identity() == file.identity()
    np.testing.assert_array_equal(planes(there, 3, 4), DATA[3:4])


def test_a_file_beyond_its_end_is_not_read(file: RemoteFile) -> None:
    with pytest.raises(ValueError, match="bytes"):
        planes(file, 19, 22)


def test_another_file_in_its_place_is_an_error(file: RemoteFile, s3: S3) -> None:
    file.confirm()
    s3.bucket.put("files/a.bin", bytes(file.size))
    with pytest.raises(BrokenSourceError, match=r"files/a\.bin was replaced"):
        planes(file, 10, 11)
    with pytest.raises(BrokenSourceError, match=r"another object, or none, at .*files/a\.bin"):
        file.confirm()
    s3.bucket.client.delete_object(Bucket=s3.bucket.name, Key="files/a.bin")
    with pytest.raises(BrokenSourceError, match="another object, or none"):
        file.confirm()


def test_what_took_long_is_not_asked_for_again(
    file: RemoteFile, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.0)  # the store has been patient by itself
    way.asked.clear()
    way.fault = lambda *_: "503"
    with pytest.raises(SourceError, match=r"bytes 40960 to 45056 of .*a\.bin .*503") as caught:
        planes(file, 10, 11, slice(0, 1))
    assert "\n" not in str(caught.value)
    assert len(way.asked) == 1 + 3  # max_retries of the fixture's options


def test_a_full_temporary_folder_says_so(
    s3: S3, way: Way, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    s3.bucket.put("files/full.bin", bytes(10_000))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_at", full)
    with pytest.raises(SourceError, match=r"temporary folder .* cannot take .*No space left.*set TMPDIR"):
        RemoteFile(connect(s3.address("files"), s3.options()), "full.bin")
