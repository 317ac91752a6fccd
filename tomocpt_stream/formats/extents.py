"""Sizes and names of tomograms that a coordinate file leaves out: from RELION, Warp or the caller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats.tables import Table, finite_column, name_column, read_tables
from tomocpt_stream.formats.warp import read_settings, tomostar_names

if TYPE_CHECKING:
    import numpy.typing as npt

    from tomocpt_stream.frame import Shape

Source = str | Path
Tomograms = Source | Sequence[Source] | Mapping[str, Any]

_SIZES = ["rlnTomoSizeX", "rlnTomoSizeY", "rlnTomoSizeZ"]
_PIXEL = "rlnTomoTiltSeriesPixelSize"
_BINNING = "rlnTomoTomogramBinning"
_OPTICS = ("rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast")


@dataclass(frozen=True)
class Extent:
    """The size of one tomogram; what is not known is None.

    `angstrom` is the whole size along x, y, z: unbinned pixels times `pixel_size` where a
    tomograms.star or Warp's settings say it, else voxels times voxel size. `pixel_size` is the tilt
    series', unbinned. `optics` holds what RELION knows of the microscope.
    """

    shape: Shape | None = None
    voxel_size: float | None = None
    angstrom: npt.NDArray[np.float64] | None = None
    pixel_size: float | None = None
    optics: tuple[tuple[str, float], ...] = ()


class Listed(dict[str, Extent]):
    """Sizes of tomograms by name, and of those that are not among them.

    `series` says that the names are those of tilt series as the next program has them, so that a
    tomogram without one of them is an error.
    """

    def __init__(
        self,
        extents: Mapping[str, Extent] | None = None,
        every: Extent | None = None,
        *,
        series: bool = False,
    ) -> None:
        super().__init__(extents or {})
        self.every = every or Extent()
        self.series = series


def extent(shape: Shape | None, voxel_size: float | None) -> Extent:
    """Return the size of a tomogram of which shape (z, y, x) and voxel size may be known."""
    if shape is None or voxel_size is None:
        return Extent(shape, voxel_size)
    return Extent(shape, voxel_size, np.array(shape[::-1], dtype=np.float64) * voxel_size)


def tomogram_extents(tomograms: Tomograms) -> Listed:
    """Return the sizes and names of tomograms from a mapping, or from one or several files together.

    Files are a tomograms.star of RELION 4 or 5, the .settings of a Warp project, its .tomostar files or
    a folder of these. Values of a mapping are (shape, voxel_size) or anything with `.shape` and
    `.voxel_size`; for a Tomogram, whose picks lie in the voxels of its file, those of the file.
    """
    if isinstance(tomograms, Mapping):
        return Listed({str(name): _given(str(name), value) for name, value in tomograms.items()})
    sources = [tomograms] if isinstance(tomograms, (str, Path)) else list(tomograms)
    extents: dict[str, Extent] = {}
    every, tomostars = Extent(), []
    for source in map(Path, sources):
        if source.is_dir():
            tomostars += _tomostars_in(source)
        elif not source.is_file():
            raise FormatError(f"no file {source}", expected="sizes of tomograms", remedy="check the path")
        elif source.suffix.lower() == ".tomostar":
            tomostars.append(source)
        elif source.suffix.lower() == ".settings":
            pixel, size = read_settings(source)
            every = Extent(angstrom=np.array(size) * pixel, pixel_size=pixel)
        else:
            extents |= _tomograms_star(source)
    for name in tomostar_names(tomostars):
        extents.setdefault(name, every)
    return Listed(extents, every, series=bool(extents))


def _tomostars_in(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.tomostar"))
    if not found:
        raise FormatError(
            f"no *.tomostar in {folder}",
            expected="the folder of a project's tomostars",
            remedy="check the path",
        )
    return found


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
    tables = read_tables(path, {_PIXEL, _BINNING, *_SIZES, *_OPTICS}, {"rlnTomoName"})
    found = [table for table in tables.values() if {"rlnTomoName", _PIXEL, *_SIZES} <= set(table.columns)]
    if len(found) != 1:
        raise FormatError(
            f"{path} has {len(found)} tables with rlnTomoName, {_PIXEL} and rlnTomoSizeX, Y, Z",
            expected="one: the tomograms.star of a RELION 4 or 5 job",
            remedy="pass the tomograms.star, Warp's .settings, or a mapping of names to (shape, voxel_size)",
        )
    return _rows(found[0])


def _rows(table: Table) -> dict[str, Extent]:
    codes, names = name_column(table, ["rlnTomoName"])
    if len(names) < len(codes):
        raise FormatError(
            f"{table.place} has {len(codes)} rows for {len(names)} tomograms",
            expected="each tomogram once",
            remedy="remove the rows that are there twice",
        )
    pixel = _sizes(table, _PIXEL)
    sizes = np.stack([_sizes(table, size) for size in _SIZES], axis=1)
    unknown = np.full(len(names), np.nan)
    binning = table.numbers.get(_BINNING, unknown)
    optics = {key: finite_column(table, key) for key in _OPTICS if key in table.numbers}
    extents = {}
    for row, name in enumerate(names):
        known = binning[row] > 0
        voxels = np.rint(sizes[row] / binning[row]).astype(int) if known else None
        extents[name] = Extent(
            shape=None if voxels is None else (int(voxels[2]), int(voxels[1]), int(voxels[0])),
            voxel_size=float(pixel[row] * binning[row]) if known else None,
            angstrom=sizes[row] * pixel[row],
            pixel_size=float(pixel[row]),
            optics=tuple((key, float(column[row])) for key, column in optics.items()),
        )
    return extents


def _sizes(table: Table, column: str) -> npt.NDArray[np.float64]:
    values = finite_column(table, column)
    if (values <= 0).any():
        row = int(np.flatnonzero(values <= 0)[0])
        raise FormatError(
            f"row {row + 1} of {table.place} has {column} {values[row]:g}",
            expected="a positive number",
            remedy="correct it",
        )
    return values


def with_voxels(known: Extent, shape: Shape | None, voxel_size: float | None) -> Extent:
    """Return a size whose voxels are known otherwise; what is unbinned stays."""
    shape, voxel_size = shape or known.shape, voxel_size or known.voxel_size
    if known.pixel_size is None:
        return extent(shape, voxel_size)
    return replace(known, shape=shape, voxel_size=voxel_size)
