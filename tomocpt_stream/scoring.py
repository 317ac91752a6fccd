"""One task: read rows of windows, score them in batches, stitch, and store whole chunks of the map.

A pure function of the task and of addresses. Running it again leaves the same bytes: a chunk's scores
follow from the lattice alone, its receipt is put after its data, and the first receipt stays.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from tomocpt_stream.blocks import NEIGHBOURHOOD, box_of, spans_of
from tomocpt_stream.circumstances import circumstances
from tomocpt_stream.duplicates import compare, sha256
from tomocpt_stream.peaks import CANDIDATE, MAX_CANDIDATES, REACH, flood, scan_block
from tomocpt_stream.receipts import Receipts, write_bytes
from tomocpt_stream.sweep import Scoring, Sweep, value_range

if TYPE_CHECKING:
    import numpy.typing as npt
    import zarr

    from tomocpt_stream.blocks import Index, Span, Task
    from tomocpt_stream.stages import Report
    from tomocpt_stream.stitch import Stitcher

SCORED, ALLOWED = 1, 2  # bits of the map's marks: a window was scored there; a pick may lie there

RECEIPTS = "heatmap"


@dataclass(frozen=True, kw_only=True)
class Work(Scoring):
    """What every task of one stored map shares.

    `scores` and `marks` are the stored arrays (marks: None where every voxel is scored and allowed),
    `floor` is the score above which a task keeps candidates, `config` the hash of all that the map
    depends on.
    """

    scores: zarr.Array[Any]
    marks: zarr.Array[Any] | None
    floor: float
    config: str

    @cached_property
    def receipts(self) -> Receipts:
        """The receipts of the map's chunks."""
        return Receipts(self.scores.store, RECEIPTS)


def score_task(task: Task, work: Work, report: Report) -> int:
    """Score a task and store its chunks; return how many candidates it found.

    Chunks that have a receipt are not written again; a task all of whose chunks have one scores
    nothing. `report` is called after each row of windows: "done" counts windows, those that need not
    be scored among them, "windows" those that were scored, "voxels" what they stand for in the volume.
    """
    began = time.perf_counter()
    keys = [key for key, _ in work.plan.chunks_of(task.write_spans)]
    done = frozenset(work.receipts.present(keys))
    todo = _what_is_left(task, work, done)
    whole = count(task.window_spans)
    if todo is None:
        report({"done": whole})
        return 0
    spared = whole - count(todo.window_spans)
    voxels = math.prod(work.plan.shape) / work.plan.windows
    with Sweep(todo, work) as under_way:
        layers = _Layers(todo, work, under_way.stitcher, done)

        def tell() -> None:
            numbers = under_way.numbers() | {"done": spared + under_way.passed}
            numbers["voxels"] = numbers["windows"] * voxels
            report(numbers | {"seconds": time.perf_counter() - began})

        for row in under_way.rows(tell):
            if layers.is_due(row):
                under_way.flush()
                layers.finish(row)
            tell()  # the last of a row counts when what the row completes is stored
        return layers.candidates


def count(spans: tuple[Span, Span, Span]) -> int:
    """Return the number of lattice points in a box of them."""
    return math.prod(last - first for first, last in spans)


def _what_is_left(task: Task, work: Work, done: frozenset[str]) -> Task | None:
    """Return the task confined to the layers that still lack a chunk; None where none does."""
    missing = [box[0] for key, box in work.plan.chunks_of(task.write_spans) if key not in done]
    if not missing:
        return None
    span = (min(int(z.start) for z in missing), max(int(z.stop) for z in missing))
    return task if span == task.write_spans[0] else work.plan.task_over(task, span)


class _Layers:
    """The layers of chunks of a task, finished one after the other as rows of windows complete them."""

    def __init__(self, task: Task, work: Work, stitcher: Stitcher, done: frozenset[str]) -> None:
        self._task, self._work, self._stitcher, self._done = task, work, stitcher, done
        step, (start, stop) = work.plan.chunk[0], task.write_spans[0]
        self._left = [(z, min(z + step, stop)) for z in range(start, stop, step)]
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
                if key not in self._done:
                    self._store(key, spans_of(box), block, origin)
            self._stitcher.release(layer[1] - NEIGHBOURHOOD)

    def _marks(self, chunk: tuple[Span, Span, Span]) -> npt.NDArray[np.uint8] | None:
        """Return the marks of a chunk; None where every voxel is scored and allowed."""
        if self._work.marks is None:
            return None
        marks = self._stitcher.scored(chunk) * np.uint8(SCORED)
        if self._work.mask is None:
            marks |= np.uint8(ALLOWED)
        else:
            marks |= self._work.mask.inside(chunk) * np.uint8(ALLOWED)
        return marks

    def _store(
        self, key: str, chunk: tuple[Span, Span, Span], block: npt.NDArray[np.float32], origin: Index
    ) -> None:
        """Store a chunk, its marks and its candidates, then its receipt; the first receipt stays."""
        work = self._work
        inside = tuple(slice(a - zero, b - zero) for (a, b), zero in zip(chunk, origin, strict=True))
        scores = np.ascontiguousarray(block[inside])
        low, high = value_range(scores, chunk, work)
        marks = self._marks(chunk)
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
        # The table goes with the settled box, which goes with the task: another task's has another name.
        digest = sha256(found)
        receipt: dict[str, Any] = {
            "config": work.config,
            "sha256": sha256(scores),
            "marks_sha256": None if marks is None else sha256(marks),
            "table": f"candidates/{key}-{digest[:16]}",
            "candidates_sha256": digest,
            "minimum": low,
            "maximum": high,
            "scored": scores.size if marks is None else int(np.count_nonzero(marks & SCORED)),
            "candidates": len(found),
            "constant": constant,
            "plateau": _plateau(marks, chunk, settled) if constant and high > work.floor else 0,
            "chunk": chunk,
            "settled": settled,
            "write": self._task.write_spans,
            "device": str(getattr(work.picker, "device", "cpu")),
            **circumstances(),
        }
        first = work.receipts.get(key)
        if first is None:
            work.scores[box_of(chunk)] = scores
            if work.marks is not None and marks is not None:
                work.marks[box_of(chunk)] = marks
            write_bytes(work.scores.store, receipt["table"], found.tobytes())
            first = work.receipts.put(key, receipt)
        compare(work.scores, key, scores, first, receipt)


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
