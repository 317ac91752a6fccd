"""What the windows of a task see: normalised voxels, reflected at the faces, row by row along z.

Every voxel is read once per task: the planes that two rows share stay. Which windows are left out is
decided from the window alone, never from the task: one whose voxels inside the volume are all
constant fill, or hold no voxel of the mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tomocpt_stream.blocks import box_of, reflect

if TYPE_CHECKING:
    import numpy.typing as npt

    from tomocpt_stream.blocks import BlockPlan, Index, Span, Task
    from tomocpt_stream.mask import Mask
    from tomocpt_stream.volume import Volume


def normalise(
    voxels: npt.NDArray[np.float32], percentiles: tuple[float, float, float]
) -> npt.NDArray[np.float32]:
    """Return clip((x - p50) / (p95 - p5), -3, 3) in float32, in place (paper equation 5, clipped)."""
    low, median, high = percentiles
    np.subtract(voxels, np.float32(median), out=voxels)
    np.divide(voxels, np.float32(high - low), out=voxels)
    return np.clip(voxels, np.float32(-3), np.float32(3), out=voxels)


class Rows:
    """The rows of windows of one task, one at a time: `advance(k)`, then `window(y, x)` of that row."""

    def __init__(
        self, volume: Volume, plan: BlockPlan, task: Task, *, negate: bool, mask: Mask | None = None
    ) -> None:
        self._volume, self._window, self._shape = volume, plan.window, plan.shape
        self._negate, self._mask = negate, mask
        self._seen_spans = [
            (plan.window.span(axis, first)[0], plan.window.span(axis, last - 1)[1])
            for axis, (first, last) in enumerate(task.window_spans)
        ]
        self._read_spans = task.read_spans
        _, (y0, y1), (x0, x1) = self._seen_spans
        self._voxels = np.empty((plan.window.shape[0], y1 - y0, x1 - x0), dtype=np.float32)
        self._row: int | None = None
        self._fill: npt.NDArray[np.bool_] | None = None
        self.bytes_read = 0

    def advance(self, row: int) -> None:
        """Load row `row` of windows (its lattice index along z)."""
        start, stop = self._window.span(0, row)
        shared = self._window.shape[0] - self._window.stride[0] if self._row == row - 1 else 0
        if shared:
            self._voxels[:shared] = self._voxels[-shared:].copy()
        self._load((start + shared, stop), self._voxels[shared:])
        self._row = row
        inside = self._clipped((row, 0, 0))[0]
        if self._volume.fill is not None:
            self._fill = np.asarray(self._volume.fill[box_of((inside, *self._read_spans[1:]))], dtype=bool)
        if self._mask is not None:
            self._mask.hold((inside, *self._read_spans[1:]))

    def window(self, y: int, x: int) -> npt.NDArray[np.float32]:
        """Return what window (y, x) of the row sees; a view of window shape."""
        low = (
            self._window.span(1, y)[0] - self._seen_spans[1][0],
            self._window.span(2, x)[0] - self._seen_spans[2][0],
        )
        _, height, width = self._window.shape
        return self._voxels[:, low[0] : low[0] + height, low[1] : low[1] + width]

    def is_left_out(self, y: int, x: int) -> bool:
        """Return whether window (y, x) of the row is all fill, or holds no voxel of the mask."""
        if self._row is None or (self._fill is None and self._mask is None):
            return False
        inside = self._clipped((self._row, y, x))
        if self._fill is not None:
            (y0, y1), (x0, x1) = (
                (a - zero, b - zero)
                for (a, b), (zero, _) in zip(inside[1:], self._read_spans[1:], strict=True)
            )
            if self._fill[:, y0:y1, x0:x1].all():
                return True
        return self._mask is not None and not self._mask.holds_any(inside)

    def _clipped(self, index: Index) -> tuple[Span, Span, Span]:
        """Return the voxels of the volume that a window covers."""
        z, y, x = (
            (max(0, start), min(stop, length))
            for (start, stop), length in zip(
                (self._window.span(axis, k) for axis, k in enumerate(index)), self._shape, strict=True
            )
        )
        return (z, y, x)

    def _load(self, planes: Span, target: npt.NDArray[np.float32]) -> None:
        """Read planes of the volume into `target`, normalised and reflected."""
        z, y, x = (
            reflect(start, stop, length)
            for (start, stop), length in zip((planes, *self._seen_spans[1:]), self._shape, strict=True)
        )
        spans = [(int(axis.min()), int(axis.max()) + 1) for axis in (z, y, x)]
        voxels = np.asarray(self._volume.array[box_of(tuple(spans))], dtype=np.float32)
        self.bytes_read += voxels.nbytes
        normalise(voxels, self._volume.percentiles)
        if self._negate:
            np.negative(voxels, out=voxels)
        z, y, x = (axis - low for axis, (low, _) in zip((z, y, x), spans, strict=True))
        section = np.ix_(y, x)
        for plane, source in enumerate(z):
            target[plane] = voxels[source][section]
