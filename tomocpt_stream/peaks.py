"""Peaks of a map: local maxima box by box, one greedy spacing pass over all, sub-voxel centres.

A voxel is a candidate where it equals the maximum of its 3³ neighbourhood, clipped at the map's faces,
and lies strictly above the threshold: that depends on the map alone, so boxes of any shape give the
candidates of the whole. Spacing does not: it is one pass over the candidates of a map in the order
of their scores, ties in raster order. Together they are `skimage.feature.peak_local_max` with
footprint 3³ and `exclude_border=False`, in list and order.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from tomocpt_stream.errors import FloodError, PlanError, SourceError
from tomocpt_stream.picks import Picks
from tomocpt_stream.refine import REACH, offsets
from tomocpt_stream.spacing import space

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tomocpt_stream.frame import Box, Frame, Grid, Shape

__all__ = [
    "CANDIDATE",
    "MAX_CANDIDATES",
    "REACH",
    "find_peaks",
    "flood",
    "order",
    "scan",
    "scan_block",
    "space",
]

Candidates = npt.NDArray[np.void]
Voxels = npt.NDArray[np.int64]
Values = npt.NDArray[Any]

CANDIDATE = np.dtype(
    [("z", "i4"), ("y", "i4"), ("x", "i4"), ("score", "f4"), ("dz", "f4"), ("dy", "f4"), ("dx", "f4")]
)
"""A local maximum: its voxel, the map there, and the way from it to the centre in voxels."""

MAX_CANDIDATES = 5_000_000
"""More than this in one map is a flood: the map is saturated, or the threshold is far too low."""

_BOX_VOXELS = 1 << 24  # of an array, read at once
_SPARSE = 8  # with fewer than one voxel in so many above the threshold, looking around each is faster
_NEIGHBOURS = sorted(
    (step for step in product((-1, 0, 1), repeat=3) if any(step)), key=lambda step: sum(map(abs, step))
)


class VoxelArray(Protocol):
    """A 3-D array that gives numpy arrays for boxes: numpy's own, or zarr's."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels of each axis."""

    @property
    def dtype(self) -> Any:
        """The type of a voxel."""

    def __getitem__(self, box: Any, /) -> Any:
        """Return the voxels of a box."""


class ScoredMap(Protocol):
    """A heat map that knows its candidates and its place in a tomogram."""

    @property
    def name(self) -> str:
        """The tomogram's name."""

    @property
    def array(self) -> Any:
        """The scores on the working grid."""

    @property
    def grid(self) -> Grid:
        """The working grid."""

    @property
    def frame(self) -> Frame:
        """The tomogram's frame."""

    @property
    def candidate_floor(self) -> float:
        """The score above which `candidate_table` holds every candidate."""

    @property
    def is_constant(self) -> bool:
        """Whether all scores are equal."""

    def candidate_table(self) -> Candidates:
        """Return the candidates above the floor that may be picked."""

    def scan(self, threshold: float) -> Candidates:
        """Return the candidates above any threshold that may be picked, from the map itself."""


def find_peaks(
    heatmap: ScoredMap | VoxelArray,
    *,
    threshold: float,
    min_distance: float,
    p_norm: float = 2.0,
    refine: bool = True,
) -> Picks:
    """Return the local maxima strictly above `threshold` that keep `min_distance`, best first.

    `heatmap` is a Heatmap, whose picks are in voxels of its tomogram's file, or any 3-D array, whose
    picks are in its own indices without a voxel size. `min_distance` is in voxels of the map, in the
    norm `p_norm` (1, 2 or infinity), between integer maxima; a peak at exactly this distance from a
    better one is kept. `refine` moves each peak from its voxel to the centre around it. The score is
    the map at the integer maximum. A constant map has no peaks.

    Raises
    ------
    SourceError
        A voxel is NaN, or there are over 5 million candidates.
    PlanError
        The map is not 3-D, or an option makes no sense.
    """
    _check_options(threshold, min_distance, p_norm)
    if hasattr(heatmap, "candidate_table"):
        return _map_peaks(cast("ScoredMap", heatmap), threshold, min_distance, p_norm, refine=refine)
    return _array_peaks(heatmap, threshold, min_distance, p_norm, refine=refine)


def scan(array: VoxelArray, box: Box, threshold: float, *, name: str = "the map") -> Candidates:
    """Return the candidates of `box` of a 3-D numpy or zarr array, in raster order.

    `box` is three slices with start and stop inside the array. Read are the box and REACH voxels
    around it. `name` is what an error calls the map.

    Raises
    ------
    SourceError
        A voxel read is NaN, or the box alone holds over 5 million candidates.
    """
    shape = _shape_of(array)
    block, origin = _read(array, box, shape)
    return scan_block(block, origin, box, shape, threshold, name=name)


def scan_block(
    block: Values,
    origin: tuple[int, int, int],
    box: Box,
    array_shape: Shape,
    threshold: float,
    *,
    name: str = "the map",
) -> Candidates:
    """Return the candidates of `box` from voxels in memory; as `scan` of the whole array gives them.

    `block` starts at index `origin` of the array and holds `box` and REACH voxels around it, or ends
    at the array's faces.
    """
    highest = _maxima(block, origin, box, threshold)
    count = int(np.count_nonzero(highest))
    if count > MAX_CANDIDATES:
        raise flood(name, count)
    points = np.argwhere(highest) + [s.start for s in box]
    table = np.zeros(len(points), dtype=CANDIDATE)
    table["score"] = block[_within(box, origin)][highest]
    shifts = offsets(block, points, origin, array_shape)
    for axis, letter in enumerate("zyx"):
        table[letter] = points[:, axis]
        table[f"d{letter}"] = shifts[:, axis]
    return table


def order(table: Candidates, shape: Shape) -> Candidates:
    """Return candidates of a map of `shape` best first, equal scores in raster order."""
    raster = np.ravel_multi_index(tuple(table[axis].astype(np.int64) for axis in "zyx"), shape)
    best: Candidates = table[np.lexsort((raster, -table["score"]))]
    return best


def flood(name: str, count: int) -> FloodError:
    """Return the error for a map with too many candidates."""
    return FloodError(
        f"{name} has {count:,} candidate peaks or more",
        expected=f"at most {MAX_CANDIDATES:,}",
        remedy="raise the threshold; if the map is flat or saturated, check contrast, picker and diameter",
    )


def _map_peaks(
    heatmap: ScoredMap, threshold: float, min_distance: float, p_norm: float, *, refine: bool
) -> Picks:
    table = order(_scored_candidates(heatmap, threshold), heatmap.grid.shape)
    table = table[space(_voxels(table), min_distance, p_norm)]
    points = _voxels(table).astype(np.float64)
    if refine:
        points += np.stack([table[name] for name in ("dz", "dy", "dx")], axis=1)
    frame = heatmap.frame
    return Picks(
        zyx=frame.to_file(heatmap.grid.to_source(points)),
        score=table["score"],
        voxel_size=frame.file_voxel_size,
        tomogram=heatmap.name,
        shape=frame.file_shape,
    )


def _scored_candidates(heatmap: ScoredMap, threshold: float) -> Candidates:
    if heatmap.is_constant and np.prod(heatmap.grid.shape) > 1:
        return np.zeros(0, dtype=CANDIDATE)
    level = _as_voxel(threshold, np.dtype(np.float32))
    stored = level >= _as_voxel(heatmap.candidate_floor, np.dtype(np.float32))
    table = heatmap.candidate_table() if stored else heatmap.scan(threshold)
    above: Candidates = table[table["score"] > level]
    if len(above) > MAX_CANDIDATES:
        raise flood(heatmap.name, len(above))
    return above


def _array_peaks(
    array: VoxelArray, threshold: float, min_distance: float, p_norm: float, *, refine: bool
) -> Picks:
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        array = np.asarray(array)
    shape = _shape_of(array)
    points, values = _all_maxima(array, shape, threshold)
    raster = np.argsort(np.ravel_multi_index(tuple(points.T), shape)) if len(points) else np.arange(0)
    best = raster[np.argsort(-values[raster], kind="stable")]
    points, values = points[best], values[best]
    stays = space(points, min_distance, p_norm)
    points, values = points[stays], values[stays]
    centres = points.astype(np.float64)
    if refine:
        for box in _boxes(array, shape):
            inside = np.all(
                [(points[:, a] >= s.start) & (points[:, a] < s.stop) for a, s in enumerate(box)], axis=0
            )
            if inside.any():
                block, origin = _read(array, box, shape)
                centres[inside] += offsets(block, points[inside], origin, shape)
    return Picks(centres, values.astype(np.float32), shape=shape)


def _all_maxima(array: VoxelArray, shape: Shape, threshold: float) -> tuple[Voxels, Values]:
    """Return all candidates of an array and their values in its own type, box by box."""
    found, values, count = [np.zeros((0, 3), dtype=np.int64)], [], 0
    for box in _boxes(array, shape):
        block, origin = _read(array, box, shape)
        highest = _maxima(block, origin, box, threshold)
        count += int(np.count_nonzero(highest))
        # Where every voxel so far equals its neighbours, the map may be constant: it has no peaks.
        if count > MAX_CANDIDATES and not _is_constant(array, shape):
            raise flood(f"the map of {' × '.join(map(str, shape))} voxels", count)
        if count > MAX_CANDIDATES:
            return found[0], np.zeros(0)
        found.append(np.argwhere(highest) + [s.start for s in box])
        values.append(_plain(block)[_within(box, origin)][highest])
    if count == np.prod(shape) > 1:  # skimage too calls the only voxel of a map a peak
        return found[0], np.zeros(0)
    return np.concatenate(found), np.concatenate(values)


def _is_constant(array: VoxelArray, shape: Shape) -> bool:
    first = np.asarray(array[0:1, 0:1, 0:1]).item()
    return all(bool((np.asarray(array[box]) == first).all()) for box in _boxes(array, shape))


def _maxima(block: Values, origin: tuple[int, int, int], box: Box, threshold: float) -> npt.NDArray[np.bool_]:
    """Return which voxels of `box` are candidates."""
    level = _as_voxel(threshold, block.dtype)
    block = _plain(block)
    _refuse_nan(block, origin)
    core = _within(box, origin)
    above = np.asarray(block[core] > level)
    if np.count_nonzero(above) * _SPARSE > above.size:
        above &= block[core] == ndimage.maximum_filter(block, size=3, mode="nearest")[core]
        return above
    points, last = np.argwhere(above) + [s.start for s in core], np.asarray(block.shape) - 1
    for step in _NEIGHBOURS:
        neighbours = np.clip(points + step, 0, last)  # beyond a face: the nearest voxel inside
        points = points[block[tuple(neighbours.T)] <= block[tuple(points.T)]]
    highest = np.zeros(block.shape, dtype=bool)
    highest[tuple(points.T)] = True
    return np.asarray(highest[core])


def _within(box: Box, origin: tuple[int, int, int]) -> Box:
    """Return a box of the map as slices of the block that starts at `origin`."""
    z, y, x = (slice(s.start - o, s.stop - o) for s, o in zip(box, origin, strict=True))
    return z, y, x


def _plain(block: Values) -> Values:
    """Return a block in C order and in a type that scipy filters: not bool, float16 or byte-swapped."""
    kind = block.dtype
    if kind.kind not in "fiub" or kind.itemsize > np.dtype(np.float64).itemsize:
        raise SourceError(f"a map of {kind}", expected="real numbers", remedy="convert it to float32")
    if kind.kind == "b":
        kind = np.dtype(np.uint8)
    elif kind.kind == "f":
        kind = np.dtype(np.float64 if kind.itemsize > np.dtype(np.float32).itemsize else np.float32)
    return np.ascontiguousarray(block, dtype=kind.newbyteorder("="))


def _refuse_nan(block: Values, origin: tuple[int, int, int]) -> None:
    if block.dtype.kind == "f" and block.size and np.isnan(block.max()):
        first = np.unravel_index(np.flatnonzero(np.isnan(block))[0], block.shape)
        z, y, x = (int(i) + o for i, o in zip(first, origin, strict=True))
        raise SourceError(
            f"the map is NaN at voxel ({z}, {y}, {x}) (z, y, x)",
            expected="a number in every voxel",
            remedy="find out which step made it; a NaN in the tomogram or in the picker's weights is usual",
        )


def _as_voxel(value: float, dtype: np.dtype[Any]) -> Any:
    """Return a threshold rounded to a map's type; as it is for a map of integers."""
    with np.errstate(over="ignore"):
        return dtype.type(value) if dtype.kind == "f" else value


def _voxels(table: Candidates) -> Voxels:
    return np.stack([table[axis].astype(np.int64) for axis in "zyx"], axis=1)


def _shape_of(array: VoxelArray) -> Shape:
    if len(array.shape) != 3 or 0 in array.shape:
        raise PlanError(
            f"a map of shape {tuple(array.shape)}",
            expected="three axes (z, y, x) of at least one voxel",
            remedy="pass one 3-D map",
        )
    z, y, x = (int(n) for n in array.shape)
    return z, y, x


def _check_options(threshold: float, min_distance: float, p_norm: float) -> None:
    if np.isnan(threshold) or not min_distance >= 0 or p_norm not in (1, 2, np.inf):
        raise PlanError(
            f"threshold {threshold}, min_distance {min_distance}, p_norm {p_norm}",
            expected="a number, a distance of at least 0, and the norm 1, 2 or infinity",
            remedy="give the threshold in the map's units and the distance in its voxels",
        )


def _boxes(array: VoxelArray, shape: Shape) -> Iterator[Box]:
    """Yield boxes of whole chunks, in raster order, that make up the array; each fits in memory."""
    chunks = getattr(array, "chunks", None) or (1, 1, 1)
    edges = list(shape)
    for axis, chunk in enumerate(chunks):
        others = int(np.prod(edges)) // edges[axis]
        step = chunk if isinstance(chunk, int) else chunk[0]  # dask gives every chunk's length
        if others * edges[axis] > _BOX_VOXELS:
            edges[axis] = min(shape[axis], max(1, _BOX_VOXELS // (others * step)) * step)
    starts = (range(0, n, edge) for n, edge in zip(shape, edges, strict=True))
    for z, y, x in product(*starts):
        corner = zip((z, y, x), edges, shape, strict=True)
        spans = [slice(start, min(start + edge, n)) for start, edge, n in corner]
        yield spans[0], spans[1], spans[2]


def _read(array: VoxelArray, box: Box, shape: Shape) -> tuple[Values, tuple[int, int, int]]:
    """Return the voxels of `box` and REACH voxels around it, and the index where they start."""
    wide = [slice(max(0, s.start - REACH), min(n, s.stop + REACH)) for s, n in zip(box, shape, strict=True)]
    block = np.asarray(array[wide[0], wide[1], wide[2]])
    return block, (wide[0].start, wide[1].start, wide[2].start)
