"""What is written beside a result and never compared: when, where and with which versions it was made."""

from __future__ import annotations

import os
import platform
import socket
import sys
import time
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Distributions and the modules that they load; torch counts only where it is in use.
ALWAYS = ("tomocpt-stream", "numpy", "zarr")
WHERE_LOADED = ("torch",)


def circumstances() -> dict[str, Any]:
    """Return when (unix seconds), worker (host:pid), machine (the CPU's model) and versions, as plain data.

    Cheap enough to be called for every stored object.
    """
    loaded = [name for name in WHERE_LOADED if name in sys.modules]
    return {
        "when": round(time.time(), 3),
        "worker": f"{socket.gethostname()}:{os.getpid()}",
        "machine": machine(),
        "versions": {name.replace("-", "_"): _version(name) for name in (*ALWAYS, *loaded)},
    }


@lru_cache(maxsize=1)
def machine() -> str:
    """Return the model of this machine's CPU; equal models add floating-point numbers alike."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    fields = (line.partition(":") for line in lines)
    models = (value.strip() for name, _, value in fields if name.strip() == "model name")
    return next(models, "") or platform.processor() or platform.machine()


@lru_cache
def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"
