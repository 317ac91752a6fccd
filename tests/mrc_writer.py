"""A small writer of MRC files for tests, which can also write what the format forbids."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pathlib import Path

MODES = {"i1": 0, "u1": 0, "i2": 1, "f4": 2, "u2": 6, "f2": 12}


def mrc_header(shape: tuple[int, int, int], mode: int, order: str = "<", **words: Any) -> bytes:
    """The 1024 bytes of a header; `words` are raw fields by name, `voxel` the voxel size."""
    raw = bytearray(1024)
    sections, rows, columns = shape
    voxel = words.get("voxel", 10.0)
    sampling = words.get("sampling", (columns, rows, sections))
    cell = words.get("cell", tuple(n * voxel for n in sampling))
    struct.pack_into(f"{order}4i", raw, 0, columns, rows, sections, mode)
    struct.pack_into(f"{order}3i", raw, 28, *sampling)
    struct.pack_into(f"{order}3f", raw, 40, *cell)
    struct.pack_into(f"{order}3i", raw, 64, *words.get("axes", (1, 2, 3)))
    struct.pack_into(f"{order}3f", raw, 76, *words.get("stated", (0.0, 0.0, 0.0)))
    struct.pack_into(f"{order}2i", raw, 88, words.get("space_group", 1), words.get("extended", 0))
    raw[104:108] = words.get("extended_type", b"\x00" * 4)
    struct.pack_into(f"{order}2i", raw, 152, *words.get("imod", (0, 0)))
    raw[208:212] = words.get("map_id", b"MAP ")
    raw[212:216] = words.get("stamp", b"DD\x00\x00" if order == "<" else b"\x11\x11\x00\x00")
    label = words.get("label", b"")
    struct.pack_into(f"{order}i", raw, 220, 1 if label else 0)
    raw[224 : 224 + len(label)] = label
    return bytes(raw)


def write_mrc(path: Path, voxels: npt.NDArray[Any], order: str = "<", **words: Any) -> Path:
    """Write an array (sections, rows, columns) with the header that `words` ask for."""
    kind = voxels.dtype.str[1:]
    low, high, mean = float(voxels.min()), float(voxels.max()), float(voxels.astype(np.float64).mean())
    words.setdefault("stated", (low, high, mean))
    header = mrc_header(voxels.shape, MODES[kind], order, **words)
    data = voxels.astype(np.dtype(order + kind)).tobytes()
    path.write_bytes(header + b"\xaa" * words.get("extended", 0) + data)
    return path
