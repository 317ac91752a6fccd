"""A store that is asked again where it fails, and that names the object where it fails every time.

A 503, a timeout, a connection that was reset: the next request mostly succeeds, and a task that gave up
at once would have to be scored again. What a store raises rarely says which object was asked for.
"""

from __future__ import annotations

import asyncio
import errno
import time
from typing import TYPE_CHECKING, TypeVar

from zarr.abc.store import Store
from zarr.storage import WrapperStore

from tomocpt_stream.errors import ActionableError, FullStoreError, JobError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

Result = TypeVar("Result")

TRIES = 3
# Seconds after which a request that fails is not repeated: who took so long has done that by itself.
PATIENCE = 10.0
# What the same request will meet again: a mistake of the caller, or an error that says all there is to say.
_LASTING = (ActionableError, TypeError, ValueError, NotImplementedError, MemoryError)
# What a disk says that has no room, for anybody or for this user, or that is mounted without writing.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class PatientStore(WrapperStore[Store]):
    """A store around another one that repeats a request that fails, after 0.2 s and after 0.8 s.

    One that fails every time is an error of the class `kind` that names store and object, a full disk
    a FullStoreError at once. Errors of this package, and those that a repetition cannot help, come
    through as they are.
    """

    def __init__(self, store: Store, kind: type[ActionableError] = JobError) -> None:
        super().__init__(bare(store))
        self._kind = kind

    def __str__(self) -> str:
        return str(self._store)

    def _with_store(self, store: Store) -> PatientStore:
        return PatientStore(store, self._kind)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the bytes of an object, None where there is none."""
        return await self._ask("get", key, lambda: self._store.get(key, prototype, byte_range))

    async def exists(self, key: str) -> bool:
        """Return whether an object is there."""
        return await self._ask("look for", key, lambda: self._store.exists(key))

    async def getsize(self, key: str) -> int:
        """Return the bytes of an object; one that is not there is a FileNotFoundError."""
        return await self._ask("get the size of", key, lambda: self._store.getsize(key))

    async def set(self, key: str, value: Buffer) -> None:
        """Store an object."""
        await self._ask("store", key, lambda: self._store.set(key, value))

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Store an object unless it is there."""
        await self._ask("store", key, lambda: self._store.set_if_not_exists(key, value))

    async def delete(self, key: str) -> None:
        """Delete an object."""
        await self._ask("delete", key, lambda: self._store.delete(key))

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield the keys of all objects below a prefix, each once."""
        seen: set[str] = set()
        tries = 0
        while True:
            began = time.monotonic()
            try:
                async for key in self._store.list_prefix(prefix):
                    if key not in seen:
                        seen.add(key)
                        yield key
            except _LASTING:
                raise
            except Exception as error:
                tries += 1
                self._refuse("list", prefix or "everything", tries, began, error)
            else:
                return
            await asyncio.sleep(_pause(tries))

    async def _ask(self, what: str, key: str, request: Callable[[], Awaitable[Result]]) -> Result:
        tries = 0
        while True:
            began = time.monotonic()
            try:
                return await request()
            except (*_LASTING, FileNotFoundError):
                raise
            except Exception as error:
                tries += 1
                self._refuse(what, key, tries, began, error)
            await asyncio.sleep(_pause(tries))

    def _refuse(self, what: str, key: str, tries: int, began: float, error: Exception) -> None:
        """Raise the error that names the object, unless the request is to be repeated."""
        full = isinstance(error, OSError) and error.errno in _FULL
        if not full and tries < TRIES and time.monotonic() - began < PATIENCE:
            return
        said = str(error).strip().partition("\n")[0][:300]  # some say pages, which the cause still has
        why = f"{type(error).__name__}: {said}" if said else type(error).__name__
        times = f" {tries} times" if tries > 1 else ""
        if full:
            raise FullStoreError(
                f"{self} has no room for {key} ({why})",
                expected="a disk that can be written to",
                remedy="free some space, or raise the quota, and run again: what is done is kept",
            ) from error
        raise self._kind(
            f"{self} failed{times} to {what} {key} ({why})",
            expected="a store that answers",
            remedy="check its disk, or connection and credentials, and run again: what is done is kept",
        ) from error


def bare(store: Store) -> Store:
    """Return a store without the patience around it."""
    return store._store if isinstance(store, PatientStore) else store


def _pause(tries: int) -> float:
    """Return the seconds to wait after so many tries."""
    return 0.05 * float(4**tries)
