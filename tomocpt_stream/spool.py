"""What was fetched from a remote store stays, as it was stored, in a nameless file on the local disk.

A tomogram is gone over more than once: its faces, its fill, its voxels; and boxes that are read share
stored chunks. Fetched once, a chunk is then decoded from the disk. The file has no name, so that it is
gone with the process however that ends; two halves of a bounded size take turns.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarr.core.buffer import default_buffer_prototype
from zarr.storage import WrapperStore

from tomocpt_stream.remote import NoRangesError, RemoteStore, ReplacedError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

    Label = tuple[str, ByteRequest | None]

REQUESTS = 16
"""Requests under way at once."""

PART = 4 << 20
"""Bytes of one request; a larger object is fetched in parts."""

LIMIT = 16 << 30
"""Bytes on the disk that one tomogram's objects may take."""

_METADATA = (".json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")


@dataclass
class Traffic:
    """What a process has asked a remote store for; safe to count in from several threads."""

    requests: int = 0
    bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, size: int) -> None:
        """Count one request that brought so many bytes."""
        with self._lock:
            self.requests += 1
            self.bytes += size


class _Half:
    """A file without a name: bytes one after the other, and where each thing begins."""

    def __init__(self) -> None:
        self.file, path = tempfile.mkstemp(prefix="tomocpt-stream-")
        Path(path).unlink()
        weakref.finalize(self, os.close, self.file)
        self.places: dict[Label, tuple[int, int]] = {}
        self.used = 0


class Spool:
    """Bytes by label on the disk, up to `limit` of them, the oldest forgotten first; for several threads."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._halves: list[_Half] = []
        self._lock = threading.Lock()
        self._full = limit <= 0

    def __contains__(self, label: Label) -> bool:
        """Return whether something is kept under a label."""
        with self._lock:
            return any(label in half.places for half in self._halves)

    def get(self, label: Label) -> bytes | None:
        """Return what is kept under a label, None where nothing is (or no longer)."""
        with self._lock:
            half = next((half for half in self._halves if label in half.places), None)
            if half is None:
                return None
            start, size = half.places[label]
        return _read(half.file, start, size)

    def reserve(self, label: Label, size: int) -> Kept | None:
        """Return room for so many bytes, None where there is none: too many, or the disk is full."""
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
        return Kept(self, half, label, start, size)

    def give_up(self) -> None:
        """Keep nothing from now on: the disk is full."""
        with self._lock:
            self._full = True

    def commit(self, kept: Kept) -> None:
        """Let others find what is whole now."""
        with self._lock:
            kept.half.places[kept.label] = kept.start, kept.size


@dataclass(frozen=True)
class Kept:
    """Room in a spool that is being filled; others find it when it is whole."""

    spool: Spool
    half: _Half
    label: Label
    start: int
    size: int

    def read(self) -> bytes:
        """Return what was put there, also where the spool has forgotten it meanwhile."""
        return _read(self.half.file, self.start, self.size)

    def write(self, data: bytes, at: int = 0) -> bool:
        """Put bytes at a place of the room; return whether that went well."""
        try:
            write_at(self.half.file, data, self.start + at)
        except OSError:
            self.spool.give_up()
            return False
        return True


class SpooledStore(WrapperStore[RemoteStore]):
    """A remote store that is asked for each object once, and for many objects at the same time.

    `traffic` counts what was asked for. Metadata are not kept. Pickled, it is empty again.
    """

    def __init__(self, store: RemoteStore, limit: int = LIMIT) -> None:
        super().__init__(store)
        self._limit = limit
        self._start()

    def _start(self) -> None:
        self.traffic = Traffic()
        self._spool = Spool(self._limit)
        self._sizes: dict[str, int] = {}
        self._absent: set[Label] = set()
        self._coming: dict[Label, asyncio.Task[bytes | Kept | None]] = {}
        self._keeps = self._limit > 0
        self._ranges = True
        self._free = asyncio.Semaphore(REQUESTS)

    def __str__(self) -> str:
        return str(self._store)

    def __getstate__(self) -> dict[str, Any]:
        """Keep the address; what was fetched belongs to one process."""
        lost = ("traffic", "_spool", "_sizes", "_absent", "_coming", "_free", "_keeps", "_ranges")
        return {name: value for name, value in self.__dict__.items() if name not in lost}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Come back empty."""
        self.__dict__.update(state)
        self._start()

    def _with_store(self, store: RemoteStore) -> SpooledStore:
        return SpooledStore(store, self._limit)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the bytes of an object, None where there is none; it is fetched once."""
        if key.endswith(_METADATA):
            found = await self._store.get(key, prototype, byte_range)
            self.traffic.add(0 if found is None else len(found))
            return found
        label = (key, byte_range)
        if label in self._absent:
            return None
        kept = await asyncio.to_thread(self._spool.get, label)
        data = await self._fetched(label) if kept is None else kept
        if isinstance(data, Kept):
            data = await asyncio.to_thread(data.read)
        return None if data is None else prototype.buffer.from_bytes(data)

    async def getsize(self, key: str) -> int:
        """Return the bytes of an object; it is asked for once."""
        if key not in self._sizes:
            self._sizes[key] = await self._store.getsize(key)
            self.traffic.add(0)
        return self._sizes[key]

    async def fetch(self, keys: Iterable[str]) -> None:
        """Have whole objects on the disk; so many are asked for at once as the bound allows.

        What fails is left for `get` to ask for again, and to say why. Nothing is fetched once there was
        no room for an object, which would have to come a second time.
        """
        if not self._keeps:
            return

        async def one(label: Label) -> None:
            with suppress(Exception):
                await self._fetched(label)

        wanted: list[Label] = [(key, None) for key in keys]
        await asyncio.gather(
            *(one(label) for label in wanted if label not in self._spool and label not in self._absent)
        )

    async def _fetched(self, label: Label) -> bytes | Kept | None:
        """Fetch an object; return its bytes, or where they are on the disk; None where it is absent.

        Those who ask while it is under way wait for the same answer.
        """
        task = self._coming.get(label)
        if task is None:
            task = self._coming[label] = asyncio.ensure_future(self._ask(label))
            task.add_done_callback(lambda _: self._coming.pop(label, None))
        return await asyncio.shield(task)

    async def _ask(self, label: Label) -> bytes | Kept | None:
        key, byte_range = label
        if byte_range is not None:
            return await self._ask_for_range(label)
        async with self._free:
            first = await self._first(key)
            if first is None:
                self._absent.add(label)
                return None
            data, size, etag = first
            kept = self._spool.reserve(label, size)
            self._keeps = self._keeps and kept is not None
            whole = bytearray(size if kept is None else 0)

            async def take(found: bytes, at: int) -> None:
                if kept is None:
                    whole[at : at + len(found)] = found
                elif not await asyncio.to_thread(kept.write, found, at):
                    raise OSError(f"no room for {key} in the temporary folder {tempfile.gettempdir()}")

            async def bring(start: int) -> None:
                async with self._free:  # until it is written: a slow disk must not fill the memory
                    more = await self._part(key, start, min(size, start + PART), etag)
                    if more is None or more[1] != size:
                        raise ReplacedError(f"{key} was replaced while it was read")
                    await take(more[0], start)

            await take(data, 0)
            here = len(data)
            del data, first
        await asyncio.gather(*(bring(start) for start in range(here, size, PART)))
        if kept:
            self._spool.commit(kept)
            return kept
        return bytes(whole)

    async def _first(self, key: str) -> tuple[bytes, int, str | None] | None:
        """Fetch the first part of an object, or all of it from a server that gives no parts."""
        with suppress(NoRangesError):
            if self._ranges:
                return await self._part(key, 0, PART)
        self._ranges = False
        found = await self._store.get(key, default_buffer_prototype())
        self.traffic.add(0 if found is None else len(found))
        return None if found is None else (found.to_bytes(), len(found), None)

    async def _ask_for_range(self, label: Label) -> bytes | None:
        """Fetch a part of a shard."""
        key, byte_range = label
        async with self._free:
            found = await self._store.get(key, default_buffer_prototype(), byte_range)
        self.traffic.add(0 if found is None else len(found))
        if found is None:
            self._absent.add(label)
            return None
        data = found.to_bytes()
        kept = self._spool.reserve(label, len(data))
        if kept is not None:
            whole = await asyncio.to_thread(kept.write, data)
            if whole:
                self._spool.commit(kept)
        return data

    async def _part(
        self, key: str, start: int, stop: int, etag: str | None = None
    ) -> tuple[bytes, int, str | None] | None:
        found = await self._store.part(key, start, stop, etag)
        self.traffic.add(0 if found is None else len(found[0]))
        return found


def _read(file: int, start: int, size: int) -> bytes:
    parts = []
    while size:
        parts.append(os.pread(file, size, start))
        if not parts[-1]:
            raise OSError("the temporary file of what was fetched is cut short")
        start, size = start + len(parts[-1]), size - len(parts[-1])
    return parts[0] if len(parts) == 1 else b"".join(parts)


def write_at(file: int, data: bytes, start: int) -> None:
    """Write all of `data` at a place of a file that is open."""
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, start)
        view, start = view[written:], start + written
