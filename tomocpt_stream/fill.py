"""Find constant fill at the faces of a tomogram: masked corners and padding.

A value held exactly by more than 1 % of the source voxels, in regions that touch a face, is fill. A
region is made of *solid* voxels, those in some 4 x 4 x 4 cube of the one value (the volume goes on
beyond its faces as it ends there), joined through shared sides. Noise of few grey levels holds
every value often, but not in such cubes. (With 2 x 2 x 2, the grain of an 8-bit tomogram of low
contrast passed for fill.)

The search runs box by box on a lattice anchored to the volume, with a halo of three voxels; regions
are joined across boxes by union-find. Memory: one read tile, and one layer of box faces.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from tomocpt_stream.progress import Progress, silent
from tomocpt_stream.tiles import cut, prefetch, voxels_of, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import zarr

    from tomocpt_stream.frame import Box, Shape

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.int64]

SHARE = 0.01
BOX = 128
_TILE = (BOX, 2 * BOX, 2 * BOX)  # one read: larger reads decode a stored chunk less often
_EDGE = 4  # of the cubes that make voxels solid
_HALO = _EDGE - 1
_CANDIDATES = 4
_STRIP = 1 << 25


@dataclass(frozen=True)
class Fill:
    """The values that fill regions at the faces, the source voxels of each, and where they are.

    `mask` is a zarr bool array on the source grid (z, y, x).
    """

    values: tuple[float, ...]
    voxels: tuple[int, ...]
    mask: zarr.Array[Any]

    def read(self, box: Box) -> Bools:
        """Return whether each source voxel of `box` is fill."""
        return np.asarray(self.mask[box], dtype=np.bool_)


class Regions:
    """Regions of solid voxels, joined by union-find; each has a size and may touch a face."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._size: list[int] = []
        self._touches: list[bool] = []

    def __len__(self) -> int:
        return len(self._parent)

    def add(self, sizes: npt.NDArray[np.int64], touches: Bools) -> None:
        """Append regions, numbered on from the last."""
        self._parent.extend(range(len(self._parent), len(self._parent) + len(sizes)))
        self._size.extend(sizes.tolist())
        self._touches.extend(touches.tolist())

    def root(self, region: int) -> int:
        """Return the number that stands for all that `region` is joined with."""
        while self._parent[region] != region:
            self._parent[region] = self._parent[self._parent[region]]
            region = self._parent[region]
        return region

    def join(self, one: int, other: int) -> None:
        """Make two regions one."""
        low, high = sorted((self.root(one), self.root(other)))
        if low != high:
            self._parent[high] = low
            self._size[low] += self._size[high]
            self._touches[low] |= self._touches[high]

    def at_faces(self) -> tuple[Bools, int]:
        """Return which regions touch a face, by number, and the voxels of all of them."""
        flags = np.array([self._touches[self.root(region)] for region in range(len(self))], dtype=np.bool_)
        roots = (region for region in range(len(self)) if self._parent[region] == region)
        return flags, sum(self._size[region] for region in roots if self._touches[region])


def find_fill(
    read: Callable[[Box], Floats],
    shape: Shape,
    create_mask: Callable[[], zarr.Array[Any]],
    *,
    progress: Progress = silent,
) -> Fill | None:
    """Find the fill of a source of `shape` that `read` gives boxes of; None where there is none.

    `create_mask` returns an empty zarr bool array of `shape`, chunked in cubes of `BOX`; it is
    called, and the array written, only if there is fill.
    """
    candidates = face_values(read, shape)
    if not candidates:
        return None
    labellers = {value: _Labeller(shape) for value in candidates}
    seen, total = 0, math.prod(shape)
    for box, padded in _boxes(read, shape):
        some = has_constant_cube(padded)
        for value, labeller in labellers.items():
            labeller.take(box, solid(padded == value) if some else None)
        seen += voxels_of(box)
        progress("fill", seen, total)
    at_faces = {value: labeller.regions.at_faces() for value, labeller in labellers.items()}
    found = {value: entry for value, entry in at_faces.items() if entry[1] > SHARE * total}
    if not found:
        return None
    mask = create_mask()
    _write_mask(mask, read, shape, {value: flags for value, (flags, _) in found.items()})
    return Fill(tuple(found), tuple(voxels for _, voxels in found.values()), mask)


def _write_mask(
    mask: zarr.Array[Any], read: Callable[[Box], Floats], shape: Shape, found: dict[float, Bools]
) -> None:
    """Number the regions once more, in the same order, and store where those at the faces are."""
    labellers = {value: _Labeller(shape) for value in found}
    for box, padded in _boxes(read, shape):
        filled = np.zeros([side.stop - side.start for side in box], np.bool_)
        some = has_constant_cube(padded)
        for value, labeller in labellers.items():
            numbers = labeller.number(box, solid(padded == value) if some else None)
            if numbers is not None:
                filled |= np.concatenate([[False], found[value]])[numbers]
        mask[box] = filled


def face_values(read: Callable[[Box], Floats], shape: Shape) -> list[float]:
    """Return the values most frequent among the constant 4 x 4 squares of the six faces; at most four."""
    counts: Counter[float] = Counter()
    for axis, box in _faces(shape):
        face = np.take(read(box), 0, axis=axis)
        face = np.pad(face, [(0, max(0, _EDGE - n)) for n in face.shape], mode="edge")
        # A square is constant where its rows are, and its first column is.
        constant = _runs(_runs(face[:, :-1] == face[:, 1:], 1, _EDGE - 1), 0, _EDGE)
        constant &= _runs(face[:-1] == face[1:], 0, _EDGE - 1)[:, : constant.shape[1]]
        corner = face[: constant.shape[0], : constant.shape[1]]
        values, numbers = np.unique(corner[constant] + np.float32(0.0), return_counts=True)
        counts.update(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [value for value, _ in ranked[:_CANDIDATES]]


def has_constant_cube(voxels: Floats) -> bool:
    """Return whether any 2 x 2 x 2 cube holds one value: the cheap question that most boxes answer no."""
    rows = voxels[:, :, 1:] == voxels[:, :, :-1]
    squares = rows[:, 1:] & rows[:, :-1]
    squares &= voxels[:, 1:, 1:] == voxels[:, :-1, 1:]
    if not squares.any():
        return False
    cubes = squares[1:] & squares[:-1]
    cubes &= voxels[1:, 1:, 1:] == voxels[:-1, 1:, 1:]
    return bool(cubes.any())


def solid(equal: Bools) -> Bools:
    """Return which voxels lie in some 4 x 4 x 4 cube of true ones; `equal` has a halo of three voxels."""
    cubes = equal
    for axis in range(3):
        cubes = _runs(cubes, axis, _EDGE)
        if not cubes.any():
            return np.zeros([n - 2 * _HALO for n in equal.shape], np.bool_)
    for axis in range(3):
        cubes = ~_runs(~cubes, axis, _EDGE)
    return cubes


def _runs(flags: Bools, axis: int, length: int) -> Bools:
    """Return where a run of `length` true flags begins; the axis is shorter by `length` - 1."""
    count = flags.shape[axis] - length + 1
    along = (slice(None),) * axis
    runs = flags[(*along, slice(0, count))].copy()
    for step in range(1, length):
        runs &= flags[(*along, slice(step, step + count))]
    return runs


class _Labeller:
    """Numbers the regions of one value over the boxes of a volume, which come in lattice order.

    Regions that touch no side of their box are left out: they touch no face of the volume either.
    """

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._sides: dict[tuple[int, int, int, int], Labels] = {}
        self._next = 0
        self.regions = Regions()

    def take(self, box: Box, solid_voxels: Bools | None) -> None:
        """Add the regions of a box and join them with those of the boxes before it."""
        numbers = self.number(box, solid_voxels, register=True)
        for axis in range(3):
            before = self._sides.pop((axis, *(side.start for side in box)), None)
            if before is None or numbers is None:
                continue
            low = np.take(numbers, 0, axis=axis)
            touching = (before > 0) & (low > 0)
            for one, other in np.unique(np.stack([before[touching], low[touching]]), axis=1).T.tolist():
                self.regions.join(one - 1, other - 1)
        if numbers is not None:
            self._keep_sides(box, numbers)

    def number(self, box: Box, solid_voxels: Bools | None, *, register: bool = False) -> Labels | None:
        """Return the region of each voxel, counted from 1; 0 where none; None where there is none at all."""
        if solid_voxels is None or not solid_voxels.any():
            return None
        labels, count = ndimage.label(solid_voxels)
        sides = [np.unique(np.take(labels, at, axis=axis)) for axis in range(3) for at in (0, -1)]
        outer = np.zeros(count + 1, np.bool_)
        touches = np.zeros(count + 1, np.bool_)
        at_face = [
            face
            for axis, side in enumerate(box)
            for face in (side.start == 0, side.stop == self._shape[axis])
        ]
        for found, face in zip(sides, at_face, strict=True):
            outer[found] = True
            touches[found] |= face
        outer[0] = False
        numbers = np.zeros(count + 1, np.int64)
        numbers[outer] = self._next + 1 + np.arange(int(outer.sum()))
        self._next += int(outer.sum())
        if register:
            sizes = np.bincount(labels.ravel(), minlength=count + 1)
            self.regions.add(sizes[outer], touches[outer])
        return np.asarray(numbers[labels])

    def _keep_sides(self, box: Box, numbers: Labels) -> None:
        for axis in range(3):
            if box[axis].stop < self._shape[axis]:
                start = [side.start for side in box]
                start[axis] = box[axis].stop
                self._sides[(axis, start[0], start[1], start[2])] = np.take(numbers, -1, axis=axis).copy()


def _boxes(read: Callable[[Box], Floats], shape: Shape) -> Iterator[tuple[Box, Floats]]:
    """Yield each box of the lattice and its voxels with a halo of three, tile by tile."""

    def read_padded(tile: Box) -> Floats:
        z, y, x = (
            slice(max(0, side.start - _HALO), min(n, side.stop + _HALO))
            for side, n in zip(tile, shape, strict=True)
        )
        ends = [
            (_HALO - (side.start - got.start), _HALO - (got.stop - side.stop))
            for side, got in zip(tile, (z, y, x), strict=True)
        ]
        return np.pad(read((z, y, x)), ends, mode="edge")

    for tile, padded in prefetch(read_padded, cut(whole(shape), _TILE)):
        for box in cut(tile, (BOX, BOX, BOX)):
            z, y, x = (
                slice(inner.start - side.start, inner.stop - side.start + 2 * _HALO)
                for inner, side in zip(box, tile, strict=True)
            )
            yield box, padded[z, y, x]


def _faces(shape: Shape) -> Iterator[tuple[int, Box]]:
    """Yield the six faces, each as its axis and boxes one voxel thick: strips that share three lines."""
    for axis in range(3):
        along, across = [other for other in range(3) if other != axis]
        # A strip along z touches much of every plane of a mapped file, which stays in memory with it.
        step = max(1, _STRIP // (shape[1] * shape[2] if along == 0 else shape[across]))
        for at in sorted({0, shape[axis] - 1}):
            for start in range(0, max(1, shape[along] - _HALO), step):
                box = [slice(0, n) for n in shape]
                box[axis] = slice(at, at + 1)
                box[along] = slice(start, min(shape[along], start + step + _HALO))
                yield axis, (box[0], box[1], box[2])
