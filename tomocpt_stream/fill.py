"""Find constant fill at the faces of a tomogram: masked corners and padding.

A *region* is a set of voxels that equal one value exactly, joined through shared sides. It is fill if
it touches a face and at least half of it is *solid*: in some 4 x 4 x 4 cube of the value, two planes
of which, at most, lie beyond a face, where the volume goes on as it ends. So the tips and slivers of an
oblique border belong to the fill that they are part of; one blank section is none; and noise of few
grey levels, which holds every value often and joins it over any distance, is none either. Where such
noise has grown on fill until less than half of the region is solid, the region's solid parts that touch
a face are fill, by themselves. A value counts if its regions that are fill, or its solid parts at the
faces, hold more than 1 % of the source voxels; values are looked for on the faces (`face_values`).

The search runs box by box on a lattice anchored to the volume, with a halo of three voxels; regions
are followed through every box that holds the value, since a sliver may be all that ties a box to fill
in a later one. Memory: one read tile, the value's voxels on one layer of box faces, and the numbers of
the pieces of regions that are fill, or that reach that layer.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from tomocpt_stream.progress import Progress, silent
from tomocpt_stream.tiles import cut, prefetch, voxels_of, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import zarr

    from tomocpt_stream.frame import Box, Shape

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.int64]
Positions = npt.NDArray[np.int32]

SHARE = 0.01
BOX = 128
_TILE = (BOX, 2 * BOX, 2 * BOX)  # one read: larger reads decode a stored chunk less often
_EDGE = 4  # of the cubes that make voxels solid
_HALO = _EDGE - 1
_BEYOND = 2  # planes of a cube that may lie beyond a face
_CANDIDATES = 4
_STRIP = 1 << 25
_PENDING = 1 << 18  # new pieces of regions, until the regions that are not fill are forgotten


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
    """Regions put together from numbered pieces; those that turn out to be none of the fill are forgotten.

    A piece is the part of a region that lies in one box; it touches a side of the box.
    """

    def __init__(self) -> None:
        self.pending = 0
        self._next = 0
        self._new: list[tuple[Labels, Labels, Bools]] = []
        self._pairs: list[Labels] = []
        # Of the pieces kept: number (ascending) and region. Of the regions: voxels, solid ones, at a face.
        self._numbers = np.zeros(0, np.int64)
        self._region = np.zeros(0, np.int64)
        self._size = np.zeros(0, np.int64)
        self._solid = np.zeros(0, np.int64)
        self._touches = np.zeros(0, np.bool_)

    def add(self, sizes: Labels, solid_sizes: Labels, touches: Bools) -> int:
        """Append pieces, numbered on from the last, and return the number of the first."""
        first = self._next
        self._next += len(sizes)
        self.pending += len(sizes)
        self._new.append((sizes, solid_sizes, touches))
        return first

    def join(self, pairs: Labels) -> None:
        """Make one region of the two of each row of piece numbers (n, 2)."""
        self._pairs.append(pairs)

    def settle(self, numbers: Labels) -> None:
        """Forget the regions that are not fill; those with a piece among `numbers` can still grow."""
        new = np.arange(self._next - self.pending, self._next)
        pieces = np.concatenate([self._numbers, new])
        region = np.concatenate([self._region, len(self._size) + np.arange(len(new))])
        sizes, solid_sizes, touches = (
            np.concatenate(parts)
            for parts in zip((self._size, self._solid, self._touches), *self._new, strict=True)
        )
        if len(pieces) == 0:
            return
        pairs = np.concatenate([np.zeros((0, 2), np.int64), *self._pairs])
        ends = region[np.searchsorted(pieces, pairs)].T
        graph = coo_array((np.ones(len(pairs), np.bool_), (ends[0], ends[1])), shape=(len(sizes),) * 2)
        count, merged = connected_components(graph, directed=False)
        region = merged[region]
        size, solid_size, touching = (  # as floats, exact to 2^53 voxels
            np.bincount(merged, weights, minlength=count).astype(np.int64)
            for weights in (sizes, solid_sizes, touches)
        )
        kept = (touching > 0) & (2 * solid_size >= size)
        kept[region[np.searchsorted(pieces, numbers)]] = True
        stay = kept[region]
        self._numbers, self._region = pieces[stay], (np.cumsum(kept) - 1)[region[stay]]
        self._size, self._solid, self._touches = size[kept], solid_size[kept], touching[kept] > 0
        self._new, self._pairs, self.pending = [], [], 0

    def fill(self) -> tuple[Labels, int]:
        """Return the numbers of the pieces of all regions that are fill, ascending, and their voxels."""
        self.settle(np.zeros(0, np.int64))
        return self._numbers, int(self._size.sum())


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
    # In a volume of one plane no cube has two planes inside.
    candidates = face_values(read, shape) if min(shape) > _EDGE - 1 - _BEYOND else []
    if not candidates:
        return None
    searches = [_Search(value, shape) for value in candidates]
    seen, total = 0, math.prod(shape)
    for box, padded in _boxes(read, shape):
        for search in searches:
            search.take(box, padded)
        seen += voxels_of(box)
        progress("fill", seen, total)
    found = [search for search in searches if search.settle() > SHARE * total]
    if not found:
        return None
    mask = create_mask()
    voxels = [0] * len(found)
    for box, padded in _boxes(read, shape, lambda box: any(search.reaches(box) for search in found)):
        filled = np.zeros([side.stop - side.start for side in box], np.bool_)
        for number, search in enumerate(found):
            part = search.fill(box, padded)
            voxels[number] += int(np.count_nonzero(part))
            filled |= part
        mask[box] = filled
    return Fill(tuple(search.value for search in found), tuple(voxels), mask)


class _Search:
    """The search for fill of one value: its regions, and the parts of them that are solid."""

    def __init__(self, value: float, shape: Shape) -> None:
        self.value = value
        self._regions = _Labeller(shape)
        self._solid = _Labeller(shape)

    def take(self, box: Box, padded: Floats) -> None:
        """Add what a box holds; boxes come in the order of `_boxes`."""
        equal = padded == np.float32(self.value)
        inside = _inside(equal)
        solid_voxels = solid(equal) if inside.any() else inside
        self._regions.take(box, inside, solid_voxels)
        self._solid.take(box, solid_voxels, solid_voxels)

    def settle(self) -> int:
        """Settle what is fill once every box is taken; return the voxels that must exceed the share."""
        return max(self._regions.settle(), self._solid.settle())

    def reaches(self, box: Box) -> bool:
        """Return whether fill of the value may lie in a box."""
        return self._regions.reaches(box) or self._solid.reaches(box)

    def fill(self, box: Box, padded: Floats) -> Bools:
        """Return which voxels of a box are fill."""
        equal = padded == np.float32(self.value)
        filled = np.zeros([side.stop - side.start for side in box], np.bool_)
        if self._regions.reaches(box):
            filled |= self._regions.fill(box, _inside(equal))
        if self._solid.reaches(box):
            filled |= self._solid.fill(box, solid(equal))
        return filled


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


def _inside(padded: Bools) -> Bools:
    return padded[_HALO:-_HALO, _HALO:-_HALO, _HALO:-_HALO]


def _runs(flags: Bools, axis: int, length: int) -> Bools:
    """Return where a run of `length` true flags begins; the axis is shorter by `length` - 1."""
    count = flags.shape[axis] - length + 1
    along = (slice(None),) * axis
    runs = flags[(*along, slice(0, count))].copy()
    for step in range(1, length):
        runs &= flags[(*along, slice(step, step + count))]
    return runs


class _Labeller:
    """Numbers the pieces of regions over the boxes of a volume, which come in the order of `_boxes`.

    Pieces that touch no side of their box are left out: they touch no face of the volume either.
    """

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._regions = Regions()
        self._pieces: dict[tuple[int, int, int], tuple[int, int]] = {}  # of a box: the first, how many
        # Sides that meet a later box: flat positions in the side that hold a piece, and which.
        self._sides: dict[tuple[int, int, int, int], tuple[Positions, Labels]] = {}
        self._filled = np.zeros(0, np.int64)

    def take(self, box: Box, voxels: Bools, solid_voxels: Bools) -> None:
        """Add the pieces of a box, and join them with those of the boxes before it."""
        start = (box[0].start, box[1].start, box[2].start)
        met = [self._sides.pop((axis, *start), None) for axis in range(3)]
        if not voxels.any():
            return
        labels, count, outer = _outer_pieces(voxels)
        at_face = np.zeros(count + 1, np.bool_)
        for axis, side in enumerate(box):
            for at, face in ((0, side.start == 0), (-1, side.stop == self._shape[axis])):
                if face:
                    at_face[np.take(labels, at, axis=axis)] = True
        sizes = np.bincount(labels[voxels], minlength=count + 1)
        solid_sizes = np.bincount(labels[solid_voxels], minlength=count + 1)
        first = self._regions.add(sizes[outer], solid_sizes[outer], at_face[outer])
        numbers = np.full(count + 1, -1, np.int64)
        pieces = int(np.count_nonzero(outer))
        numbers[outer] = first + np.arange(pieces)
        self._pieces[start] = (first, pieces)
        for axis, before in enumerate(met):
            if before is not None:
                self._join_side(before, numbers[np.take(labels, 0, axis=axis).ravel()])
            self._keep_side(box, axis, numbers[np.take(labels, -1, axis=axis).ravel()])
        if self._regions.pending > _PENDING:
            held = [numbers for _, numbers in self._sides.values()]
            self._regions.settle(np.concatenate([np.zeros(0, np.int64), *held]))

    def _join_side(self, before: tuple[Positions, Labels], side: Labels) -> None:
        positions, numbers = before
        meeting = side[positions] >= 0
        pairs = np.stack([numbers[meeting], side[positions[meeting]]])
        self._regions.join(np.unique(pairs, axis=1).T)

    def _keep_side(self, box: Box, axis: int, side: Labels) -> None:
        positions = np.flatnonzero(side >= 0).astype(np.int32)
        if box[axis].stop < self._shape[axis] and len(positions):
            start = [part.start for part in box]
            start[axis] = box[axis].stop
            self._sides[axis, start[0], start[1], start[2]] = (positions, side[positions])

    def settle(self) -> int:
        """Settle which pieces are fill, and return the voxels of their regions."""
        self._filled, voxels = self._regions.fill()
        return voxels

    def _filled_pieces(self, box: Box) -> Labels:
        """Return which of the pieces of a box are fill, counted from 0."""
        first, count = self._pieces.get((box[0].start, box[1].start, box[2].start), (0, 0))
        low, high = np.searchsorted(self._filled, [first, first + count])
        return self._filled[low:high] - first

    def reaches(self, box: Box) -> bool:
        """Return whether any piece in a box is fill."""
        return len(self._filled_pieces(box)) > 0

    def fill(self, box: Box, voxels: Bools) -> Bools:
        """Return which voxels of a box belong to pieces that are fill; `voxels` as they were taken."""
        labels, _, outer = _outer_pieces(voxels)
        filled = np.zeros_like(outer)
        filled[np.flatnonzero(outer)[self._filled_pieces(box)]] = True
        return filled[labels]


def _outer_pieces(voxels: Bools) -> tuple[npt.NDArray[np.int32], int, Bools]:
    """Return the pieces of a box as labels from 1, how many there are, and which touch a side of it."""
    labels, count = ndimage.label(voxels)
    outer = np.zeros(count + 1, np.bool_)
    for axis in range(3):
        for at in (0, -1):
            outer[np.take(labels, at, axis=axis)] = True
    outer[0] = False
    return labels, count, outer


def _boxes(
    read: Callable[[Box], Floats], shape: Shape, wanted: Callable[[Box], bool] = lambda _: True
) -> Iterator[tuple[Box, Floats]]:
    """Yield each wanted box of the lattice and its voxels with a halo of three, tile by tile."""

    def read_padded(tile: Box) -> Floats:
        z, y, x = (
            slice(max(0, side.start - _HALO), min(n, side.stop + _HALO))
            for side, n in zip(tile, shape, strict=True)
        )
        ends = [
            (_HALO - (side.start - got.start), _HALO - (got.stop - side.stop))
            for side, got in zip(tile, (z, y, x), strict=True)
        ]
        near = [(min(low, _BEYOND), min(high, _BEYOND)) for low, high in ends]
        far = [(low - min(low, _BEYOND), high - min(high, _BEYOND)) for low, high in ends]
        return np.pad(np.pad(read((z, y, x)), near, mode="edge"), far, constant_values=np.nan)

    tiles = [(tile, list(filter(wanted, cut(tile, (BOX, BOX, BOX))))) for tile in cut(whole(shape), _TILE)]
    tiles = [(tile, boxes) for tile, boxes in tiles if boxes]
    read_tiles = prefetch(read_padded, [tile for tile, _ in tiles])
    for (tile, padded), (_, boxes) in zip(read_tiles, tiles, strict=True):
        for box in boxes:
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
