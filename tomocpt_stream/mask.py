"""Where picks are allowed: a mask of any voxel size over the same specimen, read as it is needed."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from tomocpt_stream.errors import SourceError
from tomocpt_stream.tomogram import Tomogram, open_tomogram

if TYPE_CHECKING:
    import numpy.typing as npt

    from tomocpt_stream.blocks import Span
    from tomocpt_stream.frame import Box, Frame, Grid

MaskLike: TypeAlias = str | Path | Tomogram | Any

# How far the mask's extent (Å) may differ from the tomogram's.
_EXTENT = 0.01


class Mask:
    """A mask over a tomogram, asked in voxels of the working grid; voxels other than 0 are inside.

    A working voxel is inside where the mask voxel nearest (by Å) to its nearest source voxel is.
    """

    def __init__(self, tomogram: Tomogram, frame: Frame, grid: Grid, voxel_size: float) -> None:
        self._tomogram = tomogram
        self._index = [_nearest(axis, grid, frame, tomogram.shape[axis], voxel_size) for axis in range(3)]
        self._origin: tuple[int, int, int] = (0, 0, 0)
        self._held = np.zeros((0, 0, 0), dtype=bool)
        self.fingerprint: dict[str, Any] = {**tomogram.fingerprint, "voxel_size": voxel_size}

    def hold(self, spans: tuple[Span, Span, Span]) -> None:
        """Read the mask over a box of working voxels and keep it until the next call."""
        z, y, x = self._covering(spans)
        self._origin = (z.start, y.start, x.start)
        self._held = self._read((z, y, x))

    def holds_any(self, spans: tuple[Span, Span, Span]) -> bool:
        """Return whether the mask has a voxel in a box of working voxels inside the box held."""
        z, y, x = (
            slice(part.start - low, part.stop - low)
            for part, low in zip(self._covering(spans), self._origin, strict=True)
        )
        return bool(self._held[z, y, x].any())

    def inside(self, spans: tuple[Span, Span, Span]) -> npt.NDArray[np.bool_]:
        """Return which voxels of a box of the working grid are inside the mask."""
        box = self._covering(spans)
        z, y, x = (
            axis[start:stop] - part.start
            for axis, (start, stop), part in zip(self._index, spans, box, strict=True)
        )
        marks: npt.NDArray[np.bool_] = self._read(box)[np.ix_(z, y, x)]
        return marks

    def _covering(self, spans: tuple[Span, Span, Span]) -> Box:
        """Return the mask voxels between those of the first and the last working voxel of a box."""
        z, y, x = (
            slice(int(axis[start]), int(axis[stop - 1]) + 1)
            for axis, (start, stop) in zip(self._index, spans, strict=True)
        )
        return (z, y, x)

    def _read(self, box: Box) -> npt.NDArray[np.bool_]:
        voxels = self._tomogram.read(box)
        if np.isnan(voxels).any():
            raise SourceError(
                f"the mask {self._tomogram.name} has voxels that are not a number",
                expected="0 outside and another number inside",
                remedy="write the mask again",
            )
        marks: npt.NDArray[np.bool_] = voxels != 0
        return marks


def open_mask(mask: MaskLike, frame: Frame, grid: Grid) -> Mask:
    """Open a mask (path, zarr array, numpy array or Tomogram, in the file's axes) over a tomogram.

    A mask of the file's own shape lies on its voxels whatever its header says. Another shape must
    span the same extent within 1 % on every axis; its voxel size then follows from the extents, or
    from its header where that agrees.

    Raises
    ------
    SourceError
        Where the mask's extent differs from the tomogram's.
    """
    tomogram = _as_tomogram(mask, frame)
    # The mask is read in the axes of the source; extents are those of the file at level 0.
    extent = [n * s * frame.file_voxel_size for n, s in zip(frame.shape, frame.level_scale, strict=True)]
    same = tuple(tomogram.frame.file_shape) == tuple(frame.file_shape)
    voxel_size = frame.file_voxel_size if same else tomogram.voxel_size
    spans = [n * voxel_size for n in tomogram.shape]
    if any(abs(span / whole - 1) > _EXTENT for span, whole in zip(spans, extent, strict=True)):
        raise SourceError(
            f"the mask {tomogram.name} of {tomogram.shape} voxels spans "
            f"{' x '.join(f'{span:.0f}' for span in spans)} Å",
            expected=f"the tomogram's {' x '.join(f'{whole:.0f}' for whole in extent)} Å (zyx) within 1 %",
            remedy="give a mask of this tomogram, or correct the voxel size in its header",
        )
    return Mask(tomogram, frame, grid, voxel_size)


def _as_tomogram(mask: MaskLike, frame: Frame) -> Tomogram:
    if isinstance(mask, Tomogram):
        return mask
    if isinstance(mask, str | Path):
        return _open_file(mask, frame)
    # An array says no voxel size: the one with which it spans the tomogram along its longest axis.
    axis = int(np.argmax(frame.file_shape))
    shape = tuple(mask.shape)
    if len(shape) != 3:
        raise SourceError(f"a mask of shape {shape}", expected="three axes (zyx)", remedy="give a volume")
    voxel_size = frame.file_voxel_size * frame.file_shape[axis] / shape[axis]
    tomogram = open_tomogram(mask, voxel_size=voxel_size, name="mask", beam_axis=frame.beam_axis)
    if isinstance(mask, np.ndarray):
        tomogram.fingerprint["sha256"] = hashlib.sha256(np.packbits(mask != 0).tobytes()).hexdigest()
    return tomogram


def _open_file(path: str | Path, frame: Frame) -> Tomogram:
    """Open a mask file; one whose header has no voxel size must have the tomogram's own shape."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a mask's header often says 1 Å; its extent is checked instead
        try:
            return open_tomogram(path, beam_axis=frame.beam_axis)
        except SourceError:
            return open_tomogram(path, beam_axis=frame.beam_axis, voxel_size=frame.file_voxel_size)


def _nearest(axis: int, grid: Grid, frame: Frame, length: int, voxel_size: float) -> npt.NDArray[np.intp]:
    """Return the mask voxel of every working voxel of an axis."""
    working = np.zeros((grid.shape[axis], 3))
    working[:, axis] = np.arange(grid.shape[axis])
    source = np.floor(grid.to_source(working)[:, axis] + 0.5).clip(0, frame.shape[axis] - 1)
    angstrom = (source * frame.level_scale[axis] + frame.level_shift[axis]) * frame.file_voxel_size
    nearest: npt.NDArray[np.intp] = np.floor(angstrom / voxel_size + 0.5).clip(0, length - 1).astype(np.intp)
    return nearest
