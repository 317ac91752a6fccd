"""Memory that is freed goes back to the system when that is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tomocpt_stream.memory import freed_memory_kept

FREED = """
from pathlib import Path
from tomocpt_stream.memory import return_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

blocks = [bytes(60_000) for _ in range(2000)]
pin = blocks.pop()  # at the end of the heap, which could shrink by itself without it
filled = resident()
del blocks
freed = resident()
return_freed_memory()
print(filled - freed, freed - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_freed_memory_is_returned() -> None:
    said = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    by_itself, when_asked = map(int, said.stdout.split())
    assert by_itself < 20e6
    assert when_asked > 90e6


KEPT = """
import ctypes, resource
from tomocpt_stream.memory import freed_memory_kept

def faults(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        block = ctypes.create_string_buffer(80_000_000)
        ctypes.memset(block, 1, len(block))
        del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with freed_memory_kept():
    first, more = faults(1), faults(5)
print(first, more, faults(2))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_freed_memory_is_kept_while_asked_for() -> None:
    said = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    first, more, after = map(int, said.stdout.split())
    assert first > 15_000  # 80 MB in pages of 4 kB
    assert more < first / 10  # the same pages again
    assert after > 1.9 * first  # new pages each time


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_what_is_kept_within_another_context_is_kept_until_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark keeps memory, and so does the loop that it calls."""
    taken: list[int] = []

    class _Noting:
        def __init__(self, name: None) -> None:
            pass

        @staticmethod
        def mallopt(name: int, size: int) -> int:
            taken.append(size)
            return 1

        @staticmethod
        def malloc_trim(pad: int) -> int:
            return pad

    monkeypatch.setattr("tomocpt_stream.memory.ctypes.CDLL", _Noting)
    with freed_memory_kept():
        with freed_memory_kept():
            pass
        assert 1 << 30 in taken
        assert 1 << 25 not in taken
    assert taken[-1] == 1 << 25


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_a_threshold_that_is_refused_is_the_highest_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier glibc refuses to map only what is larger than 32 MB."""
    taken: dict[int, int] = {}

    class _Earlier:
        def __init__(self, name: None) -> None:
            pass

        @staticmethod
        def mallopt(name: int, size: int) -> int:
            if name == -3 and size > 1 << 25:
                return 0
            taken[name] = size
            return 1

        @staticmethod
        def malloc_trim(pad: int) -> int:
            return pad

    monkeypatch.setattr("tomocpt_stream.memory.ctypes.CDLL", _Earlier)
    with freed_memory_kept():
        assert taken == {-1: (1 << 31) - 1, -3: 1 << 25}
    assert taken == {-1: 1 << 26, -3: 1 << 25}
