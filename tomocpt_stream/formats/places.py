"""Where the coordinates of a file lie in a tomogram: units, centres and binning of each dialect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats.asked import Asked, lacking

if TYPE_CHECKING:
    from tomocpt_stream.formats.extents import Extent
    from tomocpt_stream.formats.relion import Dialect, Floats

_SMALLEST, _LARGEST = 1e-3, 1e6
_SAME = 0.01  # sizes that differ by less are one size that was rounded


@dataclass(frozen=True)
class Place:
    """Coordinate c lies at (c·unit + zero) / voxel; sizes in Å, `zero` is x, y, z.

    Where nobody said a voxel size, unit and voxel are 1 and `said` is None.
    """

    unit: float
    voxel: float
    zero: Floats
    said: float | None

    def voxels(self, coordinates: Floats) -> Floats:
        """Return (n, 3) x, y, z in voxels of the tomogram."""
        if self.unit == self.voxel and not self.zero.any():
            return coordinates
        return (coordinates * self.unit + self.zero) / self.voxel

    def coordinates(self, voxels: Floats) -> Floats:
        """Return (n, 3) x, y, z as the file has them."""
        if self.unit == self.voxel and not self.zero.any():
            return voxels
        return (voxels * self.voxel - self.zero) / self.unit


@dataclass(frozen=True)
class Places:
    """Finds the place of each tomogram of a file; `where` is what an error calls the file."""

    dialect: Dialect
    asked: Asked
    where: str

    def of(self, name: str, size: Extent, said: float | None) -> Place:
        """Return how the file's coordinates lie in the tomogram `name`; it `said` its pixel size, Å.

        Raises FormatError where that depends on a size that nobody said.
        """
        voxels = self.dialect.frame in ("tomogram", "export")
        place = self._in_voxels(name, size, said) if voxels else self._in_series(name, size, said)
        for found in (place.unit, place.voxel):
            if not _SMALLEST <= found <= _LARGEST:
                raise FormatError(
                    f"pixels or voxels of {found:g} Å for tomogram {name} of {self.where}",
                    expected=f"a size between {_SMALLEST:g} and {_LARGEST:g} Å",
                    remedy="correct the size",
                )
        return place

    def _in_series(self, name: str, size: Extent, said: float | None) -> Place:
        frame = self.dialect.frame
        if size.voxel_size is None:
            raise lacking(name, self.where, "voxel size", "voxel_size= (--voxel-size) in Å")
        pixel = self.asked.pixel_size or size.pixel_size or said
        if pixel is None and (frame == "series" or self.dialect.nearer or self.asked.mean_binned):
            raise lacking(name, self.where, "unbinned pixel size", "pixel_size= (--pixel-size) in Å")
        zero = np.zeros(3)
        if frame == "centred":
            if size.angstrom is None:
                raise lacking(name, self.where, "size", "shape= (--shape), z, y, x")
            zero = size.angstrom / 2 - self.dialect.nearer * (pixel or 0.0)
        unit = pixel if frame == "series" and pixel is not None else 1.0
        return Place(unit, size.voxel_size, zero - self._mean(size.voxel_size, pixel), size.voxel_size)

    def _in_voxels(self, name: str, size: Extent, said: float | None) -> Place:
        voxel, unit = size.voxel_size or self.asked.pixel_size, self.asked.pixel_size
        if voxel is None:
            return Place(1.0, 1.0, np.zeros(3), None)
        if unit is None and said is not None and abs(said - voxel) > _SAME * voxel:
            raise FormatError(
                f"{self.where} says pixels of {said:g} Å of tomogram {name}, which has voxels of {voxel:g} Å",
                expected="coordinates in voxels of the tomogram, or a word on what they count",
                remedy=f"pass pixel_size={said:g} if they count those pixels, pixel_size={voxel:g} if voxels "
                "(--pixel-size)",
            )
        unit = voxel if unit is None else unit
        pixel = size.pixel_size or self.asked.pixel_size if self.dialect.frame == "export" else unit
        if self.asked.mean_binned and pixel is None:
            raise lacking(name, self.where, "unbinned pixel size", "pixel_size= (--pixel-size) in Å")
        return Place(unit, voxel, np.zeros(3) - self._mean(voxel, pixel), voxel)

    def _mean(self, voxel: float, pixel: float | None) -> float:
        """Return how many Å the first voxel of a mean-binned tomogram lies from its first pixel."""
        return 0.0 if pixel is None or not self.asked.mean_binned else (voxel - pixel) / 2
