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
import torch
from tomocpt_stream import load_picker

load_picker("base")
tensor = torch.ones(50_000_000)
inside, flags = tensor.data_ptr() + (4 << 20), []
for line in open("/proc/self/smaps"):
    first, *rest = line.split()
    if "-" in first and not first.endswith(":"):
        low, high = (int(end, 16) for end in first.split("-"))
    elif first == "VmFlags:" and low <= inside < high:
        flags = rest
print("hg" in flags)
"""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


def _has_huge_pages() -> bool:
    try:
        size, enabled = (HUGE_PAGES / "hpage_pmd_size").read_text(), (HUGE_PAGES / "enabled").read_text()
        flags = "VmFlags" in Path("/proc/self/smaps").read_text()
    except OSError:
        return False
    return int(size) == 1 << 21 and "[never]" not in enabled and flags


@pytest.mark.skipif(not _has_huge_pages(), reason="a system without huge pages, or one that does not tell")
@pytest.mark.parametrize(("said", "advised"), [(None, "True"), ("0", "False")])
def test_tensors_of_a_process_with_a_picker_are_to_be_in_huge_pages(said: str | None, advised: str) -> None:
    """The advice counts, not what the system grants; and the user's own choice stays."""
    own = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    own |= {} if said is None else {"THP_MEM_ALLOC_ENABLE": said}
    ran = subprocess.run([sys.executable, "-c", TENSORS], capture_output=True, text=True, check=True, env=own)
    assert ran.stdout.strip() == advised


@pytest.mark.parametrize(
    ("enabled", "size", "asked"),
    [
        ("always [madvise] never", 2 << 20, "1"),
        ("[always] madvise never", 2 << 20, "1"),
        ("always madvise [never]", 2 << 20, None),
        ("always [madvise] never", 512 << 20, None),
        (None, 2 << 20, None),
    ],
)
def test_huge_pages_are_asked_for_where_the_system_has_them(
    enabled: str | None, size: int, asked: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "of the test")  # so that what is set here is taken back
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    monkeypatch.setattr(memory, "_HUGE_PAGES", tmp_path)
    (tmp_path / "hpage_pmd_size").write_text(f"{size}\n")
    if enabled is not None:
        (tmp_path / "enabled").write_text(enabled)
    ask_for_huge_pages()
    assert os.environ.get("THP_MEM_ALLOC_ENABLE") == asked
