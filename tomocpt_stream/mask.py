"""Where picks are allowed: a mask of any voxel size over the same specimen, read as it is needed."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import zarr
from zarr.errors import ContainsArrayError

from tomocpt_stream.errors import SourceError
from tomocpt_stream.frame import Frame, working_grid
from tomocpt_stream.omezarr import as_voxels
from tomocpt_stream.tiles import CHUNK, cut, whole
from tomocpt_stream.tomogram import Tomogram, open_tomogram
from tomocpt_stream.zarrays import address_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt
    from zarr.abc.store import Store

    from tomocpt_stream.blocks import Span
    from tomocpt_stream.frame import Box, Grid, Shape
    from tomocpt_stream.picks import Picks

MaskLike: TypeAlias = str | Path | Tomogram | Any

# Mask voxels read at a time: 16 MB as float32.
_PIECE = 4_000_000
# How far the mask's extent (Å) may differ from the tomogram's.
_EXTENT = 0.01


class Mask:
    """A mask over a tomogram, asked in voxels of the working grid; voxels other than 0 are inside.

    A pick may lie in a working voxel where the mask voxel nearest (by Å) to its nearest source voxel
    is inside. A window is scored where any mask voxel that it spans is: a thin mask between working
    voxels loses no window. The mask is read in pieces, whatever its own voxel size.
    """

    def __init__(
        self,
        tomogram: Tomogram,
        frame: Frame,
        grid: Grid,
        voxel_size: float,
        fingerprint: dict[str, Any] | None = None,
    ) -> None:
        self.tomogram = tomogram
        self._made_of = (frame, grid, voxel_size)
        self._index = [_nearest(axis, grid, frame, tomogram, voxel_size) for axis in range(3)]
        # A copy, and a mask on a worker, keep the first one's: the voxels are not looked through again.
        self.fingerprint = fingerprint or {**tomogram.fingerprint, "voxel_size": voxel_size}

    def __reduce__(self) -> tuple[object, ...]:
        return (Mask, (self.tomogram, *self._made_of, self.fingerprint))

    def stored(self, store: Store, path: str) -> Mask:
        """Return the same mask, its voxels copied to a zarr array that other processes can read.

        An array that is there is of an earlier run with this mask, or of one that reads it just now:
        its chunks are put again, and none is taken away.
        """
        source = self.tomogram.voxels
        with suppress(ContainsArrayError):
            zarr.create_array(
                store, name=path, shape=source.shape, chunks=(CHUNK, CHUNK, CHUNK), dtype="bool"
            )
        array = zarr.open_array(store, path=path, mode="r+").with_config({"write_empty_chunks": True})
        for box in cut(whole(source.shape), (CHUNK, 8 * CHUNK, 8 * CHUNK)):
            array[box] = source.read(box) != 0
        copy = Tomogram(
            as_voxels(array, "error", address_of(array)),
            self.tomogram.frame,
            name=self.tomogram.name,
            source=address_of(array),
        )
        return Mask(copy, *self._made_of, self.fingerprint)

    def spanned(self, spans: tuple[Span, Span, Span]) -> npt.NDArray[np.bool_]:
        """Return which working voxels of a box span a mask voxel that is inside."""
        return self._marks(spans, spanned=True)

    def inside(self, spans: tuple[Span, Span, Span]) -> npt.NDArray[np.bool_]:
        """Return in which voxels of a box of the working grid a pick may lie."""
        return self._marks(spans, spanned=False)

    def _marks(self, spans: tuple[Span, Span, Span], *, spanned: bool) -> npt.NDArray[np.bool_]:
        """Return one mark a working voxel: its own mask voxel, or any up to the next working voxel's."""
        marks = np.zeros(tuple(stop - start for start, stop in spans), dtype=bool)
        z, y, x = (axis[start:stop] for axis, (start, stop) in zip(self._index, spans, strict=True))
        ends = [self._end(axis, stop, spanned=spanned) for axis, (_, stop) in enumerate(spans)]
        section = (slice(int(y[0]), ends[1]), slice(int(x[0]), ends[2]))
        deepest = max(1, _PIECE // ((ends[1] - int(y[0])) * (ends[2] - int(x[0]))))
        first = 0
        while first < len(z):
            last = first + 1
            while last < len(z) and self._plane_end(z, last, ends[0]) - int(z[first]) <= deepest:
                last += 1
            voxels = self._read((slice(int(z[first]), self._plane_end(z, last - 1, ends[0])), *section))
            rows = z[first:last] - z[first], y - y[0], x - x[0]
            if spanned:
                for axis in (2, 1, 0):
                    voxels = np.logical_or.reduceat(voxels, rows[axis], axis=axis)
                marks[first:last] = voxels
            else:
                marks[first:last] = voxels[np.ix_(*rows)]
            first = last
        return marks

    def _end(self, axis: int, stop: int, *, spanned: bool) -> int:
        """Return where the mask voxels of the working voxels before `stop` end."""
        index = self._index[axis]
        if not spanned:
            return int(index[stop - 1]) + 1
        following = int(index[stop]) if stop < len(index) else self.tomogram.shape[axis]
        return max(following, int(index[stop - 1]) + 1)

    @staticmethod
    def _plane_end(z: npt.NDArray[np.intp], k: int, end: int) -> int:
        return end if k + 1 >= len(z) else max(int(z[k + 1]), int(z[k]) + 1)

    def _read(self, box: Box) -> npt.NDArray[np.bool_]:
        voxels = self.tomogram.read(box)
        if np.isnan(voxels).any():
            raise SourceError(
                f"the mask {self.tomogram.name} has voxels that are not a number",
                expected="0 outside and another number inside",
                remedy="write the mask again",
            )
        marks: npt.NDArray[np.bool_] = voxels != 0
        return marks


def open_mask(
    mask: MaskLike, frame: Frame, grid: Grid, storage_options: Mapping[str, Any] | None = None
) -> Mask:
    """Open a mask (path, address, zarr or numpy array or Tomogram, in the file's axes) over a tomogram.

    `storage_options`, for an address, are those of `open_tomogram`.

    A mask of the file's own shape lies on its voxels whatever its header says. Another shape must
    span the same extent within 1 % on every axis, by its header's voxel size or, for an array, by the
    one that follows from its longest axis. Chunks that a zarr mask does not hold have its fill value:
    zarr stores no chunk of zeros unless told to.

    Raises
    ------
    SourceError
        The mask's extent or axes differ from the tomogram's, or it is no volume.
    """
    tomogram = _as_tomogram(mask, frame, storage_options)
    own = tomogram.frame
    if own.beam_axis != frame.beam_axis:
        raise SourceError(
            f"the mask {tomogram.name} is read with beam_axis={own.beam_axis!r}",
            expected=f"beam_axis={frame.beam_axis!r}, as the tomogram",
            remedy="open it as the tomogram was opened, or give its path",
        )
    if own.file_shape == frame.file_shape:
        return Mask(tomogram, frame, grid, frame.file_voxel_size)
    spans = [n * own.file_voxel_size for n in own.file_shape]
    whole = [n * frame.file_voxel_size for n in frame.file_shape]
    if any(abs(a / b - 1) > _EXTENT for a, b in zip(spans, whole, strict=True)):
        raise SourceError(
            f"the mask {tomogram.name} of {own.file_shape} voxels spans "
            f"{' x '.join(f'{span:.0f}' for span in spans)} Å",
            expected=f"the tomogram's {' x '.join(f'{span:.0f}' for span in whole)} Å (zyx) within 1 %",
            remedy="give a mask of this tomogram, or correct the voxel size in its header",
        )
    return Mask(tomogram, frame, grid, own.file_voxel_size)


def inside(picks: Picks, mask: MaskLike) -> npt.NDArray[np.bool_]:
    """Return which picks lie in a mask, each by the voxel of its tomogram nearest to it.

    Picks that do not say the shape of their tomogram are taken to have the mask's extent; picks
    outside the tomogram are outside the mask.

    Raises SourceError where the picks have no voxel size or the mask does not fit their tomogram.
    """
    voxel_size = picks.voxel_size
    if not len(picks):
        return np.zeros(0, dtype=bool)
    if voxel_size is None:
        raise SourceError(
            f"picks of {picks.tomogram or 'a tomogram'} without a voxel size, and a mask",
            expected="the voxel size of their tomogram in Å",
            remedy="pass voxel_size= where they are read",
        )
    shape = picks.shape or _shape_under(mask, voxel_size)
    frame = Frame(shape, voxel_size, shape, voxel_size)
    opened = open_mask(mask, frame, working_grid(shape, voxel_size, voxel_size))
    nearest = np.floor(picks.zyx + 0.5)
    found = np.asarray(((nearest >= 0) & (nearest < shape)).all(axis=1))
    if picks.shape is None and 2 * found.sum() < len(found):
        raise SourceError(
            f"{len(found) - found.sum()} of {len(found)} picks lie beyond the mask, which spans "
            f"{' x '.join(str(n) for n in shape)} (zyx) of their voxels of {voxel_size:g} Å",
            expected="a mask of their tomogram, with its voxel size in its header",
            remedy="correct the header, or give the picks their tomogram's shape",
        )
    rows = np.flatnonzero(found)
    rows = rows[np.argsort(nearest[rows, 0], kind="stable")]
    z, y, x = nearest[rows].astype(np.intp).T
    planes = max(1, _PIECE // (shape[1] * shape[2]))
    for some in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(z // planes)) + 1):
        if len(some):
            low, high = int(z[some[0]]), int(z[some[-1]]) + 1
            marks = opened.inside(((low, high), (0, shape[1]), (0, shape[2])))
            found[rows[some]] = marks[z[some] - low, y[some], x[some]]
    return found


def _shape_under(mask: MaskLike, voxel_size: float) -> Shape:
    """Return the shape that a tomogram of this voxel size has under a mask that says its own."""
    if not isinstance(mask, str | Path | Tomogram):
        return tuple(mask.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = mask if isinstance(mask, Tomogram) else open_tomogram(mask, missing="fill")
    z, y, x = (max(1, round(n * own.voxel_size / voxel_size)) for n in own.shape)
    return (z, y, x)


def _as_tomogram(mask: MaskLike, frame: Frame, storage_options: Mapping[str, Any] | None) -> Tomogram:
    if isinstance(mask, Tomogram):
        return mask
    if isinstance(mask, str | Path):
        return open_mask_file(mask, frame, storage_options)
    shape = tuple(getattr(mask, "shape", ()))
    if len(shape) != 3 or 0 in shape:
        raise SourceError(
            f"a mask of type {type(mask).__name__} and shape {shape}",
            expected="a volume of three axes (zyx)",
            remedy="give a file, an array or a Tomogram",
        )
    # An array says no voxel size: the one with which it spans the tomogram along its longest axis.
    axis = int(np.argmax(frame.file_shape))
    voxel_size = frame.file_voxel_size * frame.file_shape[axis] / shape[axis]
    return open_tomogram(mask, voxel_size=voxel_size, name="mask", beam_axis=frame.beam_axis, missing="fill")


def open_mask_file(
    path: str | Path, frame: Frame, storage_options: Mapping[str, Any] | None = None
) -> Tomogram:
    """Open a mask file; one whose header has no voxel size must have the tomogram's own shape."""
    given: dict[str, Any] = {
        "beam_axis": frame.beam_axis,
        "missing": "fill",
        "storage_options": dict(storage_options or {}),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a mask's header often says 1 Å; its extent is checked instead
        try:
            return open_tomogram(path, **given)
        except SourceError:
            return open_tomogram(path, voxel_size=frame.file_voxel_size, **given)


def _nearest(axis: int, grid: Grid, frame: Frame, mask: Tomogram, voxel_size: float) -> npt.NDArray[np.intp]:
    """Return the mask voxel of every working voxel of an axis, by way of the file and Å."""
    working = np.zeros((grid.shape[axis], 3))
    working[:, axis] = np.arange(grid.shape[axis])
    source = np.zeros_like(working)
    source[:, axis] = np.floor(grid.to_source(working)[:, axis] + 0.5).clip(0, frame.shape[axis] - 1)
    angstrom = frame.to_file(source) * frame.file_voxel_size
    place = mask.frame.to_source(angstrom / voxel_size)[:, axis]
    nearest: npt.NDArray[np.intp] = np.floor(place + 0.5).clip(0, mask.shape[axis] - 1).astype(np.intp)
    return nearest
