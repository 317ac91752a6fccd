"""What was fetched from a remote store stays, as it was stored, in a nameless file on the local disk.

A tomogram is gone over more than once: its faces, its fill, its voxels; and boxes that are read share
stored chunks. Fetched once, a chunk is then decoded from the disk, a part of a shard with the parts
beside it. The file has no name, so that it is gone with the process however that ends; two halves of a
bounded size take turns.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
import weakref
from bisect import bisect_left, bisect_right, insort
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import WrapperStore

from tomocpt_stream.errors import BrokenSourceError
from tomocpt_stream.remote import ForbiddenError, NoRangesError, RemoteStore, ReplacedError
from tomocpt_stream.traffic import Traffic

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

    from tomocpt_stream.traffic import Label

    Answer = tuple[bytes, int, str | None]

REQUESTS = 16
"""Requests under way at once."""

PART = 4 << 20
"""Bytes of one request; more are fetched in parts."""

LIMIT = 16 << 30
"""Bytes on the disk that one tomogram's objects may take."""

SPARE = 0.05
"""Bytes that nobody asked for, as a share of those that somebody did, that may come with them."""

# Failures after which nothing more is fetched ahead.
_FAILURES = 3
_METADATA = (".json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")


class _Half:
    """A file without a name: bytes one after the other, and where each thing begins."""

    def __init__(self) -> None:
        self.file, path = tempfile.mkstemp(prefix="tomocpt-stream-")
        Path(path).unlink()
        weakref.finalize(self, os.close, self.file)
        self.places: dict[Label, int] = {}
        self.used = 0


class Spool:
    """Bytes of objects on the disk, up to `limit` of them, the oldest forgotten first; for several threads.

    A label is the key of an object and where in it the bytes begin and end.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._halves: list[_Half] = []
        self._lock = threading.Lock()
        self._full = limit <= 0

    def takes(self, size: int) -> bool:
        """Return whether so many bytes can be kept at the same time."""
        with self._lock:
            return not self._full and 2 * size <= self._limit

    def find(self, label: Label) -> Kept | None:
        """Return what is kept under a label, None where nothing is (or no longer)."""
        with self._lock:
            half = next((half for half in self._halves if label in half.places), None)
            return None if half is None else Kept(self, half, label, half.places[label])

    def reserve(self, label: Label) -> Kept | None:
        """Return room for the bytes of a label, None where there is none: too many, or the disk is full."""
        size = label[2] - label[1]
        with self._lock:
            if self._full or 2 * size > self._limit:
                return None
            try:
                if not self._halves or 2 * (self._halves[0].used + size) > self._limit:
                    self._halves = [_Half(), *self._halves[:1]]
            except OSError:
                self._full = True
                return None
            half = self._halves[0]
            start, half.used = half.used, half.used + size
        return Kept(self, half, label, start)

    def give_up(self) -> None:
        """Keep nothing from now on: the disk is full."""
        with self._lock:
            self._full = True

    def commit(self, kept: Kept) -> None:
        """Let others find what is whole now."""
        with self._lock:
            kept.half.places[kept.label] = kept.at


@dataclass(frozen=True)
class Kept:
    """Room in a spool, from byte `at` of its file on; others find it when it is filled."""

    spool: Spool
    half: _Half
    label: Label
    at: int

    def read(self, start: int, into: memoryview) -> None:
        """Read bytes of the object, from `start` on, also where the spool has forgotten them meanwhile."""
        _read(self.half.file, self.at + start - self.label[1], into)

    def write(self, data: bytes) -> bool:
        """Fill the room; return whether that went well."""
        try:
            write_at(self.half.file, data, self.at)
        except OSError:
            self.spool.give_up()
            return False
        return True


@dataclass(frozen=True)
class _Piece:
    """Bytes of one object, on the disk or in memory."""

    start: int
    stop: int
    where: Kept | bytes

    def read(self, start: int, into: memoryview) -> None:
        """Read bytes of the object that are all in this piece, from `start` on."""
        if isinstance(self.where, Kept):
            self.where.read(start, into)
        else:
            at = start - self.start
            into[:] = memoryview(self.where)[at : at + len(into)]


class _Object:
    """What is known of an object: its length, the tag of its contents, and what of it may be at hand.

    `pieces` are pairs of first and last byte, in order, without overlap: kept, on their way, or lost.
    """

    def __init__(self, size: int, etag: str | None) -> None:
        self.size, self.etag = size, etag
        self.pieces: list[tuple[int, int]] = []

    def overlapping(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the pieces that have bytes from `start` to `stop`."""
        first = bisect_right(self.pieces, (start, self.size))
        first -= first > 0 and self.pieces[first - 1][1] > start
        return self.pieces[first : bisect_left(self.pieces, (stop, 0))]


class SpooledStore(WrapperStore[RemoteStore]):
    """A remote store that is asked for each byte once, and for many objects at the same time.

    `traffic` counts what was asked for. Metadata are not kept. Pickled, it is empty again. All bytes of
    an object are of one version of it: one that is replaced is a BrokenSourceError from then on.
    """

    def __init__(self, store: RemoteStore, limit: int = LIMIT) -> None:
        super().__init__(store)
        self._limit = limit
        self._start()

    def _start(self) -> None:
        self.traffic = Traffic()
        self._spool = Spool(self._limit)
        self._objects: dict[str, _Object] = {}
        self._absent: set[str] = set()
        self._beginning: dict[str, asyncio.Task[_Piece | None]] = {}
        self._coming: dict[Label, asyncio.Task[_Piece]] = {}
        self._keeps = self._limit > 0
        self._ranges = True
        self._free = asyncio.Semaphore(REQUESTS)

    def __str__(self) -> str:
        return str(self._store)

    def __getstate__(self) -> dict[str, Any]:
        """Keep the address; what was fetched belongs to one process."""
        return {"_store": self._store, "_limit": self._limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Come back empty."""
        self.__dict__.update(state)
        self._start()

    def _with_store(self, store: RemoteStore) -> SpooledStore:
        return SpooledStore(store, self._limit)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the bytes of an object, None where there is none; each is fetched once."""
        if key.endswith(_METADATA):
            found = await self._store.get(key, prototype, byte_range)
            self.traffic.add(0 if found is None else len(found), key)
            return found
        brought = await self._bring(key, byte_range)
        if brought is None:
            return None
        start, stop, pieces = brought
        data = await asyncio.to_thread(_joined, pieces, start, stop)
        return prototype.buffer.from_bytes(data)

    async def getsize(self, key: str) -> int:
        """Return the bytes of an object; nothing is asked where some of it was fetched."""
        if key not in self._objects:
            size = await self._store.getsize(key)
            self.traffic.add(0, key)
            return size
        return self._objects[key].size

    async def fetch(self, wanted: Iterable[tuple[str, ByteRequest | None]]) -> None:
        """Have objects, or parts of them, on the disk; so much is asked for at once as the bound allows.

        What fails is left for `get` to ask for again, and to say why; the rest is, too, after a few
        failures, as each may have taken minutes. Nothing is fetched once there was no room for something,
        which would have to come a second time.
        """
        gate, failures = asyncio.Semaphore(REQUESTS), 0

        async def one(key: str, byte_range: ByteRequest | None) -> None:
            nonlocal failures
            async with gate:
                if self._keeps and failures < _FAILURES:
                    try:
                        await self._bring(key, byte_range)
                    except ForbiddenError:
                        pass  # which was said at once
                    except Exception:
                        failures += 1

        await asyncio.gather(*(one(key, byte_range) for key, byte_range in wanted))

    async def _bring(self, key: str, byte_range: ByteRequest | None) -> tuple[int, int, list[_Piece]] | None:
        """Return where a part of an object begins and ends, and pieces that hold it; fetch what is not here.

        None where there is no such object. Those who ask for what is under way wait for the same answer.
        """
        if key in self._absent:
            return None
        first = None
        if key not in self._objects:
            if key not in self._beginning:
                self._beginning[key] = asyncio.ensure_future(self._begin(key, byte_range))
                self._beginning[key].add_done_callback(lambda _: self._beginning.pop(key, None))
            first = await asyncio.shield(self._beginning[key])
            if first is None:
                return None
        start, stop = _extent(byte_range, self._objects[key].size)
        # Nothing is awaited until all that is missing is on its way: nobody else sends for it, too.
        here, coming, gaps = self._sources(key, start, stop, first)
        if gaps and not self._ranges:
            self._objects[key].pieces.clear()
            gaps = [(0, self._objects[key].size)]
        keep = self._spool.takes(stop - start)
        coming += [self._send_for((key, *gap), keep=keep) for gap in gaps]
        return start, stop, [*here, *await asyncio.gather(*map(asyncio.shield, coming))]

    def _sources(
        self, key: str, start: int, stop: int, first: _Piece | None
    ) -> tuple[list[_Piece], list[asyncio.Task[_Piece]], list[tuple[int, int]]]:
        """Return what of a part of an object is here, what is on its way, and what is neither.

        `first` came just now, and may not have been kept.
        """
        here, coming, known = [], [], self._objects[key]
        extents = []
        if first is not None and first.start < stop and first.stop > start:
            here.append(first)
            extents.append((first.start, first.stop))
        for piece in known.overlapping(start, stop):
            label = (key, *piece)
            if label in self._coming:
                coming.append(self._coming[label])
            elif (kept := self._spool.find(label)) is not None:
                here.append(_Piece(*piece, kept))
            else:
                known.pieces.remove(piece)  # forgotten, or never kept
                continue
            extents.append(piece)
        gaps = []
        for begin, end in [*sorted(extents), (stop, stop)]:
            if begin > start:
                gaps += [(at, min(at + PART, begin)) for at in range(start, begin, PART)]
            start = max(start, end)
        return here, coming, gaps

    def _send_for(self, label: Label, *, keep: bool) -> asyncio.Task[_Piece]:
        """Ask for a part of an object of which nothing is here or on its way."""
        key, start, stop = label
        task = self._coming[label] = asyncio.ensure_future(self._ask(label, keep=keep))
        task.add_done_callback(lambda _: self._coming.pop(label, None))
        insort(self._objects[key].pieces, (start, stop))
        return task

    async def _begin(self, key: str, byte_range: ByteRequest | None) -> _Piece | None:
        """Ask for the first time for something of an object, which says how long it is and which version."""
        async with self._free:  # until it is written: a slow disk must not fill the memory
            found = await self._first(key, byte_range)
            if found is None:
                self._absent.add(key)
                return None
            data, size, etag, start = found
            begin, end = _extent(byte_range, size)
            keep = self._spool.takes(end - begin)
            piece = await self._keep((key, start, start + len(data)), data, keep=keep)
        self._objects[key] = known = _Object(size, etag)
        if data:
            known.pieces.append((piece.start, piece.stop))
        return piece

    async def _first(
        self, key: str, byte_range: ByteRequest | None
    ) -> tuple[bytes, int, str | None, int] | None:
        """Return bytes, and where in the object they begin; all of it from a server that gives no parts."""
        start, found = 0, None
        with suppress(NoRangesError):
            if self._ranges:
                match byte_range:
                    case SuffixByteRequest(suffix):
                        found = await self._end(key, suffix)
                        start = 0 if found is None else found[1] - len(found[0])
                    case RangeByteRequest(start, stop):
                        found = await self._part(key, start, min(stop, start + PART))
                    case OffsetByteRequest(start):
                        found = await self._part(key, start, start + PART)
                    case None:
                        found = await self._part(key, 0, PART)
                return None if found is None else (*found, start)
        self._ranges = False
        found = await self._whole(key)
        return None if found is None else (*found, 0)

    async def _end(self, key: str, count: int) -> Answer | None:
        """Fetch the last bytes of an object."""
        try:
            found = await self._store.end(key, count)
        except NoRangesError:  # of Azure a part has to begin somewhere
            try:
                size = await self.getsize(key)
            except FileNotFoundError:
                return None
            return await self._part(key, max(0, size - count), max(1, size))
        self._count(key, found, 0 if found is None else found[1] - len(found[0]))
        return found

    async def _part(self, key: str, start: int, stop: int, etag: str | None = None) -> Answer | None:
        found = await self._store.part(key, start, stop, etag)
        self._count(key, found, start)
        return found

    async def _whole(self, key: str) -> Answer | None:
        found = await self._store.get(key, default_buffer_prototype())
        answer = None if found is None else (found.to_bytes(), len(found), None)
        self._count(key, answer, 0)
        return answer

    def _count(self, key: str, answer: Answer | None, start: int) -> None:
        self.traffic.add(0 if answer is None else len(answer[0]), key, start)

    async def _ask(self, label: Label, *, keep: bool) -> _Piece:
        """Fetch a part of an object of which something was fetched before."""
        key, start, stop = label
        known = self._objects[key]
        async with self._free:
            with suppress(ReplacedError):
                parts = self._ranges  # may change while this waits: no server has to give parts of all
                found = await (self._part(key, start, stop, known.etag) if parts else self._whole(key))
                if found is not None and found[1] == known.size:
                    data = found[0] if parts else found[0][start:stop]
                    return await self._keep(label, data, keep=keep)
        raise BrokenSourceError(
            f"{self} has an object of which {key} was replaced while it was read, or deleted",
            expected="the object that was read from at first",
            remedy="leave it as it is until the end, and run again",
        )

    async def _keep(self, label: Label, data: bytes, *, keep: bool) -> _Piece:
        """Put bytes on the disk; return where they are, in memory if they could not be put there."""
        room = self._spool.reserve(label) if keep else None
        if room is not None and await asyncio.to_thread(room.write, data):
            self._spool.commit(room)
            return _Piece(*label[1:], room)
        self._keeps = False
        return _Piece(*label[1:], data)


def together(extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return parts of an object that cover extents (first byte, last byte + 1), neighbours in one part.

    A part has at most PART bytes, unless one extent has more, and of them the share SPARE at most is in
    no extent.
    """
    parts: list[tuple[int, int]] = []
    spare = 0.0
    for start, stop in sorted(extents):
        if parts:
            begin, end = parts[-1]
            gap = max(0, start - end)
            if stop <= end or (gap <= spare and stop - begin <= PART):
                parts[-1] = begin, max(end, stop)
                spare += SPARE * max(0, stop - max(start, end)) - gap
                continue
        parts.append((start, stop))
        spare = SPARE * (stop - start)
    return parts


def _extent(byte_range: ByteRequest | None, size: int) -> tuple[int, int]:
    """Return where a part of an object of so many bytes begins and ends."""
    match byte_range:
        case RangeByteRequest(start, stop):
            return min(start, size), min(max(start, stop), size)
        case OffsetByteRequest(start):
            return min(start, size), size
        case SuffixByteRequest(count):
            return max(0, size - count), size
    return 0, size


def _joined(pieces: list[_Piece], start: int, stop: int) -> bytearray:
    """Return the bytes of an object from `start` to `stop`, which the pieces cover."""
    whole = bytearray(stop - start)
    view, at = memoryview(whole), start
    for piece in sorted(pieces, key=lambda piece: piece.start):
        until = min(stop, piece.stop)
        if at < until:
            piece.read(at, view[at - start : until - start])
            at = until
    return whole


def _read(file: int, start: int, into: memoryview) -> None:
    while into:
        count = os.preadv(file, [into], start)
        if not count:
            raise OSError("the temporary file of what was fetched is cut short")
        start, into = start + count, into[count:]


def write_at(file: int, data: bytes, start: int) -> None:
    """Write all of `data` at a place of a file that is open."""
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, start)
        view, start = view[written:], start + written
