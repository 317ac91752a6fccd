"""What is written beside a result."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import zarr

from tomocpt_stream import circumstances as module
from tomocpt_stream.circumstances import circumstances, machine

if TYPE_CHECKING:
    import pytest


def test_says_when_where_and_with_what() -> None:
    before = time.time()
    found = json.loads(json.dumps(circumstances()))
    assert before - 1 <= found["when"] <= time.time() + 1
    assert found["worker"] == f"{platform.node()}:{os.getpid()}"
    assert found["machine"] == machine() != ""
    versions = found["versions"]
    assert (versions["numpy"], versions["zarr"]) == (np.__version__, zarr.__version__)
    assert versions["tomocpt_stream"][0].isdigit()


def test_time_goes_on_and_the_rest_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    first = circumstances()
    monkeypatch.setattr(time, "time", lambda: 12.3456)
    assert circumstances() == {**first, "when": 12.346}


def test_torch_counts_where_it_is_loaded() -> None:
    code = """
import sys, types
from tomocpt_stream.circumstances import circumstances
assert "torch" not in circumstances()["versions"]
assert not {"torch", "zarr", "dask"} & set(sys.modules)
sys.modules["torch"] = types.ModuleType("torch")
from importlib.metadata import version
assert circumstances()["versions"]["torch"] == version("torch")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_machine_without_a_model_name_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, **_: "processor\t: 0\nmodel name\t:  One CPU \n")
    machine.cache_clear()
    assert machine() == "One CPU"
    monkeypatch.setattr(Path, "read_text", lambda self, **_: "processor\t: 0\n")
    monkeypatch.setattr(platform, "processor", lambda: "")
    machine.cache_clear()
    assert machine() == platform.machine()

    def unreadable(self: Path, **_: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", unreadable)
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    machine.cache_clear()
    assert machine() == "arm"
    machine.cache_clear()


def test_a_package_that_was_not_installed_has_no_version() -> None:
    assert module._version("no-such-distribution") == "unknown"
