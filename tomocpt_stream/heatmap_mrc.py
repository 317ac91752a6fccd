"""Heat maps as MRC files, for programs that read no zarr: on the working grid, or on that of the tomogram."""

from __future__ import annotations

import math
import struct
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

import mrcfile
import numpy as np

from tomocpt_stream.errors import SourceError
from tomocpt_stream.progress import Progress, silent
from tomocpt_stream.whole import whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from tomocpt_stream.frame import Shape
    from tomocpt_stream.heatmap import Heatmap
    from tomocpt_stream.tomogram import Tomogram

    Plane = npt.NDArray[np.float32]

_HEADER_BYTES, _STATISTICS, _RMS = 1024, 76, 216
# How much a voxel size may differ: headers have it in four bytes, and some programs round it.
_SAME_SIZE = 1e-2


def write_heatmap_mrc(
    heatmap: Heatmap, path: str | Path, *, like: Tomogram | None = None, progress: Progress = silent
) -> None:
    """Write a heat map as an MRC file of float32; the file appears whole.

    On the working grid as it is stored: the header has its voxel size, and as origin (x, y, z in Å) where
    its first voxel lies in the tomogram, whose own first voxel is at 0. With `like`, the tomogram that
    was picked, on the grid of that one's file, between working voxels by linear interpolation, without
    an origin. Both hold one layer of the stored chunks in memory.

    Raises
    ------
    SourceError
        `like` is of another shape or voxel size than the tomogram of the map.
    """
    frame, grid = heatmap.frame, heatmap.grid
    if like is None:
        sizes = tuple(scale * frame.voxel_size for scale in grid.scale)
        corner = grid.to_source([[0, 0, 0]])[0] * frame.level_scale + frame.level_shift
        first = corner * frame.file_voxel_size
        with section_file(Path(path), heatmap.shape, sizes, first) as file:
            for plane, slab in _layers(heatmap, 0, progress):
                for offset, one in enumerate(slab):
                    file.put(plane + offset, one)
        return
    found = (like.frame.file_shape, like.frame.file_voxel_size)
    if found[0] != frame.file_shape or abs(found[1] / frame.file_voxel_size - 1) > _SAME_SIZE:
        raise SourceError(
            f"{like.name} has {found[0]} voxels (z, y, x) of {found[1]:g} Å",
            expected=f"the tomogram of the map: {frame.file_shape} voxels of {frame.file_voxel_size:g} Å",
            remedy="give the tomogram that was picked, or leave it out for the working grid",
        )
    with section_file(Path(path), frame.file_shape, (frame.file_voxel_size,) * 3, np.zeros(3)) as file:
        for plane, one in _on_file_grid(heatmap, progress):
            file.put(plane, one)


def _layers(heatmap: Heatmap, axis: int, progress: Progress) -> Iterator[tuple[int, Plane]]:
    """Yield the layers of stored chunks along an axis, which comes first in them, with where each begins."""
    extent, thick = heatmap.shape[axis], heatmap.array.chunks[axis]
    for start in range(0, extent, thick):
        stop = min(start + thick, extent)
        progress("write", start, extent)
        box = tuple(slice(start, stop) if one == axis else slice(None) for one in range(3))
        yield start, np.moveaxis(np.asarray(heatmap.array[box], dtype=np.float32), axis, 0)
    progress("write", extent, extent)


def _on_file_grid(heatmap: Heatmap, progress: Progress) -> Iterator[tuple[int, Plane]]:
    """Yield the sections of the map on the grid of the tomogram's file, each with its index.

    A file whose beam runs along y is the source turned: its z is the source's y backwards.
    """
    turned = heatmap.frame.beam_axis == "y"
    along, rows = (1, 0) if turned else (0, 1)
    lower, weight = _between(heatmap, along)
    across, columns = _between(heatmap, rows), _between(heatmap, 2)
    before: Plane | None = None
    done = 0
    for start, slab in _layers(heatmap, along, progress):
        # The last plane of the layer before stays, so that every chunk is read once.
        planes = slab if before is None else np.concatenate([before[None], slab])
        first = start if before is None else start - 1
        last = first + len(planes) - 1
        while done < len(lower) and (lower[done] + 1 <= last or last == heatmap.shape[along] - 1):
            low = lower[done] - first
            high = min(low + 1, len(planes) - 1)
            plane = planes[low] + weight[done] * (planes[high] - planes[low])
            yield (len(lower) - 1 - done if turned else done), _spread(plane, across, columns)
            done += 1
        before = planes[-1].copy()


def _between(heatmap: Heatmap, axis: int) -> tuple[npt.NDArray[np.intp], Plane]:
    """Return the working voxel below each voxel of the file along a source axis, and the next one's weight.

    Beyond the outer working voxels the map goes on as it is there.
    """
    frame, grid = heatmap.frame, heatmap.grid
    file_axis = {0: 1, 1: 0, 2: 2}[axis] if frame.beam_axis == "y" else axis
    index = (np.arange(frame.file_shape[file_axis]) - frame.level_shift[axis]) / frame.level_scale[axis]
    working = index if grid.is_identity else (index + 0.5) / grid.scale[axis] - 0.5
    working = np.clip(working, 0, grid.shape[axis] - 1)
    lower = np.floor(working).astype(np.intp)
    return lower, (working - lower).astype(np.float32)


def _spread(
    plane: Plane, rows: tuple[npt.NDArray[np.intp], Plane], columns: tuple[npt.NDArray[np.intp], Plane]
) -> Plane:
    for axis, (lower, weight) in enumerate((rows, columns)):
        shape = (-1, 1) if axis == 0 else (1, -1)
        low = plane.take(lower, axis)
        high = plane.take(np.minimum(lower + 1, plane.shape[axis] - 1), axis)
        plane = low + weight.reshape(shape) * (high - low)
    return plane


class Sections:
    """The sections of an MRC file, taken in any order, and the statistics of all of them."""

    def __init__(self, file: IO[bytes], shape: Shape) -> None:
        self._file, self._shape = file, shape
        self._low, self._high, self._sum, self._squares = math.inf, -math.inf, 0.0, 0.0

    def put(self, plane: int, values: Plane) -> None:
        """Write one section."""
        self._file.seek(_HEADER_BYTES + plane * 4 * self._shape[1] * self._shape[2])
        self._file.write(np.ascontiguousarray(values, dtype="<f4").tobytes())
        self._low, self._high = min(self._low, float(values.min())), max(self._high, float(values.max()))
        self._sum += float(values.sum(dtype=np.float64))
        self._squares += float(np.square(values, dtype=np.float64).sum())

    def finish(self) -> None:
        """Write the statistics into the header."""
        count = math.prod(self._shape)
        mean = self._sum / count
        self._file.seek(_STATISTICS)
        self._file.write(struct.pack("<3f", self._low, self._high, mean))
        self._file.seek(_RMS)
        self._file.write(struct.pack("<f", math.sqrt(max(0.0, self._squares / count - mean**2))))


@contextmanager
def section_file(
    path: Path, shape: Shape, sizes: tuple[float, ...], first: npt.NDArray[np.float64]
) -> Iterator[Sections]:
    """Yield the sections of a new MRC file, which appears whole when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        with mrcfile.new_mmap(partial, shape, mrc_mode=2, overwrite=True) as file:
            file.voxel_size = tuple(float(size) for size in sizes[::-1])
            file.header.origin = tuple(float(one) for one in first[::-1])
        with partial.open("r+b") as opened:
            sections = Sections(opened, shape)
            yield sections
            sections.finish()
