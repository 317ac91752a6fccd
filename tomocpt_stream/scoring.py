"""One task: read rows of windows, score them in batches, stitch, and store whole chunks of the map.

A pure function of the task and of addresses. Running it again leaves the same bytes: a chunk's scores
follow from the lattice alone, its receipt is put after its data, and the first receipt stays.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import wait
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tomocpt_stream.blocks import NEIGHBOURHOOD, box_of, spans_of
from tomocpt_stream.circumstances import circumstances
from tomocpt_stream.duplicates import compare, sha256
from tomocpt_stream.peaks import CANDIDATE, MAX_CANDIDATES, REACH, flood, scan_block
from tomocpt_stream.receipts import Receipts, write_bytes
from tomocpt_stream.scan import Scoring, Sweep, value_range

if TYPE_CHECKING:
    from concurrent.futures import Future
    from typing import Self

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
    whole = task.window_count
    if todo is None:
        report({"done": whole})
        return 0
    spared = whole - todo.window_count
    voxels = math.prod(work.plan.shape) / work.plan.windows
    with _Layers(todo, work, done) as layers, Sweep(todo, work) as under_way:

        def tell() -> None:
            numbers = under_way.numbers() | {"done": spared + under_way.passed}
            numbers["voxels"] = numbers["windows"] * voxels
            report(numbers | {"seconds": time.perf_counter() - began})

        for row in under_way.rows(tell):
            if layers.is_due(row, under_way.stitcher):
                under_way.flush()
                layers.finish(row, under_way.stitcher)
            tell()
    return layers.candidates


def _what_is_left(task: Task, work: Work, done: frozenset[str]) -> Task | None:
    """Return the task confined to the layers that still lack a chunk; None where none does."""
    missing = [box[0] for key, box in work.plan.chunks_of(task.write_spans) if key not in done]
    if not missing:
        return None
    span = (min(int(z.start) for z in missing), max(int(z.stop) for z in missing))
    return task if span == task.write_spans[0] else work.plan.task_over(task, span)


class _Block(NamedTuple):
    """A layer of chunks and the planes that its peaks look at; `origin` is the voxel where it starts.

    `scored` says where in the layer a window was scored; None where every voxel was.
    """

    scores: npt.NDArray[np.float32]
    origin: Index
    layer: Span
    scored: npt.NDArray[np.bool_] | None


class _Layers:
    """The layers of chunks of a task, finished one after the other as rows of windows complete them.

    A layer is copied and stored by the process' writer, while the task goes on; where the task is at
    its end, while the next one begins. Leaving the context waits for the last one.
    """

    def __init__(self, task: Task, work: Work, done: frozenset[str]) -> None:
        self._task, self._work, self._done = task, work, done
        step, (start, stop) = work.plan.chunk[0], task.write_spans[0]
        self._left = [(z, min(z + step, stop)) for z in range(start, stop, step)]
        self._stored: Future[None] | None = None
        self.candidates = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._stored is not None:
            wait([self._stored])
            if kind is None:
                self._stored.result()

    def is_due(self, row: int, stitcher: Stitcher) -> bool:
        """Return whether the next layer's planes, and those its peaks look at, are complete."""
        if not self._left:
            return False
        needed = min(self._left[0][1] + REACH, self._task.known_spans[0][1])
        return stitcher.complete(row) >= needed

    def finish(self, row: int, stitcher: Stitcher) -> None:
        """Hand every layer that is due to the writer: chunks, then their candidates, then receipts."""
        turns = self._work.turns
        while self.is_due(row, stitcher):
            turns.storing.acquire()  # one layer at a time, of whichever task
            try:
                if self._stored is not None:
                    self._stored.result()
                layer = self._left.pop(0)
                known = self._task.known_spans
                z = (max(layer[0] - REACH, known[0][0]), min(layer[1] + REACH, known[0][1]))
                block = _Block(stitcher.planes(z, row).copy(), (z[0], known[1][0], known[2][0]), layer, None)
                if self._work.marks is not None:
                    section = self._task.write_spans[1:]
                    block = block._replace(scored=stitcher.scored((layer, *section)))
                stitcher.release(layer[1] - NEIGHBOURHOOD)
                self._stored = turns.writer.submit(self._store_layer, block)
            except BaseException:
                turns.storing.release()
                raise

    def _store_layer(self, block: _Block) -> None:
        try:
            for key, box in self._work.plan.chunks_of((block.layer, *self._task.write_spans[1:])):
                if key not in self._done:
                    self._store(key, spans_of(box), block)
        finally:
            self._work.turns.storing.release()

    def _marks(self, chunk: tuple[Span, Span, Span], block: _Block) -> npt.NDArray[np.uint8] | None:
        """Return the marks of a chunk; None where every voxel is scored and allowed."""
        if block.scored is None:
            return None
        corner = (block.layer[0], self._task.write_spans[1][0], self._task.write_spans[2][0])
        z, y, x = (slice(a - zero, b - zero) for (a, b), zero in zip(chunk, corner, strict=True))
        marks = block.scored[z, y, x] * np.uint8(SCORED)
        if self._work.mask is None:
            marks |= np.uint8(ALLOWED)
        else:
            marks |= self._work.mask.inside(chunk) * np.uint8(ALLOWED)
        return marks

    def _store(self, key: str, chunk: tuple[Span, Span, Span], block: _Block) -> None:
        """Store a chunk, its marks and its candidates, then its receipt; the first receipt stays."""
        work = self._work
        inside = tuple(slice(a - zero, b - zero) for (a, b), zero in zip(chunk, block.origin, strict=True))
        scores = np.ascontiguousarray(block.scores[inside])
        low, high = value_range(scores, chunk, work)
        marks = self._marks(chunk, block)
        around, corner = _around(block.scores, block.origin, chunk)
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
