"""Picks to write, and what is asked of every format."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats import FORMATS, read_kinds
from tomocpt_stream.picks import Picks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SHAPE = (184, 630, 631)
VOXEL_SIZE = 10.012
BOTH = [name for name, kind in FORMATS.items() if kind.reads and kind.writes]
OPTIONS: dict[str, Any] = {"voxel_size": VOXEL_SIZE, "shape": SHAPE}
# What some formats want to know beside, of picks to write and of a file to read.
ASKED: dict[str, dict[str, Any]] = {"relion4": {"pixel_size": 1.35}, "relion5-picker": {"pixel_size": 1.35}}


def some_picks(n: int = 20, seed: int = 0, *, turned: bool = False, **changes: Any) -> Picks:
    """Picks inside of a tomogram."""
    rng = np.random.default_rng(seed)
    picks = Picks(
        zyx=rng.uniform(0, np.array(SHAPE) - 1, (n, 3)),
        score=rng.random(n).astype(np.float32),
        rotations=Rotation.random(n, rng=rng).as_matrix() if turned and n else None,
        voxel_size=VOXEL_SIZE,
        tomogram="TS_01",
        shape=SHAPE,
        particle="ribosome",
    )
    return replace(picks, **changes)


def file_of(folder: Path, format: str) -> Path:  # noqa: A002
    """A path for one tomogram with a suffix that the format has."""
    others = {"deepetpicker": ".coords", "imod_slicer": ".mod"}
    suffix = next(iter(FORMATS[format].suffixes), others.get(format, ".csv"))
    return folder / format / f"TS_01{suffix}"


def refused(path: Path, data: bytes | str, format: str | None = None, **options: Any) -> str:  # noqa: A002
    """Write bytes to a file; return why it is not read."""
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    with pytest.raises(FormatError) as error:
        read_kinds(path, format=format, **options)
    assert error.value.remedy
    return str(error.value)


def survives(read: Callable[[], object]) -> None:
    """Read something hostile: it is read, or refused as a format error, and nothing else."""
    try:
        read()
    except FormatError as error:
        assert error.expected  # noqa: PT017
        assert error.remedy  # noqa: PT017
