"""Memory of the process: pages of 2 MB for tensors, and what was freed given back or kept for the next."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# glibc's malloc.h, and the thresholds (bytes) that it moves up to by itself.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_OWN = {_TRIM_THRESHOLD: 1 << 26, _MMAP_THRESHOLD: 1 << 25}
_KEPT = {_TRIM_THRESHOLD: (1 << 31) - 1, _MMAP_THRESHOLD: 1 << 30}
# Contexts that last; the thresholds are those of the whole process.
_entered: set[object] = set()
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


def ask_for_huge_pages() -> None:
    """Let torch hold its tensors of 2 MB and more in pages of 2 MB, where Linux has them.

    The largest tensors of a forward pass are mapped anew each time, and each page is a fault: 566,000 of
    4 kB in a batch of four windows, 28,000 with pages of 2 MB, in two thirds of the time and no more memory
    where this was measured. torch reads the variable at the first tensor of a process; one that is set stays
    as it is, so that 0 is the user's way to do without.
    """
    # Where a huge page is of another size, 512 MB on some ARM systems, it would cost more than it saves.
    with suppress(OSError):
        size = int((_HUGE_PAGES / "hpage_pmd_size").read_text())
        if size == 1 << 21 and "[never]" not in (_HUGE_PAGES / "enabled").read_text():
            os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def return_freed_memory() -> None:
    """Give freed blocks back to the system; takes a fraction of a millisecond.

    glibc keeps freed blocks of up to 32 MB in its heap, where the next stage's buffers, larger ones,
    find no room: 110 MB after an ingestion that would come on top of the next stage's own.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep freed blocks of up to 1 GB for the next allocation while the context lasts, where glibc is.

    A training step allocates the same large tensors again and again. glibc maps blocks above 32 MB
    anew, and the system clears every page of them: half a million faults a step where pages are of
    4 kB. Within such a context another one changes nothing.
    """
    token = object()
    _entered.add(token)
    _set(_KEPT)
    try:
        yield
    finally:
        _entered.remove(token)
        if not _entered:
            _set(_OWN)
            return_freed_memory()


def _set(thresholds: dict[int, int]) -> None:
    option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if option is not None:
        for name, size in thresholds.items():
            # An earlier glibc takes no mapping threshold above 32 MB. Refused, it would stay at what it just
            # is, which may be 128 kB: setting either of the two stops its moving up.
            if not option(name, size):
                option(name, _OWN[name])
