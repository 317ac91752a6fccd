"""Run the jobs of a stage on a few threads of the calling process."""

from __future__ import annotations

import queue
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from tomocpt_stream.progress import Tally
from tomocpt_stream.stages import Attempts

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping

    from tomocpt_stream.stages import Job, Stage

T = TypeVar("T")

THREADS = 2


def run_in_threads(
    stage: Stage[T],
    jobs: Iterable[Job],
    watch: Callable[[list[Tally]], None] = lambda _: None,
) -> Generator[tuple[Job, Any], None, None]:
    """Yield each job with its answer as it is finished; two run at once.

    Failures are dealt with as `dispatch.run_jobs` does. `watch` is called in the caller's thread. Where
    an error or the caller ends the run, the jobs under way end at their next report.
    """
    run = _Run(stage, watch)
    with ThreadPoolExecutor(THREADS, stage.name) as pool:
        try:
            # One job more than there are threads, so that none of these waits for the caller.
            yield from run.answers(iter(jobs), pool, THREADS + 1)
        finally:
            run.stop.set()


class _Stopped(BaseException):
    """Ends a job whose answer nobody waits for any more."""


class _Run:
    """The jobs of one stage on threads: how many are under way, which wait for another try."""

    def __init__(self, stage: Stage[Any], watch: Callable[[list[Tally]], None]) -> None:
        self.stop = threading.Event()
        self._stage, self._watch = stage, watch
        self._opened = stage.address.open()
        self._attempts, self._tally = Attempts(stage), Tally("this process")
        self._again: deque[Job] = deque()
        self._under_way = 0
        # Job, what it is ("numbers", "answer" or "error"), and that.
        self._events: queue.SimpleQueue[tuple[Job, str, Any]] = queue.SimpleQueue()

    def answers(self, ahead: Iterator[Job], pool: ThreadPoolExecutor, most: int) -> Iterator[tuple[Job, Any]]:
        """Yield each job with its answer, `most` of them under way."""
        while True:
            while self._under_way < most and (job := self._following(ahead)) is not None:
                pool.submit(self._perform, job)
                self._under_way += 1
            if not self._under_way:
                break
            job, kind, found = self._events.get()
            if kind == "numbers":
                self._tally.running[job.label] = {**self._tally.running.get(job.label, {}), **found}
                self._watch([self._tally])
                continue
            self._under_way -= 1
            if kind == "error":
                self._fail(job, found)
                continue
            self._attempts.succeeded(job)
            self._tally.finish(job.label)
            self._watch([self._tally])
            yield job, found
        self._attempts.settle()

    def _following(self, ahead: Iterator[Job]) -> Job | None:
        job = next(ahead, None)
        return self._again.popleft() if job is None and self._again else job

    def _perform(self, job: Job) -> None:
        def report(numbers: Mapping[str, float]) -> None:
            if self.stop.is_set():
                raise _Stopped
            self._events.put((job, "numbers", dict(numbers)))

        try:
            self._attempts.wait(job)
            if not self.stop.is_set():
                answer = self._stage.function(job.payload, self._opened, report)
                self._events.put((job, "answer", answer))
        except BaseException as error:
            self._events.put((job, "error", error))

    def _fail(self, job: Job, error: BaseException) -> None:
        self._tally.running.pop(job.label, None)
        if not isinstance(error, Exception):
            raise error
        if self._attempts.failed(job, error):
            self._again.append(job)
