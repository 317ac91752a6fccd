"""Run the jobs of a stage: in the calling process, or on the workers of a dask cluster.

A job that fails is tried again after the others; one that fails every time is named at the end, when
everything else is done.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

from tomocpt_stream.progress import Tally
from tomocpt_stream.stages import Attempts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from tomocpt_stream.stages import Job, Stage

T = TypeVar("T")


def run_jobs(
    stage: Stage[T],
    jobs: Iterable[Job],
    *,
    client: Any = None,
    watch: Callable[[list[Tally]], None] = lambda _: None,
) -> Iterator[tuple[Job, Any]]:
    """Yield each job with its answer as it is finished.

    Without `client` the jobs run one after the other in the calling process; with one they run on its
    workers, a few at a time on each, in any order. `watch` is called with the tallies of the workers
    whenever one of them has news.

    Raises
    ------
    PlanError, FloodError, DuplicateError
        As soon as a job raises one: trying again or going on cannot help.
    ActionableError
        At the end, in the class of its cause or as a JobError, where a job failed every time; the
        others are finished. Earlier where the first eight jobs fail and none has succeeded.
    """
    if client is None:
        return _run_here(stage, jobs, watch)
    from tomocpt_stream.submission import run_on_cluster

    return run_on_cluster(stage, jobs, client, watch)


def _run_here(
    stage: Stage[T], jobs: Iterable[Job], watch: Callable[[list[Tally]], None]
) -> Iterator[tuple[Job, Any]]:
    attempts, tally = Attempts(stage), Tally("this process")
    opened = stage.address.open()
    again: deque[Job] = deque()
    ahead = iter(jobs)

    def report(numbers: Mapping[str, float]) -> None:
        tally.running["job"] = {**tally.running.get("job", {}), **numbers}
        try:
            watch([tally])
        except Exception as error:
            raise _Stopped(error) from error

    while (job := next(ahead, None) or (again.popleft() if again else None)) is not None:
        attempts.wait(job)
        try:
            answer = stage.function(job.payload, opened, report)
        except _Stopped as stopped:
            raise stopped.why from stopped.why.__cause__
        except Exception as error:
            tally.running = {}
            if attempts.failed(job, error):
                again.append(job)
        else:
            attempts.succeeded(job)
            tally.finish("job")
            watch([tally])
            yield job, answer
    attempts.settle()


class _Stopped(BaseException):
    """Who watches raised an error: that ends the run, and is no failure of the job."""

    def __init__(self, why: Exception) -> None:
        super().__init__(why)
        self.why = why
