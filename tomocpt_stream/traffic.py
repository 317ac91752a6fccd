"""What was asked of a remote store, and how much of it was asked for more than once."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

Label = tuple[str, int, int]
"""Bytes of a stored object: its key, the first byte, the last + 1."""


@dataclass
class Traffic:
    """What was asked of a remote store: requests, and bytes that came; safe to count in from several threads.

    Pickled, it takes its counts along.
    """

    requests: int = 0
    bytes: int = 0
    _extents: set[Label] = field(default_factory=set, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the lock behind."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Come back with a lock of its own."""
        self.__dict__.update(state, _lock=threading.Lock())

    @property
    def stored(self) -> int:
        """The bytes that came, each byte of an object counted once however often it came."""
        with self._lock:
            extents = sorted(self._extents)
        count, last, end = 0, None, 0
        for key, start, stop in extents:
            if key != last:
                last, end = key, 0
            count += max(0, stop - max(start, end))
            end = max(end, stop)
        return count

    def add(self, size: int, key: str, start: int = 0) -> None:
        """Count one request that brought so many bytes of an object, from its byte `start` on."""
        with self._lock:
            self.requests += 1
            self.bytes += size
            if size:
                self._extents.add((key, start, start + size))

    def take(self) -> Traffic:
        """Return what was counted so far, and begin anew."""
        with self._lock:
            taken = Traffic(self.requests, self.bytes, self._extents)
            self.requests, self.bytes, self._extents = 0, 0, set()
        return taken

    def include(self, other: Traffic) -> None:
        """Count what another process has asked for, too."""
        with self._lock:
            self.requests += other.requests
            self.bytes += other.bytes
            self._extents |= other._extents
