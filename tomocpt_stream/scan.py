"""The windows of one task: read row by row, scored in batches, stitched.

What becomes of the scores is the caller's: a task of a stored map, or one chunk of a lazy one.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tomocpt_stream.blocks import box_of
from tomocpt_stream.errors import SourceError
from tomocpt_stream.stitch import Stitcher
from tomocpt_stream.windows import Rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Executor, Future
    from typing import Self

    import numpy.typing as npt

    from tomocpt_stream.blocks import BlockPlan, Index, Span, Task
    from tomocpt_stream.mask import Mask
    from tomocpt_stream.volume import Volume


class Turns:
    """Who may read ahead, compute and store, among the tasks that one process runs at a time.

    One task computes; one other reads its first row meanwhile, and waits with nothing else in memory.
    The reader's turn ends when its last row is read, so that only one task at a time reads ahead. The
    picker runs on a thread of its own, so that its device never waits while scores are laid together;
    finished layers are stored by another one, and only one of them is held at a time.
    """

    def __init__(self) -> None:
        self.reading = threading.Lock()
        self.computing = threading.Lock()
        self.storing = threading.Lock()
        self.device = ThreadPoolExecutor(1, "score")
        self.writer = ThreadPoolExecutor(1, "store")

    def close(self) -> None:
        """End the threads; no task may be under way."""
        self.device.shutdown()
        self.writer.shutdown()


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What every window of one map is read from and scored with, wherever the scores go.

    `negate` says that protein looks the other way round than the picker was trained on.
    """

    volume: Volume
    picker: Any
    plan: BlockPlan
    negate: bool
    mask: Mask | None = None
    turns: Turns = field(default_factory=Turns)


class Batches:
    """Windows collected to batches of one fixed size; the last one is padded with zeros.

    The size of a batch is part of the numerics: the same window scored in another batch size may
    differ in its last bits, in another place of a batch it does not. While one batch is scored on the
    `device` thread, the one before it is delivered and the next one is collected.
    """

    def __init__(
        self,
        picker: Any,
        plan: BlockPlan,
        deliver: Callable[[Index, npt.NDArray[np.float32]], None],
        device: Executor,
    ) -> None:
        self._picker, self._tta, self._deliver, self._device = picker, plan.tta, deliver, device
        size = (plan.batch_size, *plan.window.shape)
        self._voxels, self._other = np.zeros(size, dtype=np.float32), np.zeros(size, dtype=np.float32)
        self._indices: list[Index] = []
        self._sent: tuple[list[Index], Future[npt.NDArray[np.float32]]] | None = None
        self.windows = 0
        self.seconds = 0.0

    def push(self, index: Index, voxels: npt.NDArray[np.float32]) -> None:
        """Take a copy of what window `index` sees; send the batch when it is full."""
        self._voxels[len(self._indices)] = voxels
        self._indices.append(index)
        if len(self._indices) == len(self._voxels):
            self._send()

    def flush(self) -> None:
        """Score the windows collected so far and deliver all that are left, in the order they came."""
        if self._indices:
            self._send()
        self._collect()

    def _send(self) -> None:
        self._voxels[len(self._indices) :] = 0
        sent = self._indices, self._device.submit(self._answer, self._voxels)
        self._collect()  # the batch before: its buffer is free when it has been delivered
        self._sent, self._indices = sent, []
        self._voxels, self._other = self._other, self._voxels

    def _collect(self) -> None:
        if self._sent is None:
            return
        indices, answer = self._sent
        self._sent = None
        for index, window in zip(indices, answer.result(), strict=False):
            self._deliver(index, window)
        self.windows += len(indices)

    def _answer(self, voxels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        began = time.perf_counter()
        scores = self._score_views(voxels) if self._tta else self._score(voxels)
        self.seconds += time.perf_counter() - began
        return scores

    def _score_views(self, voxels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the mean over the identity and a flip of each axis."""
        total = self._score(voxels.copy()).copy()  # a picker may write to what it is given
        for axis in (1, 2, 3):
            flipped = np.ascontiguousarray(np.flip(voxels, axis))
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


class Sweep:
    """The windows of one task on their way: read row by row, scored in batches, stitched.

    Use it in a `with` statement, within which the process' turns are held.
    """

    def __init__(self, task: Task, scoring: Scoring) -> None:
        self._task, self._scoring = task, scoring
        self._held = ExitStack()
        self.passed = 0

    def __enter__(self) -> Self:
        task, scoring = self._task, self._scoring
        with ExitStack() as held:
            self._reading = held.enter_context(_Turn(scoring.turns.reading))
            rows = Rows(scoring.volume, scoring.plan, task, negate=scoring.negate, mask=scoring.mask)
            self._rows = held.enter_context(rows)
            held.enter_context(_Turn(scoring.turns.computing))
            self.stitcher = Stitcher(scoring.plan, task)
            device = scoring.turns.device
            self._batches = Batches(scoring.picker, scoring.plan, self.stitcher.add, device)
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        # Nothing large outlives the turn: the next task has as much memory as this one had.
        self._rows.forget()
        del self.stitcher, self._batches
        self._held.close()

    def rows(self, tell: Callable[[], None] = lambda: None) -> Iterator[int]:
        """Yield each row when its windows have been read; the last ones may wait for a full batch.

        `tell` is called after each line of windows along x but the last of a row.
        """
        _, (first, last), columns = self._task.window_spans
        for row in self._rows:
            if self._rows.is_last:
                self._reading.end()
            for y in range(first, last):
                for x in range(*columns):
                    if self._rows.is_left_out(y, x):
                        self.stitcher.skip((row, y, x))
                    else:
                        self._batches.push((row, y, x), self._rows.window(y, x))
                    self.passed += 1
                if y < last - 1:
                    tell()
            yield row

    def flush(self) -> None:
        """Score the windows that wait for a full batch."""
        self._batches.flush()

    def numbers(self) -> dict[str, float]:
        """Return windows scored, bytes read, and the seconds that scoring and waiting for a read took."""
        return {
            "windows": self._batches.windows,
            "bytes_read": self._rows.bytes_read,
            "computing": self._batches.seconds,
            "waited": self._rows.waited,
        }


def score_chunk(task: Task, scoring: Scoring) -> npt.NDArray[np.float32]:
    """Return the scores of the write box of a task, bit for bit as `score_task` stores them.

    For a task that writes no more than one layer of chunks; nothing is stored, no peak is sought.
    """
    spans = task.write_spans
    with Sweep(task, scoring) as under_way:
        last = [*under_way.rows()][-1]
        under_way.flush()
        planes = under_way.stitcher.planes(spans[0], last)
        section = (
            slice(start - zero, stop - zero)
            for (start, stop), (zero, _) in zip(spans[1:], task.known_spans[1:], strict=True)
        )
        scores = planes[:, *section].copy()  # a view would hold all planes of the task
        value_range(scores, spans, scoring)
        return scores


def value_range(
    scores: npt.NDArray[np.float32], chunk: tuple[Span, Span, Span], scoring: Scoring
) -> tuple[float, float]:
    """Return the least and the greatest score of a chunk; SourceError where one is not a number."""
    low, high = float(scores.min()), float(scores.max())
    if not np.isfinite((low, high)).all():
        raise SourceError(
            f"the picker's scores of {scoring.volume.name} in the chunk {box_of(chunk)} are not all numbers",
            expected="finite scores",
            remedy="check the picker on a smaller volume",
        )
    return low, high


class _Turn:
    """A lock held for a while; it may be given back before the `with` statement ends."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._held = False

    def __enter__(self) -> Self:
        self._held = self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Give the lock back."""
        if self._held:
            self._held = False
            self._lock.release()
