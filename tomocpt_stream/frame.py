"""Where a voxel of one grid lies in another: working grid, tomogram as read, file as given.

Every half voxel of the package is in this module. Voxel index 0 is the centre of the first voxel.
Three grids follow one another:

* the *file*: the axes, the pyramid level 0 and the voxel size of what the user gave;
* the *source*: the array that the engine reads. It is the file, unless a coarser level is read or
  an unturned IMOD volume (`beam_axis="y"`) is read as if it were turned;
* the *working grid*: the source resampled so that the particle has the size the network expects.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Shape = tuple[int, int, int]
Box = tuple[slice, slice, slice]
Points = npt.NDArray[np.float64]
Rule = Literal["bspline", "tomocpt"]

RULES: tuple[Rule, ...] = ("bspline", "tomocpt")


@dataclass(frozen=True)
class Frame:
    """The source array of a tomogram and its place in the file.

    `shape` and `voxel_size` (Å) are those of the source. `file_shape` and `file_voxel_size` are
    those of the file at level 0 in the file's own axes. A source index becomes a level-0 index by
    `index * level_scale + level_shift`, before the axes are turned back.
    """

    shape: Shape
    voxel_size: float
    file_shape: Shape
    file_voxel_size: float
    beam_axis: Literal["z", "y"] = "z"
    level_scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    level_shift: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def to_file(self, source: npt.ArrayLike) -> Points:
        """Return (n, 3) zyx file voxels (level 0, file axes) of (n, 3) zyx source voxels."""
        points = np.asarray(source, dtype=np.float64).reshape(-1, 3)
        points = points * np.array(self.level_scale) + np.array(self.level_shift)
        return turn_back(points, self.file_shape) if self.beam_axis == "y" else points

    def to_source(self, file: npt.ArrayLike) -> Points:
        """Return (n, 3) zyx source voxels of (n, 3) zyx file voxels (level 0, file axes)."""
        points = np.asarray(file, dtype=np.float64).reshape(-1, 3)
        if self.beam_axis == "y":
            points = turn(points, self.file_shape)
        source: Points = (points - np.array(self.level_shift)) / np.array(self.level_scale)
        return source

    def to_json(self) -> dict[str, Any]:
        """Return the frame as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Frame:
        """Rebuild a frame from `to_json`."""
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        return cls(**fields)


def turn(points: Points, file_shape: Shape) -> Points:
    """Return file voxels (z, y, x) of a volume whose beam runs along y as they lie after turning.

    The turn is a proper rotation about x (handedness is kept): new z = y, new y = n_z - 1 - z.
    """
    return np.stack([points[:, 1], file_shape[0] - 1 - points[:, 0], points[:, 2]], axis=1)


def turn_back(points: Points, file_shape: Shape) -> Points:
    """Return the file voxels of turned ones; the inverse of `turn`."""
    return np.stack([file_shape[0] - 1 - points[:, 1], points[:, 0], points[:, 2]], axis=1)


@dataclass(frozen=True)
class Grid:
    """The working grid over a source: `scale` source voxels a working voxel, per axis (zyx).

    Working voxel i lies at source index (i + 0.5) * scale - 0.5: the faces of both grids coincide.
    `voxel_size` is the working voxel size in Å.
    """

    shape: Shape
    voxel_size: float
    scale: tuple[float, float, float]

    @property
    def is_identity(self) -> bool:
        """Whether working voxels are the source's own."""
        return self.scale == (1.0, 1.0, 1.0)

    def to_source(self, working: npt.ArrayLike) -> Points:
        """Return (n, 3) zyx source voxels of (n, 3) zyx working voxels."""
        points = np.asarray(working, dtype=np.float64).reshape(-1, 3)
        return points if self.is_identity else (points + 0.5) * np.asarray(self.scale) - 0.5

    def to_working(self, source: npt.ArrayLike) -> Points:
        """Return (n, 3) zyx working voxels of (n, 3) zyx source voxels."""
        points = np.asarray(source, dtype=np.float64).reshape(-1, 3)
        return points if self.is_identity else (points + 0.5) / np.asarray(self.scale) - 0.5

    def to_json(self) -> dict[str, Any]:
        """Return the grid as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Grid:
        """Rebuild a grid from `to_json`."""
        return cls(tuple(data["shape"]), float(data["voxel_size"]), tuple(data["scale"]))


def working_grid(
    source_shape: Shape, source_voxel_size: float, voxel_size: float, rule: Rule = "bspline"
) -> Grid:
    """Return the working grid of a source at `voxel_size` Å.

    "bspline": shape = ceil(shape * v / t - 1e-6), scale t / v on every axis; t = v is the identity.
    "tomocpt": that program's rule: shape = floor(shape * v / t), scale = shape / new shape per
    axis, and the identity where |t / v - 1| < 0.05.
    """
    ratio = voxel_size / source_voxel_size
    if ratio == 1.0 or (rule == "tomocpt" and abs(ratio - 1.0) < 0.05):
        return Grid(source_shape, source_voxel_size, (1.0, 1.0, 1.0))
    if rule == "tomocpt":
        shape = tuple(max(1, math.floor(n / ratio)) for n in source_shape)
        scale = tuple(n / m for n, m in zip(source_shape, shape, strict=True))
        return Grid((shape[0], shape[1], shape[2]), voxel_size, (scale[0], scale[1], scale[2]))
    shape = tuple(max(1, math.ceil(n / ratio - 1e-6)) for n in source_shape)
    return Grid((shape[0], shape[1], shape[2]), voxel_size, (ratio, ratio, ratio))
