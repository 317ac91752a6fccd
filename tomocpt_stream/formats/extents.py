"""Sizes of tomograms that a coordinate file leaves out: from tomograms.star, or as the caller has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats.tables import Table, finite_column, name_column, read_tables

if TYPE_CHECKING:
    import numpy.typing as npt

    from tomocpt_stream.frame import Shape

Tomograms = str | Path | Mapping[str, Any]

_SIZES = ["rlnTomoSizeX", "rlnTomoSizeY", "rlnTomoSizeZ"]
_PIXEL = "rlnTomoTiltSeriesPixelSize"
_BINNING = "rlnTomoTomogramBinning"
_OPTICS = ("rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast")


@dataclass(frozen=True)
class Extent:
    """The size of one tomogram; what is not known is None.

    `angstrom` is the whole size along x, y, z: unbinned pixels times `pixel_size` where a
    tomograms.star says it, else voxels times voxel size. `pixel_size` is the tilt series', unbinned.
    `optics` holds what RELION knows of the microscope.
    """

    shape: Shape | None = None
    voxel_size: float | None = None
    angstrom: npt.NDArray[np.float64] | None = None
    pixel_size: float | None = None
    optics: tuple[tuple[str, float], ...] = ()


def extent(shape: Shape | None, voxel_size: float | None) -> Extent:
    """Return the size of a tomogram of which shape (z, y, x) and voxel size may be known."""
    if shape is None or voxel_size is None:
        return Extent(shape, voxel_size)
    return Extent(shape, voxel_size, np.array(shape[::-1], dtype=np.float64) * voxel_size)


def tomogram_extents(tomograms: Tomograms) -> dict[str, Extent]:
    """Return the sizes of tomograms by name, from a tomograms.star or a mapping.

    Values of a mapping are (shape, voxel_size) or anything with `.shape` and `.voxel_size`; for a
    Tomogram, whose picks lie in the voxels of its file, those of the file.
    """
    if isinstance(tomograms, Mapping):
        return {str(name): _given(str(name), value) for name, value in tomograms.items()}
    return _tomograms_star(Path(tomograms))


def _given(name: str, value: Any) -> Extent:
    frame = getattr(value, "frame", None)
    if frame is not None:
        return extent(frame.file_shape, frame.file_voxel_size)
    if hasattr(value, "shape") and hasattr(value, "voxel_size"):
        return extent(value.shape, value.voxel_size)
    try:
        (z, y, x), voxel_size = value
        return extent((int(z), int(y), int(x)), float(voxel_size))
    except (TypeError, ValueError) as error:
        raise FormatError(
            f"{value!r} for tomogram {name}",
            expected="((z, y, x), voxel size in Å), or something with .shape and .voxel_size",
            remedy="give one of these for each tomogram",
        ) from error


def _tomograms_star(path: Path) -> dict[str, Extent]:
    tables = read_tables(path)
    found = [table for table in tables.values() if {"rlnTomoName", _PIXEL, *_SIZES} <= set(table.frame)]
    if len(found) != 1:
        raise FormatError(
            f"{path} has {len(found)} tables with rlnTomoName, {_PIXEL} and rlnTomoSizeX, Y, Z",
            expected="one: the tomograms.star of a RELION 5 job",
            remedy="pass the tomograms.star, or a mapping of names to (shape, voxel_size)",
        )
    return _rows(found[0])


def _rows(table: Table) -> dict[str, Extent]:
    names = name_column(table, ["rlnTomoName"])
    pixel = finite_column(table, _PIXEL)
    sizes = np.stack([finite_column(table, size) for size in _SIZES], axis=1)
    binning = finite_column(table, _BINNING) if _BINNING in table.frame else np.full(len(names), np.nan)
    optics = {key: finite_column(table, key) for key in _OPTICS if key in table.frame}
    extents = {}
    for row, name in enumerate(names):
        known = np.isfinite(binning[row]) and binning[row] > 0
        voxels = np.rint(sizes[row] / binning[row]).astype(int) if known else None
        extents[name] = Extent(
            shape=None if voxels is None else (int(voxels[2]), int(voxels[1]), int(voxels[0])),
            voxel_size=float(pixel[row] * binning[row]) if known else None,
            angstrom=sizes[row] * pixel[row],
            pixel_size=float(pixel[row]),
            optics=tuple((key, float(column[row])) for key, column in optics.items()),
        )
    return extents
