"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes
import sys


def return_freed_memory() -> None:
    """Give freed blocks back to the system; takes a fraction of a millisecond.

    glibc keeps freed blocks of up to 32 MB in its heap, where the next stage's buffers, larger ones,
    find no room: 110 MB after an ingestion that would come on top of the next stage's own.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
