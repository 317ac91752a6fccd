"""What the windows of a task see: normalised voxels, reflected at the faces, row by row along z.

Every voxel is read once per task: the planes that two rows share stay. Which windows are left out is
decided from the window alone, never from the task: one whose voxels inside the volume are all
constant fill, or hold no voxel of the mask.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tomocpt_stream.blocks import box_of, reflect
from tomocpt_stream.tiles import CHUNK

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future
    from typing import Self

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


class _Row(NamedTuple):
    """The planes of a row of windows as they were read, normalised, and what is left out of them."""

    voxels: npt.NDArray[np.float32]
    planes: npt.NDArray[np.intp]  # for each plane that the row adds, which one read stands there
    fill: npt.NDArray[np.bool_] | None
    mask: npt.NDArray[np.bool_] | None


class Rows:
    """The rows of windows of one task, one after the other: iterate, and ask `window(y, x)` of each.

    Iterating gives the lattice indices of the rows along z. While a row is being worked on, a thread
    of its own reads what the next one adds: the first row from the start. That one comes in strips
    along y, and its first windows do not wait for the last strips. The planes read ahead are the only
    ones held twice. Use it in a `with` statement.
    """

    def __init__(
        self, volume: Volume, plan: BlockPlan, task: Task, *, negate: bool, mask: Mask | None = None
    ) -> None:
        self._volume, self._window, self._shape = volume, plan.window, plan.shape
        self._negate, self._mask_of = negate, mask
        self._first, self._last = task.window_spans[0]
        self._row = self._first - 1
        self._seen_spans = [
            (plan.window.span(axis, first)[0], plan.window.span(axis, last - 1)[1])
            for axis, (first, last) in enumerate(task.window_spans)
        ]
        self._read_spans = task.read_spans
        self._sources = [
            reflect(start, stop, length) - low
            for (start, stop), length, (low, _) in zip(
                self._seen_spans[1:], self._shape[1:], self._read_spans[1:], strict=True
            )
        ]
        (y0, y1), (x0, x1) = self._seen_spans[1:]
        self._voxels = np.empty((plan.window.shape[0], y1 - y0, x1 - x0), dtype=np.float32)
        self._fill: npt.NDArray[np.bool_] | None = None
        self._mask: npt.NDArray[np.bool_] | None = None
        self.bytes_read = 0
        self.waited = 0.0
        self._reader = ThreadPoolExecutor(1, "read ahead")
        self._ahead: Future[_Row] = self._reader.submit(self._read, self._first)
        self._strips = deque(
            (strip[1], self._reader.submit(self._lay_strip, strip)) for strip in _strips(*self._read_spans[1])
        )
        self._arrived = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.forget()

    def __iter__(self) -> Iterator[int]:
        while not self.is_last:
            self._advance()
            yield self._row

    @property
    def is_last(self) -> bool:
        """Whether nothing is left to be read."""
        return self._row == self._last - 1

    def _advance(self) -> None:
        """Take up the row that was read ahead, and begin to read the next one."""
        began = time.perf_counter()
        row = self._ahead.result()
        self.waited += time.perf_counter() - began
        self._row += 1
        self._take(row)
        del row, self._ahead  # what was read ahead is not held while the next planes are being read
        if not self.is_last:
            self._ahead = self._reader.submit(self._read, self._row + 1)

    def forget(self) -> None:
        """Let go of the voxels that are held; one that is being read is let go when it has been."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._strips.clear()
        self._voxels, self._fill, self._mask = np.empty((0, 0, 0), dtype=np.float32), None, None
        with suppress(AttributeError):
            del self._ahead

    def window(self, y: int, x: int) -> npt.NDArray[np.float32]:
        """Return what window (y, x) of the row sees; a view of window shape."""
        low = (
            self._window.span(1, y)[0] - self._seen_spans[1][0],
            self._window.span(2, x)[0] - self._seen_spans[2][0],
        )
        _, height, width = self._window.shape
        if self._strips:
            self._wait_for(int(self._sources[0][low[0] : low[0] + height].max()))
        return self._voxels[:, low[0] : low[0] + height, low[1] : low[1] + width]

    def is_left_out(self, y: int, x: int) -> bool:
        """Return whether window (y, x) of the row is all fill, or holds no voxel of the mask."""
        (y0, y1), (x0, x1) = (
            (a - zero, b - zero)
            for (a, b), (zero, _) in zip(
                self._clipped((self._row, y, x))[1:], self._read_spans[1:], strict=True
            )
        )
        if self._fill is not None and self._fill[:, y0:y1, x0:x1].all():
            return True
        return self._mask is not None and not self._mask[:, y0:y1, x0:x1].any()

    def _clipped(self, index: Index) -> tuple[Span, Span, Span]:
        """Return the voxels of the volume that a window covers."""
        z, y, x = (
            (max(0, start), min(stop, length))
            for (start, stop), length in zip(
                (self._window.span(axis, k) for axis, k in enumerate(index)), self._shape, strict=True
            )
        )
        return (z, y, x)

    def _shared(self, row: int) -> int:
        """Return how many planes a row shares with the one before it."""
        return self._window.shape[0] - self._window.stride[0] if row > self._first else 0

    def _planes(self, row: int) -> npt.NDArray[np.intp]:
        """Return the planes that a row adds to the one before it, reflected at the faces."""
        start, stop = self._window.span(0, row)
        return reflect(start + self._shared(row), stop, self._shape[0])

    def _lay_strip(self, y: Span) -> None:
        """Read a strip of the first row and lay its lines where they belong, reflected at the faces."""
        planes = self._planes(self._first)
        low, high = int(planes.min()), int(planes.max()) + 1
        voxels = self._normalised((low, high), (y, self._read_spans[2]))
        offset = y[0] - self._read_spans[1][0]
        lines = np.flatnonzero((self._sources[0] >= offset) & (self._sources[0] < offset + y[1] - y[0]))
        section = np.ix_(self._sources[0][lines] - offset, self._sources[1])
        for plane, source in enumerate(planes - low):
            self._voxels[plane, lines] = voxels[source][section]
        self.bytes_read += voxels.nbytes

    def _wait_for(self, line: int) -> None:
        """Return when the first row has arrived up to a line (y) of what the task reads."""
        began = time.perf_counter()
        while self._strips and self._arrived <= line:
            stop, strip = self._strips.popleft()
            strip.result()
            self._arrived = stop - self._read_spans[1][0]
        self.waited += time.perf_counter() - began

    def _normalised(self, z: Span, section: tuple[Span, Span]) -> npt.NDArray[np.float32]:
        """Return voxels of the volume as the network sees them."""
        voxels = np.asarray(self._volume.array[box_of((z, *section))], dtype=np.float32)
        normalise(voxels, self._volume.percentiles)
        return np.negative(voxels, out=voxels) if self._negate else voxels

    def _read(self, row: int) -> _Row:
        """Read the planes that a row adds to the one before it, and the marks of all its planes."""
        planes = self._planes(row)
        low, high = int(planes.min()), int(planes.max()) + 1
        section = (self._read_spans[1], self._read_spans[2])
        spans = (self._clipped((row, 0, 0))[0], *section)
        fill = self._volume.fill
        return _Row(
            self._normalised((low, high), section) if row > self._first else np.empty((0, 0, 0), np.float32),
            planes - low,
            None if fill is None else np.asarray(fill[box_of(spans)], dtype=bool),
            None if self._mask_of is None else self._mask_of.spanned(spans),
        )

    def _take(self, row: _Row) -> None:
        """Move up the planes that stay, and lay those read behind them, reflected at the faces."""
        self._fill, self._mask = row.fill, row.mask
        if self._row == self._first:
            return
        self._wait_for(self._read_spans[1][1])
        shared = self._shared(self._row)
        if shared:
            self._voxels[:shared] = self._voxels[-shared:].copy()
        section = np.ix_(*self._sources)
        for plane, source in enumerate(row.planes, start=shared):
            self._voxels[plane] = row.voxels[source][section]
        self.bytes_read += row.voxels.nbytes


def _strips(start: int, stop: int) -> Iterator[Span]:
    """Yield the strips along y in which the first row is read: of whole stored chunks."""
    while start < stop:
        end = min(stop, (start // CHUNK + 1) * CHUNK)
        yield start, end
        start = end
