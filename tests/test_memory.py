"""Memory that is freed goes back to the system when that is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
