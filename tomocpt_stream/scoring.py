"""One task: read rows of windows, score them in batches, stitch, and store whole chunks of the map.

A pure function of the task and of addresses. Running it again leaves the same bytes: a chunk's scores
follow from the lattice alone, its receipt is put after its data, and the first receipt stays.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tomocpt_stream.blocks import NEIGHBOURHOOD, box_of, spans_of
from tomocpt_stream.errors import SourceError
from tomocpt_stream.peaks import CANDIDATE, MAX_CANDIDATES, REACH, flood, scan_block
from tomocpt_stream.receipts import Receipts, write_bytes
from tomocpt_stream.stitch import Stitcher
from tomocpt_stream.windows import Rows

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt
    import zarr

    from tomocpt_stream.blocks import BlockPlan, Index, Span, Task
    from tomocpt_stream.mask import Mask
    from tomocpt_stream.volume import Volume

SCORED, ALLOWED = 1, 2  # bits of the map's marks: a window was scored there; a pick may lie there

RECEIPTS = "heatmap"


@dataclass(frozen=True)
class Work:
    """What every task of one map shares.

    `scores` and `marks` are the stored arrays (marks: None where every voxel is scored and allowed),
    `floor` is the score above which a task keeps candidates.
    """

    volume: Volume
    picker: Any
    plan: BlockPlan
    scores: zarr.Array[Any]
    marks: zarr.Array[Any] | None
    floor: float
    negate: bool
    mask: Mask | None = None
    done: frozenset[str] = field(default_factory=frozenset)


class Batches:
    """Windows collected to batches of one fixed size; the last one is padded with zeros.

    The size of a batch is part of the numerics: the same window scored in another batch size may
    differ in its last bits, in another place of a batch it does not.
    """

    def __init__(
        self, picker: Any, plan: BlockPlan, deliver: Callable[[Index, npt.NDArray[np.float32]], None]
    ) -> None:
        self._picker, self._tta, self._deliver = picker, plan.tta, deliver
        self._voxels = np.zeros((plan.batch_size, *plan.window.shape), dtype=np.float32)
        self._indices: list[Index] = []
        self.seconds = 0.0

    def push(self, index: Index, voxels: npt.NDArray[np.float32]) -> None:
        """Take a copy of what window `index` sees; score when the batch is full."""
        self._voxels[len(self._indices)] = voxels
        self._indices.append(index)
        if len(self._indices) == len(self._voxels):
            self.flush()

    def flush(self) -> None:
        """Score the windows collected so far and deliver them in the order they came."""
        if not self._indices:
            return
        self._voxels[len(self._indices) :] = 0
        started = time.perf_counter()
        scores = self._score_views() if self._tta else self._score(self._voxels)
        self.seconds += time.perf_counter() - started
        for index, window in zip(self._indices, scores, strict=False):
            self._deliver(index, window)
        self._indices.clear()

    def _score_views(self) -> npt.NDArray[np.float32]:
        """Return the mean over the identity and a flip of each axis."""
        total = self._score(self._voxels.copy()).copy()  # a picker may write to what it is given
        for axis in (1, 2, 3):
            flipped = np.ascontiguousarray(np.flip(self._voxels, axis))
            total += np.flip(self._score(flipped), axis)
        total *= np.float32(0.25)
        return total

    def _score(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        scores = np.asarray(self._picker.score(batch), dtype=np.float32)
        if scores.shape != batch.shape:
            raise SourceError(
                f"the picker returned scores of shape {scores.shape} for a batch of {batch.shape}",
                expected="one score for each voxel of each window",
                remedy="mend the picker's score method",
            )
        return scores


def score_task(task: Task, work: Work, report: Callable[[int], None]) -> dict[str, Any]:
    """Score a task and store its chunks; return what it did (windows, bytes read, seconds).

    `report` is called with the number of windows finished since the last call. Chunks in `work.done`
    are not written again; a task all of whose chunks are done scores nothing.
    """
    started = time.perf_counter()
    todo = _what_is_left(task, work)
    stats: dict[str, Any] = {
        "task": task.index,
        "windows": 0,
        "bytes_read": 0,
        "seconds": 0.0,
        "forward": 0.0,
        "candidates": 0,
    }
    if todo is None:
        report(len(task.windows))
        return stats
    report(len(task.windows) - len(todo.windows))
    rows = Rows(work.volume, work.plan, todo, negate=work.negate, mask=work.mask)
    stitcher = Stitcher(work.plan, todo)
    batches = Batches(work.picker, work.plan, stitcher.add)
    layers = _Layers(todo, work, stitcher)
    (first, last), ys, xs = todo.window_spans
    for row in range(first, last):
        rows.advance(row)
        for y in range(*ys):
            for x in range(*xs):
                if rows.is_left_out(y, x):
                    stitcher.skip((row, y, x))
                else:
                    batches.push((row, y, x), rows.window(y, x))
                    stats["windows"] += 1
            if y < ys[1] - 1:
                report(xs[1] - xs[0])
        if layers.is_due(row):
            batches.flush()
            layers.finish(row)
            stats["candidates"] = layers.candidates
        report(xs[1] - xs[0])  # the last of a row count when what the row completes is stored
    stats |= {
        "bytes_read": rows.bytes_read,
        "seconds": time.perf_counter() - started,
        "forward": batches.seconds,
    }
    return stats


def _what_is_left(task: Task, work: Work) -> Task | None:
    """Return the task confined to the layers that still lack a chunk; None where none does."""
    missing = [box[0] for key, box in work.plan.chunks_of(task.write_spans) if key not in work.done]
    if not missing:
        return None
    span = (min(int(z.start) for z in missing), max(int(z.stop) for z in missing))
    return task if span == task.write_spans[0] else work.plan.task_over(task, span)


class _Layers:
    """The layers of chunks of a task, finished one after the other as rows of windows complete them."""

    def __init__(self, task: Task, work: Work, stitcher: Stitcher) -> None:
        self._task, self._work, self._stitcher = task, work, stitcher
        step, (start, stop) = work.plan.chunk[0], task.write_spans[0]
        self._left = [(z, min(z + step, stop)) for z in range(start, stop, step)]
        self._receipts = Receipts(work.scores.store, RECEIPTS)
        self.candidates = 0

    def is_due(self, row: int) -> bool:
        """Return whether the next layer's planes, and those its peaks look at, are complete."""
        if not self._left:
            return False
        needed = min(self._left[0][1] + REACH, self._task.known_spans[0][1])
        return self._stitcher.complete(row) >= needed

    def finish(self, row: int) -> None:
        """Store every layer that is due: its chunks, then their candidates, then their receipts."""
        while self.is_due(row):
            layer = self._left.pop(0)
            known = self._task.known_spans
            z = (max(layer[0] - REACH, known[0][0]), min(layer[1] + REACH, known[0][1]))
            block = self._stitcher.planes(z, row)
            origin = (z[0], known[1][0], known[2][0])
            for key, box in self._work.plan.chunks_of((layer, *self._task.write_spans[1:])):
                if key not in self._work.done:
                    self._store(key, spans_of(box), block, origin)
            self._stitcher.release(layer[1] - NEIGHBOURHOOD)

    def _mark(self, chunk: tuple[Span, Span, Span]) -> npt.NDArray[np.uint8] | None:
        """Store and return the marks of a chunk; None where every voxel is scored and allowed."""
        if self._work.marks is None:
            return None
        marks = self._stitcher.scored(chunk) * np.uint8(SCORED)
        if self._work.mask is None:
            marks |= np.uint8(ALLOWED)
        else:
            marks |= self._work.mask.inside(chunk) * np.uint8(ALLOWED)
        self._work.marks[box_of(chunk)] = marks
        return marks

    def _store(
        self, key: str, chunk: tuple[Span, Span, Span], block: npt.NDArray[np.float32], origin: Index
    ) -> None:
        work = self._work
        inside = tuple(slice(a - zero, b - zero) for (a, b), zero in zip(chunk, origin, strict=True))
        scores = np.ascontiguousarray(block[inside])
        low, high = float(scores.min()), float(scores.max())
        if not np.isfinite((low, high)).all():
            raise SourceError(
                f"the picker's scores of {work.volume.name} in the chunk {box_of(chunk)} are not all numbers",
                expected="finite scores",
                remedy="check the picker on a smaller volume",
            )
        work.scores[box_of(chunk)] = scores
        marks = self._mark(chunk)
        around, corner = _around(block, origin, chunk)
        settled = _settled(chunk, corner, around.shape, work.plan.shape)
        constant = bool(around.min() == around.max())
        found = np.zeros(0, dtype=CANDIDATE)
        if not constant:  # every voxel of a constant block is a candidate: they are found when asked for
            found = scan_block(
                around, corner, box_of(settled), work.plan.shape, work.floor, name=work.volume.name
            )
        if marks is not None:
            place = tuple(found[axis] - start for axis, (start, _) in zip("zyx", chunk, strict=True))
            found = found[marks[place] == SCORED | ALLOWED]
        self.candidates += len(found)
        if self.candidates > MAX_CANDIDATES:
            raise flood(work.volume.name, self.candidates)
        write_bytes(work.scores.store, f"candidates/{key}", found.tobytes())
        self._receipts.put(
            key,
            {
                "sha256": hashlib.sha256(scores.tobytes()).hexdigest(),
                "minimum": low,
                "maximum": high,
                "scored": scores.size if marks is None else int(np.count_nonzero(marks & SCORED)),
                "candidates": len(found),
                "constant": constant,
                "plateau": _plateau(marks, chunk, settled) if constant and high > work.floor else 0,
                "chunk": chunk,
                "settled": settled,
                "write": self._task.write_spans,
            },
        )


def _plateau(
    marks: npt.NDArray[np.uint8] | None, chunk: tuple[Span, Span, Span], settled: tuple[Span, Span, Span]
) -> int:
    """Return how many settled voxels of a chunk of one score may be picked: each is a candidate."""
    if marks is None:
        return math.prod(stop - start for start, stop in settled)
    inside = tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(settled, chunk, strict=True))
    return int(np.count_nonzero(marks[inside] == SCORED | ALLOWED))


def _around(
    block: npt.NDArray[np.float32], origin: Index, chunk: tuple[Span, Span, Span]
) -> tuple[npt.NDArray[np.float32], Index]:
    """Return the part of a block that the peaks of a chunk look at, and the voxel where it starts."""
    z, y, x = (
        (max(start - REACH, zero), min(stop + REACH, zero + size))
        for (start, stop), zero, size in zip(chunk, origin, block.shape, strict=True)
    )
    corner = (z[0], y[0], x[0])
    part = tuple(slice(a - zero, b - zero) for (a, b), zero in zip((z, y, x), origin, strict=True))
    return block[part], corner


def _settled(
    chunk: tuple[Span, Span, Span], origin: Index, extent: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[Span, Span, Span]:
    """Return the voxels of a chunk whose whole neighbourhood is in the block that a task holds."""
    spans = []
    for (start, stop), first, size, length in zip(chunk, origin, extent, shape, strict=True):
        low = start if first == 0 else max(start, first + REACH)
        high = stop if first + size == length else min(stop, first + size - REACH)
        spans.append((low, max(low, high)))
    z, y, x = spans
    return (z, y, x)
