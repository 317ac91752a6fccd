"""Memory that is freed goes back to the system when that is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tomocpt_stream import memory
from tomocpt_stream.memory import ask_for_huge_pages, freed_memory_kept

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


TENSORS = """
import resource, torch
from tomocpt_stream.network import build_network, named_architecture

network = build_network(named_architecture("small"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
tensor = torch.ones(50_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="a system without huge pages"
)
@pytest.mark.parametrize(("said", "few"), [(None, True), ("0", False)])
def test_tensors_of_a_process_with_a_network_are_in_huge_pages(said: str | None, few: bool) -> None:
    """200 MB are 48,800 pages of 4 kB; the user's own choice stays."""
    if "[always]" in HUGE_PAGES.read_text() and not few:
        pytest.skip("the system gives huge pages to all")
    own = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    own |= {} if said is None else {"THP_MEM_ALLOC_ENABLE": said}
    ran = subprocess.run([sys.executable, "-c", TENSORS], capture_output=True, text=True, check=True, env=own)
    assert (int(ran.stdout) < 5000) == few


@pytest.mark.parametrize(
    ("text", "asked"), [("always [madvise] never", "1"), ("always madvise [never]", None), (None, None)]
)
def test_huge_pages_are_asked_for_where_the_system_has_them(
    text: str | None, asked: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch warns where the kernel knows none."""
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "of the test")  # so that what is set here is taken back
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    monkeypatch.setattr(memory, "_HUGE_PAGES", tmp_path / "enabled")
    if text is not None:
        (tmp_path / "enabled").write_text(text)
    ask_for_huge_pages()
    assert os.environ.get("THP_MEM_ALLOC_ENABLE") == asked
