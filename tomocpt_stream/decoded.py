"""Large stored chunks of sources, kept decoded for a while as a volume is made of them.

A box that is resampled takes parts of several stored chunks, and its neighbours take other parts of the
same ones: nine cubes of 256 voxels, of 184 x 630 x 630 resampled to 1.45 times the voxel size, would be
decoded 81 times, and are 26 times with four of them kept.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    import numpy.typing as npt

LIMIT = 256 << 20
"""Bytes of decoded chunks that one process keeps: four cubes of 256 float32 voxels."""


class DecodedChunks:
    """Arrays by key, the least recently used forgotten first; none is kept unless that was asked for.

    `get` may be called from several threads; of those that ask for one chunk at once, one decodes it.
    """

    def __init__(self) -> None:
        self._limit = self._bytes = 0
        self._kept: OrderedDict[Hashable, npt.NDArray[Any]] = OrderedDict()
        self._decoding: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def keep(self, limit: int = LIMIT) -> None:
        """Keep up to `limit` bytes from now on."""
        with self._lock:
            self._limit = limit

    def forget(self) -> None:
        """Let go of everything, and keep nothing from now on."""
        with self._lock:
            self._limit = self._bytes = 0
            self._kept.clear()

    def get(self, key: Hashable, decode: Callable[[], npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """Return the array of a key, which nobody may write to; `decode` makes it where it is not kept."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            decoding = self._decoding.setdefault(key, threading.Lock()) if self._limit else None
        if decoding is None:
            return decode()
        with decoding:
            with self._lock:
                if key in self._kept:
                    self._kept.move_to_end(key)
                    return self._kept[key]
            try:
                found = decode()
            except BaseException:
                with self._lock:
                    self._done(key, decoding)
                raise
            with self._lock:
                self._done(key, decoding)
                # Those who waited for one that failed do not wait for each other.
                if key not in self._kept and found.nbytes <= self._limit:
                    self._kept[key] = found
                    self._bytes += found.nbytes
                while self._bytes > self._limit:
                    self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return found

    def _done(self, key: Hashable, decoding: threading.Lock) -> None:
        if self._decoding.get(key) is decoding:
            del self._decoding[key]


DECODED = DecodedChunks()
"""The chunks of this process."""
