"""Fixtures that every test module may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Torch and BLAS must not fight over two cores when several tests run workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real and simulated test data beside the checkout; skips where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared test data is not here")
    return folder
