"""Lay the scores of overlapping windows together so that every voxel has one answer.

Cropping keeps of each window the voxels it owns. Blending takes the mean of all windows that see a
voxel, weighted by a Hann or Gaussian bell over the window. A bell is a product of one factor per axis
and the lattice is a product of three axes, so the weights of all windows over a voxel sum to a product
of three sums: each factor is divided by its own axis' sum beforehand, in float64, and no volume of
weights is kept. A voxel's terms are added in the raster order of the lattice, whoever adds them.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from tomocpt_stream.blocks import CACHED_WEIGHTS, held_planes

if TYPE_CHECKING:
    import numpy.typing as npt

    from tomocpt_stream.blocks import BlockPlan, Index, Span, Stitch, Task, Window

# MONAI's importance map: sigma an eighth of the window, floored so that no voxel is without weight.
_GAUSSIAN_SIGMA, _GAUSSIAN_FLOOR = 0.125, 1e-3


def axis_weights(length: int, window: Window, axis: int, stitch: Stitch) -> npt.NDArray[np.float64]:
    """Return the share of each window in each voxel of an axis, shape (windows, window length).

    Row k holds the weights of the voxels of window k from its start on; the rows that cover a voxel
    of the volume sum to 1 there. Cropping has weight 1 on owned voxels and 0 elsewhere. The Hann bell
    is the symmetric one of two points more than the window, without its zero ends.
    """
    size, halo, stride = window.shape[axis], window.halo[axis], window.stride[axis]
    count = -(-length // stride)
    if stitch == "crop":
        bell = np.zeros(size)
        bell[halo : halo + stride] = 1.0
    elif stitch == "hann":
        bell = np.hanning(size + 2)[1:-1]
    else:
        distance = (np.arange(size) - (size - 1) / 2) / (_GAUSSIAN_SIGMA * size)
        bell = np.maximum(np.exp(-0.5 * distance**2), _GAUSSIAN_FLOOR)
    total = np.zeros((count - 1) * stride + size)
    for k in range(count):
        total[k * stride : k * stride + size] += bell
    rows = [bell / np.where(bell > 0, total[k * stride : k * stride + size], 1.0) for k in range(count)]
    return np.stack(rows)


class Stitcher:
    """The scores of one task while it streams along z: a stack of planes that moves up.

    Planes below `complete(k)` have all their terms once row k of windows has been added.
    """

    def __init__(self, plan: BlockPlan, task: Task) -> None:
        self._plan = plan
        self._window = plan.window
        self._last_row = task.window_spans[0][1] - 1
        self.known = task.known_spans
        _, (y0, y1), (x0, x1) = task.known_spans
        self._planes = np.zeros((held_planes(plan), y1 - y0, x1 - x0), dtype=np.float32)
        self._base = task.known_spans[0][0]
        self._weights = [axis_weights(n, plan.window, axis, plan.stitch) for axis, n in enumerate(plan.shape)]
        self._cache: OrderedDict[tuple[bytes, ...], npt.NDArray[np.float32]] = OrderedDict()
        self._rows: dict[Index, bool] = {}  # windows by lattice index: were they scored?
        self._skipped = False
        self._divided = self._base

    def add(self, index: Index, scores: npt.NDArray[np.float32]) -> None:
        """Add the scores of window `index`; windows come in raster order of the lattice."""
        self._rows[index] = True
        place, part = self._overlap(index)
        if self._plan.stitch == "crop":
            self._planes[place] = scores[part]
        else:
            self._planes[place] += scores[part] * self._weight(index)[part]

    def skip(self, index: Index) -> None:
        """Note that window `index` is not scored."""
        self._rows[index] = False
        self._skipped = True

    def complete(self, row: int) -> int:
        """Return the first plane that lacks a term after row `row` of windows (z) has been added."""
        if row == self._last_row:
            return self.known[0][1]
        stride, halo = self._window.stride[0], self._window.halo[0]
        return (row + 1) * stride - (0 if self._plan.stitch == "crop" else halo)

    def planes(self, z: Span, row: int) -> npt.NDArray[np.float32]:
        """Return finished scores of planes `z` over the task's known (y, x); a view."""
        self._divide(min(self.complete(row), self._base + len(self._planes)))
        return self._planes[z[0] - self._base : z[1] - self._base]

    def scored(self, box: tuple[Span, Span, Span]) -> npt.NDArray[np.bool_]:
        """Return where in a box at least one window was scored."""
        marks = np.zeros(tuple(stop - start for start, stop in box), dtype=bool)
        for index in self._touching(box, scored=True):
            marks[_cut(box, self._reach(index))[0]] = True
        return marks

    def release(self, z: int) -> None:
        """Forget the planes below `z`, and the windows that end there."""
        shift = z - self._base
        if shift <= 0:
            return
        kept = len(self._planes) - shift
        for start in range(0, kept, shift):  # as many at a time as do not overlap: none is copied twice
            stop = min(start + shift, kept)
            self._planes[start:stop] = self._planes[start + shift : stop + shift]
        self._planes[kept:] = 0
        self._base = z
        self._rows = {index: scored for index, scored in self._rows.items() if self._reach(index)[0][1] > z}

    def _divide(self, stop: int) -> None:
        """Divide finished planes by the weight that was scored, where a window was left out."""
        start, self._divided = self._divided, max(self._divided, stop)
        if not self._skipped or start >= stop or self._plan.stitch == "crop":
            return
        for y in _steps(self.known[1], self._window.stride[1]):
            for x in _steps(self.known[2], self._window.stride[2]):
                self._divide_tile(((start, stop), y, x))

    def _divide_tile(self, box: tuple[Span, Span, Span]) -> None:
        skipped = self._touching(box, scored=False)
        if not skipped:
            return
        touched = np.zeros(tuple(stop - start for start, stop in box), dtype=bool)
        for index in skipped:
            touched[_cut(box, self._reach(index))[0]] = True
        weight = np.zeros(touched.shape, dtype=np.float32)
        for index in self._touching(box, scored=True):
            place, part = _cut(box, self._reach(index))
            weight[place] += self._weight(index)[part]
        target = self._planes[self._inside(box)]
        np.divide(target, weight, out=target, where=touched & (weight > 0))

    def _touching(self, box: tuple[Span, Span, Span], *, scored: bool) -> list[Index]:
        """Return the windows (scored, or left out) that cover voxels of a box, in raster order."""
        return sorted(
            index
            for index, was_scored in self._rows.items()
            if was_scored is scored
            and all(a < d and c < b for (a, b), (c, d) in zip(box, self._reach(index), strict=True))
        )

    def _reach(self, index: Index) -> tuple[Span, Span, Span]:
        """Return the voxels that a window has a say in: its own when cropping, else all it sees."""
        if self._plan.stitch == "crop":
            z, y, x = ((k * s, (k + 1) * s) for k, s in zip(index, self._window.stride, strict=True))
        else:
            z, y, x = (self._window.span(axis, k) for axis, k in enumerate(index))
        return (z, y, x)

    def _overlap(self, index: Index) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Return where a window's known voxels lie in the held planes and in the window."""
        reach = self._reach(index)
        top = min(reach[0][1], self.known[0][1])
        if top > self._base + len(self._planes):
            raise AssertionError(
                f"window {index} reaches plane {top} of {self._base}+{len(self._planes)} held"
            )
        held = ((max(self._base, self.known[0][0]), top), self.known[1], self.known[2])
        place, part = _cut(held, reach)
        offset = self._window.halo if self._plan.stitch == "crop" else (0, 0, 0)
        seen = (slice(cut.start + o, cut.stop + o) for cut, o in zip(part, offset, strict=True))
        return self._inside(held, place), tuple(seen)

    def _inside(
        self, box: tuple[Span, Span, Span], part: tuple[slice, ...] | None = None
    ) -> tuple[slice, ...]:
        """Return the slices of the held planes for a box in volume voxels, or for a part of it."""
        origin = (self._base, self.known[1][0], self.known[2][0])
        part = part or tuple(slice(0, stop - start) for start, stop in box)
        return tuple(
            slice(start - zero + cut.start, start - zero + cut.stop)
            for (start, _), zero, cut in zip(box, origin, part, strict=True)
        )

    def _weight(self, index: Index) -> npt.NDArray[np.float32]:
        """Return the weights of a window, float32 of window shape; equal ones are kept."""
        z, y, x = (self._weights[axis][k] for axis, k in enumerate(index))
        key = (z.tobytes(), y.tobytes(), x.tobytes())
        if key in self._cache:
            self._cache.move_to_end(key)
        else:
            if len(self._cache) >= CACHED_WEIGHTS:
                self._cache.popitem(last=False)
            product = z[:, None, None] * y[None, :, None] * x[None, None, :]
            self._cache[key] = product.astype(np.float32)
        return self._cache[key]


def _cut(box: tuple[Span, ...], spans: tuple[Span, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return the overlap of a box and a window: as slices of the box and as slices of the window."""
    place, part = [], []
    for (start, stop), (first, last) in zip(box, spans, strict=True):
        low, high = max(start, first), min(stop, last)
        high = max(low, high)
        place.append(slice(low - start, high - start))
        part.append(slice(low - first, high - first))
    return tuple(place), tuple(part)


def _steps(span: Span, step: int) -> list[Span]:
    """Return a span in steps."""
    return [(start, min(start + step, span[1])) for start in range(span[0], span[1], step)]
