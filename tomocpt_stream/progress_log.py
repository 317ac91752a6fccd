"""Progress where nobody watches a terminal: a line in the log now and then, none for a short run."""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING

from tomocpt_stream.rates import Courses, duration, megabytes, pace, together, worker_rates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tomocpt_stream.progress import Tally, WorkerProgress
    from tomocpt_stream.rates import Course, WorkerRate

_LOGGER = logging.getLogger("tomocpt_stream")


def log_progress(
    tomogram: str = "", *, every: float = 30.0, clock: Callable[[], float] = time.monotonic
) -> WorkerProgress:
    """Return a progress that writes to the logger "tomocpt_stream" at level INFO.

    A stage gets a line when it has taken `every` seconds, again after as many, and one at its end; a
    stage that is done sooner gets none. `tomogram` is the name that the lines carry, `clock` returns
    seconds. The program says where the log goes, for instance by `logging.basicConfig(level="INFO")`.
    """
    return _Log(tomogram, every, clock)


class _Log:
    """Writes a line where the last one of the stage is `every` seconds old."""

    def __init__(self, tomogram: str, every: float, clock: Callable[[], float]) -> None:
        self._tomogram, self._every = tomogram, every
        self._courses = Courses(clock)
        self._due: dict[str, tuple[Course, float]] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take note of a stage."""
        self._consider(self._courses.note(stage, done, total))

    def workers(self, stage: str, tallies: Sequence[Tally]) -> None:
        """Take note of the workers in a stage."""
        course = self._courses.tell(stage, tallies)
        if course is not None:
            self._consider(course)

    def _consider(self, course: Course) -> None:
        known, due = self._due.get(course.stage, (None, 0.0))
        if known is not course:
            due = course.began + self._every
        if course.finished:
            late = due < math.inf and course.seconds >= self._every
            due = math.inf
        else:
            late = course.heard >= due
            due = course.heard + self._every if late else due
        self._due[course.stage] = (course, due)
        if late:
            _LOGGER.info("%s", log_line(course, self._tomogram))


def log_line(course: Course, tomogram: str = "") -> str:
    """Return how far a stage is and what its workers do, in one line."""
    if course.finished:
        parts = [f"done in {duration(course.seconds)}", course.pace]
    else:
        left = "" if course.left is None else f"{duration(course.left)} left"
        parts = [f"{100 * course.done / course.total:.1f} %", course.pace, left]
    texts = [", ".join(part for part in parts if part)]
    rates = worker_rates(course)
    if rates:
        whole = together(rates, "")
        number = f"{len(rates)} worker" + ("" if len(rates) == 1 else "s")
        done = f"{whole.jobs} task" + ("" if whole.jobs == 1 else "s")
        texts.append(", ".join([f"{done} done by {number}", *amounts(whole)]))
    return f"{course.stage} {tomogram}".rstrip() + ": " + "; ".join(texts)


def amounts(rate: WorkerRate) -> Iterator[str]:
    """Yield what workers do, without what their stage does not count."""
    if rate.windows:
        yield pace(rate.windows, 1.0, "windows")
    if rate.bytes_read:
        yield f"{megabytes(rate.bytes_read)} read"
    if rate.computing:
        yield f"computing {rate.computing:.0%} of the time"
