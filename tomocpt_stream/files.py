"""One file's bytes as a memory map, whether it lies on a disk or on an object store.

Of a remote file the blocks that are asked for are fetched once, into a nameless file on the local disk
of the same length, which takes room only for what was fetched.
"""

from __future__ import annotations

import asyncio
import io
import os
import socket
import tempfile
import threading
import time
import weakref
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from zarr.core.sync import sync

from tomocpt_stream.errors import ActionableError, BrokenSourceError, SourceError
from tomocpt_stream.patience import PATIENCE, TRIES
from tomocpt_stream.remote import ReplacedError, first_line
from tomocpt_stream.spool import PART, REQUESTS, write_at
from tomocpt_stream.traffic import Traffic

if TYPE_CHECKING:
    from tomocpt_stream.frame import Shape
    from tomocpt_stream.remote import RemoteStore


class StoredFile(Protocol):
    """The bytes of one file; `str` is its address, `size` its length."""

    size: int

    @property
    def traffic(self) -> Traffic | None:
        """What this process has asked a remote store for; None for a file on a disk."""

    def stream(self) -> IO[bytes]:
        """Return the whole file, open for reading from its start."""

    def map(self, offset: int, dtype: np.dtype[Any], shape: Shape, rows: slice) -> npt.NDArray[Any]:
        """Return an array that lies in the file, of whose planes only the `rows` will be looked at.

        OSError or ValueError where the file is not like that any more.
        """

    def identity(self) -> dict[str, Any]:
        """Return plain data that change when the file does."""

    def confirm(self) -> None:
        """Raise a SourceError where the file is not seen from here as it was when it was opened."""


class LocalFile:
    """A file on a disk."""

    traffic: Traffic | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        status = path.stat()
        self.size, self._mtime_ns = status.st_size, status.st_mtime_ns

    def __str__(self) -> str:
        return str(self.path)

    def stream(self) -> IO[bytes]:
        """Return the whole file, open for reading from its start."""
        return self.path.open("rb")

    def map(self, offset: int, dtype: np.dtype[Any], shape: Shape, rows: slice) -> npt.NDArray[Any]:
        """Return an array that lies in the file."""
        del rows  # the others cost nothing
        return np.memmap(self.path, dtype, "r", offset, shape)

    def identity(self) -> dict[str, Any]:
        """Return length and time."""
        return {"bytes": self.size, "mtime_ns": self._mtime_ns}

    def confirm(self) -> None:
        """Raise a SourceError where no file of the same length has this path on this machine."""
        try:
            found = f"a file of {self.path.stat().st_size} bytes"
        except OSError as error:
            found = f"no file ({error})"
        if found != f"a file of {self.size} bytes":
            raise BrokenSourceError(
                f"{socket.gethostname()} finds {found} at {self.path}",
                expected=f"the file of {self.size} bytes that was opened",
                remedy="put it on a file system that all machines share, and leave it as it is until the end",
            )


class RemoteFile:
    """A file on an object store; `traffic` counts what was asked for. Pickled, nothing of it is fetched."""

    def __init__(self, store: RemoteStore, name: str) -> None:
        self._store, self._name = store, name
        self._start()
        first = sync(self._part(0, PART, None))
        if first is None:
            raise BrokenSourceError(
                f"there is no object {self}", expected="a tomogram", remedy="check the address"
            )
        data, self.size, self._etag = first
        self._keep(data, 0)

    def _start(self) -> None:
        self.traffic = Traffic()
        self._file = -1
        self._making = threading.Lock()
        self._here: set[int] = set()
        self._coming: dict[int, asyncio.Task[None]] = {}
        self._free = asyncio.Semaphore(REQUESTS)

    def __str__(self) -> str:
        return f"{self._store}/{self._name}"

    def __getstate__(self) -> dict[str, Any]:
        """Keep the address; what was fetched belongs to one process."""
        return {name: self.__dict__[name] for name in ("_store", "_name", "size", "_etag")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Come back with nothing fetched."""
        self.__dict__.update(state)
        self._start()

    def stream(self) -> IO[bytes]:
        """Return the whole file, open for reading from its start; blocks are fetched as they are read."""
        return io.BufferedReader(_Stream(self), PART)

    def map(self, offset: int, dtype: np.dtype[Any], shape: Shape, rows: slice) -> npt.NDArray[Any]:
        """Return an array that lies in the file, once the bytes of the rows are here."""
        sections, height, width = shape
        line = width * dtype.itemsize
        starts = [offset + (section * height + rows.start) * line for section in range(sections)]
        parts = [(start, start + (rows.stop - rows.start) * line) for start in starts]
        if parts[-1][1] > self.size:
            raise ValueError(f"{self.size} bytes, where byte {parts[-1][1]} was asked for")
        sync(self._ensure({block for start, stop in parts for block in _blocks(start, stop)}))
        with os.fdopen(os.dup(self._file), "rb") as file:
            return np.memmap(file, dtype, "r", offset, shape)

    def read_at(self, start: int, size: int) -> bytes:
        """Return bytes of the file, fewer at its end."""
        stop = min(self.size, start + size)
        if stop <= start:
            return b""
        sync(self._ensure(set(_blocks(start, stop))))
        return os.pread(self._file, stop - start, start)

    def identity(self) -> dict[str, Any]:
        """Return length and the store's tag of the contents."""
        return {"bytes": self.size, "etag": self._etag}

    def confirm(self) -> None:
        """Raise a SourceError where the object is not there as it was."""
        found = sync(self._part(0, 1, self._etag))
        if found is None or found[1] != self.size:
            raise BrokenSourceError(
                f"{socket.gethostname()} finds another object, or none, at {self}",
                expected=f"the object of {self.size} bytes that was opened",
                remedy="leave it as it is until the end",
            )

    async def _ensure(self, blocks: set[int]) -> None:
        tasks = []
        for block in sorted(blocks - self._here):
            task = self._coming.get(block)
            if task is None:
                task = self._coming[block] = asyncio.ensure_future(self._bring(block))
                task.add_done_callback(partial(self._arrived, block))
            tasks.append(asyncio.shield(task))
        await asyncio.gather(*tasks)

    def _arrived(self, block: int, _: asyncio.Task[None]) -> None:
        self._coming.pop(block, None)

    async def _bring(self, block: int) -> None:
        async with self._free:  # until it is written: a slow disk must not fill the memory
            found = await self._part(block * PART, min(self.size, (block + 1) * PART), self._etag)
            if found is not None and found[1] == self.size:
                await asyncio.to_thread(self._keep, found[0], block)
        if found is None or found[1] != self.size:
            raise BrokenSourceError(
                f"{self} was replaced or deleted while it was read",
                expected=f"the object of {self.size} bytes that was opened",
                remedy="leave it as it is until the end, and run again",
            )

    async def _part(self, start: int, stop: int, etag: str | None) -> tuple[bytes, int, str | None] | None:
        """Return bytes of the object, its size and its tag; None where it is gone or another one."""
        for tries in range(1, TRIES + 1):
            began = time.monotonic()
            try:
                found = await self._store.part(self._name, start, stop, etag)
            except ActionableError:
                raise
            except ReplacedError:
                return None
            except Exception as error:
                if tries == TRIES or time.monotonic() - began > PATIENCE:
                    raise SourceError(
                        f"bytes {start} to {stop} of {self} could not be fetched ({first_line(error)})",
                        expected="a store that answers",
                        remedy="check the connection and run again: what is done is kept",
                    ) from error
                await asyncio.sleep(0.05 * 4**tries)
            else:
                self.traffic.add(0 if found is None else len(found[0]), self._name, start)
                return found
        raise AssertionError("unreachable")

    def _keep(self, data: bytes, block: int) -> None:
        try:
            with self._making:
                if self._file < 0:
                    self._file, path = tempfile.mkstemp(prefix="tomocpt-stream-")
                    weakref.finalize(self, os.close, self._file)
                    Path(path).unlink()
                    os.truncate(self._file, self.size)
            write_at(self._file, data, block * PART)
        except OSError as error:
            raise SourceError(
                f"the temporary folder {tempfile.gettempdir()} cannot take what is read of {self} ({error})",
                expected=f"room for up to {self.size / 1e9:.1f} GB",
                remedy="make room there, or set TMPDIR to a folder on a larger disk",
            ) from error
        self._here.add(block)


class _Stream(io.RawIOBase):
    """A remote file as a stream that is read from its start to its end."""

    def __init__(self, file: RemoteFile) -> None:
        super().__init__()
        self._remote, self._at = file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._remote.read_at(self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _blocks(start: int, stop: int) -> range:
    return range(start // PART, -(-stop // PART))
