"""Zarr stores that fail on purpose: where, how and how often is a rule that holds in every process."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from zarr.storage import LocalStore, WrapperStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from zarr.core.buffer import Buffer

Method = Literal["get", "set", "put", "exists", "list"]
Kind = Literal["503", "timeout", "cut short", "slow", "killed", "killed after", "held"]


class ServiceUnavailableError(Exception):
    """What a client of an object store raises when the server answers 503; no OSError, as obstore's."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong with requests of one `method` for keys in which `keys` (a pattern) is found.

    `times` requests fail, whichever processes they come from: each leaves a file in `folder`. None of
    them do once `mend` was called. "killed" ends the process before the request, "killed after" after
    it, but never the `spared` one, which made the fault; "held" waits until `mend` is called.
    """

    folder: Path
    method: Method
    keys: str
    kind: Kind
    times: int = 1_000_000
    spared: int = field(default_factory=os.getpid)

    def strikes(self, method: str, key: str) -> bool:
        """Return whether this request is one that fails; count it."""
        if method != self.method or re.search(self.keys, key) is None or self._cure.exists():
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        for number in range(self.count(), self.times):
            try:
                with (self.folder / f"{number}.fault").open("x") as file:
                    file.write(f"{os.getpid()} {key}\n")
            except FileExistsError:
                continue
            return True
        return False

    def count(self) -> int:
        """Return how many requests have failed."""
        return len(list(self.folder.glob("*.fault")))

    def mend(self) -> None:
        """Let every later request succeed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._cure.touch()

    @property
    def _cure(self) -> Path:
        return self.folder / "mended"

    async def before(self) -> None:
        """Do what happens instead of the request, or before it."""
        if self.kind == "503":
            raise ServiceUnavailableError("503 Service Unavailable")
        if self.kind == "timeout":
            raise TimeoutError
        if self.kind == "slow":
            await asyncio.sleep(0.3)
        if self.kind == "killed":
            self._kill()
        while self.kind == "held" and not self._cure.exists():
            await asyncio.sleep(0.01)

    def _kill(self) -> None:
        assert os.getpid() != self.spared, "a fault for other processes"
        os.kill(os.getpid(), signal.SIGKILL)

    def after(self, found: Buffer | None = None) -> Buffer | None:
        """Return what is left of what the request found."""
        if self.kind == "killed after":
            self._kill()
        return found[: len(found) // 2] if self.kind == "cut short" and found is not None else found


class Faulty(WrapperStore[LocalStore]):
    """A folder as a store whose requests fail by rules; pickled, it fails by the same rules."""

    def __init__(self, store: LocalStore, *faults: Fault) -> None:
        super().__init__(store)
        self._faults = faults

    def _with_store(self, store: LocalStore) -> Faulty:
        return Faulty(store, *self._faults)

    async def _meet(self, method: Method, key: str) -> list[Fault]:
        met = [fault for fault in self._faults if fault.strikes(method, key)]
        for fault in met:
            await fault.before()
        return met

    async def get(self, key: str, *arguments: Any, **options: Any) -> Any:
        met = await self._meet("get", key)
        found = await super().get(key, *arguments, **options)
        for fault in met:
            found = fault.after(found)
        return found

    async def set(self, key: str, value: Buffer) -> None:
        met = await self._meet("set", key)
        await super().set(key, value)
        for fault in met:
            fault.after()

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        met = await self._meet("put", key)
        await super().set_if_not_exists(key, value)
        for fault in met:
            fault.after()

    async def exists(self, key: str) -> bool:
        await self._meet("exists", key)
        return await super().exists(key)

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        await self._meet("list", prefix)
        async for key in self._store.list_prefix(prefix):
            yield key


def wait_until(happened: Any, seconds: float = 60) -> None:
    """Return as soon as `happened()` is true; after so many seconds it never will be."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "what is waited for does not happen"
        time.sleep(0.01)
