"""The jobs of a stage on the workers of a dask cluster.

Jobs are submitted a few at a time for each worker and forgotten when they are done, so that neither
scheduler nor client grows with their number. Voxels and weights never pass through the scheduler.
"""

from __future__ import annotations

import math
import pickletools
import queue
import threading
import time
import uuid
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from distributed import CancelledError, Client, Future, KilledWorker, get_worker

from tomocpt_stream.cluster import THREADS, is_deserted
from tomocpt_stream.errors import JobError
from tomocpt_stream.progress import Tally
from tomocpt_stream.stages import Attempts, perform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tomocpt_stream.stages import Job, Stage

T = TypeVar("T")

# Jobs that wait on a worker beside those that its threads run.
_WAITING = 1
# Seconds to wait for the end of a job before looking around, and between two counts of the workers.
_POLL, _ASK = 0.25, 2.0
# Seconds after which a cluster without a living worker is given up: while it is scaled there may be none.
_DESERTED = 5.0
# Seconds to wait for what a job returned: where its worker has died since, it is computed again first, or
# never, if no worker is left.
_GATHER = 20.0
# What `_on_worker` returns: the worker's name, the answer, the last numbers.
_Returned = tuple[str, Any, dict[str, float]]


def run_on_cluster(
    stage: Stage[T], jobs: Iterable[Job], client: Any, watch: Callable[[list[Tally]], None]
) -> Iterator[tuple[Job, Any]]:
    """Yield the answers of jobs that run on the workers of `client`, as they come; see `run_jobs`."""
    run = _Run(stage, client, watch)
    try:
        yield from run.answers(iter(jobs))
    finally:
        run.close()


class _Line:
    """What the workers tell a client of running jobs: one topic for all its runs.

    A topic for each run would stay on the scheduler for ever.
    """

    def __init__(self, client: Client) -> None:
        self.runs: dict[str, queue.SimpleQueue[dict[str, Any]]] = {}
        self.topic = f"tomocpt-stream {client.id}"
        client.subscribe_topic(self.topic, self._hear)

    def _hear(self, event: tuple[float, dict[str, Any]]) -> None:
        _, news = event
        run = self.runs.get(news["run"])
        if run is not None:
            run.put(news)


_LINES: WeakKeyDictionary[Client, _Line] = WeakKeyDictionary()
_LAYING = threading.Lock()


def _line_of(client: Client) -> _Line:
    with _LAYING:
        if client not in _LINES:
            _LINES[client] = _Line(client)
        return _LINES[client]


@dataclass
class _UnderWay:
    """A job on the cluster; `worker` is the one that was last heard of it."""

    job: Job
    future: Future[Any]
    alone: bool
    worker: str | None = None


class _Run:
    """The jobs of one stage on a cluster: which are under way, which wait for another try."""

    def __init__(self, stage: Stage[Any], client: Any, watch: Callable[[list[Tally]], None]) -> None:
        self._stage, self._client, self._watch = stage, client, watch
        self._name = uuid.uuid4().hex[:8]
        self._attempts = Attempts(stage)
        self._submitted = 0
        # By the number of their submission: news of an earlier try is not taken for that of a later one.
        self._under_way: dict[int, _UnderWay] = {}
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._again: deque[Job] = deque()
        # Jobs whose worker died again and again: they may be innocent, so each gets a run of its own.
        self._suspects: deque[Job] = deque()
        self._tallies: dict[str, Tally] = {}
        self._workers, self._limit, self._asked = 1, 1, -math.inf
        self._begun = 0  # jobs submitted, each counted once
        self._deserted = math.inf  # since when there has been no living worker
        self._news: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._line = _line_of(client)
        self._line.runs[self._name] = self._news

    def answers(self, ahead: Iterator[Job]) -> Iterator[tuple[Job, Any]]:
        """Yield each job with its answer."""
        while True:
            self._check_alive()
            self._fill(ahead)
            if not (self._under_way or self._again or self._suspects):
                break
            ended = self._wait()
            found = self._gather(ended)
            for number in ended:
                returned = found.get(number)
                if returned is None:
                    self._fail(number)
                else:
                    yield self._finish(number, returned)
        self._attempts.settle()

    def close(self) -> None:
        """Drop what is still under way, and stop listening."""
        del self._line.runs[self._name]
        futures = [under_way.future for under_way in self._under_way.values()]
        self._under_way.clear()
        if futures and self._client.status == "running":
            self._client.cancel(futures, reason="the run was ended")

    def _check_alive(self) -> None:
        """Raise where the scheduler is gone; workers may come back, so they are waited for if they can."""
        self._deserted = min(self._deserted, time.monotonic()) if is_deserted(self._client) else math.inf
        if time.monotonic() - self._deserted > _DESERTED:
            raise JobError(
                f"{self._stage.name} of {self._stage.tomogram}: every worker has died, and none could be "
                "started again",
                expected="a worker",
                remedy="see in the log why, start the cluster again and run again with the same store: what "
                "is done is kept",
            )
        if self._client.status not in ("running", "connecting"):
            raise JobError(
                f"{self._stage.name} of {self._stage.tomogram}: the scheduler is gone "
                f"(the client is {self._client.status})",
                expected="a scheduler that answers until the end",
                remedy="start the cluster again and run again with the same store: what is done is kept",
            )

    @contextmanager
    def _if_connected(self) -> Iterator[None]:
        """Pass over what a request says when the scheduler or a worker goes meanwhile: it is found out."""
        try:
            yield
        except (CancelledError, OSError):
            pass
        except AttributeError:  # a client that is being closed has no scheduler
            if self._client.status == "running":
                raise

    def _fill(self, ahead: Iterator[Job]) -> None:
        """Submit jobs up to the limit: new ones, then those for another try, then suspects one by one."""
        while self._client.status == "running" and (len(self._under_way) < self._room() or self._idle() > 0):
            job = next(ahead, None)
            self._begun += job is not None
            if job is None and self._again and not self._attempts.delay(self._again[0]):
                job = self._again.popleft()
            if job is None:
                if self._suspects and not (self._under_way or self._again):
                    self._submit(self._suspects.popleft(), alone=True)
                return
            self._submit(job)

    def _room(self) -> int:
        """Return how many jobs may be under way: a few for each worker, whose number may change.

        The last ones go to workers that have nothing to do: a job that waits beside a running one cannot
        be taken up by a worker that has become idle.
        """
        if time.monotonic() - self._asked > _ASK:
            with self._if_connected():
                threads = self._client.nthreads()
                self._workers = max(1, len(threads))
                self._limit = max(1, sum(min(count, THREADS) + _WAITING for count in threads.values()))
            self._asked = time.monotonic()
        waiting = self._stage.total - self._begun - self._workers
        return min(self._limit, self._workers + max(0, waiting))

    def _idle(self) -> int:
        """Return how many workers have nothing to do: two jobs may have gone to one of them.

        Jobs that no worker has been heard of are taken to be on their way to workers of their own. Only
        near the end does every worker say at once what it has begun.
        """
        busy = {under_way.worker for under_way in self._under_way.values()} - {None}
        unheard = sum(under_way.worker is None for under_way in self._under_way.values())
        return self._workers - len(busy) - unheard

    def _submit(self, job: Job, *, alone: bool = False) -> None:
        self._submitted += 1
        stage, number = self._stage, self._submitted
        # What precedes the first dash is the group that the dashboard colours; the rest is for people.
        key = f"{stage.name}-{number} of {stage.total}, {stage.tomogram}, {job.label}-{self._name}"
        # Near the end only: the scheduler keeps each message, and 10^5 of them are no small matter.
        announced = stage.total - self._begun <= 2 * self._limit
        sender = (self._line.topic, self._name, number, announced)
        future = self._client.submit(
            _on_worker, stage.function, stage.address, job.payload, sender, key=key, pure=False
        )
        self._under_way[number] = _UnderWay(job, future, alone)
        future.add_done_callback(lambda _: self._ended.put(number))

    def _wait(self) -> list[int]:
        """Return the numbers of the jobs that have ended since the last call; none after a moment."""
        numbers = []
        try:
            numbers.append(self._ended.get(timeout=_POLL))
            while True:
                numbers.append(self._ended.get_nowait())
        except queue.Empty:
            pass
        self._hear()
        return numbers

    def _gather(self, numbers: list[int]) -> dict[int, _Returned | None]:
        """Return what `_on_worker` returned of those jobs that are finished, in one request."""
        futures = {number: self._under_way[number].future for number in numbers}
        finished = {number: future for number, future in futures.items() if future.status == "finished"}
        found: dict[int, _Returned | None] = {}
        with self._if_connected():
            # In the client's own thread, where `gather` can be given up.
            gather = self._client.gather
            found.update(self._client.sync(gather, finished, errors="skip", callback_timeout=_GATHER))
        return found

    def _finish(self, number: int, returned: _Returned) -> tuple[Job, Any]:
        """Return a job with its answer."""
        ended = self._under_way.pop(number)
        ended.future.release()
        name, answer, numbers = returned
        self._tell(ended, number, name, numbers)
        self._tallies[name].finish(str(number))
        self._attempts.succeeded(ended.job)
        self._watch(list(self._tallies.values()))
        return ended.job, answer

    def _fail(self, number: int) -> None:
        """Put a job that failed where it belongs."""
        ended = self._under_way.pop(number)
        self._tell(ended, number, None, {})
        error = _error_of(ended.future)
        # Now, not when the last reference goes: an error that is looked at holds the frames it came through.
        ended.future.release()
        if self._client.status != "running":  # if the scheduler comes back, so does the job
            self._again.append(ended.job)
        elif isinstance(error, KilledWorker):
            if self._attempts.failed(ended.job, _killed(error), most=1 if ended.alone else math.inf):
                self._suspects.append(ended.job)
        elif self._attempts.failed(ended.job, error):
            self._again.append(ended.job)

    def _tell(self, under_way: _UnderWay, number: int, worker: str | None, numbers: dict[str, float]) -> None:
        """Put down what a worker says of a job; one that it began on a worker that died is taken off that."""
        if under_way.worker is not None:
            self._tallies[under_way.worker].running.pop(str(number), None)
        under_way.worker = worker
        if worker is not None:
            self._tallies.setdefault(worker, Tally(worker)).running[str(number)] = numbers

    def _hear(self) -> None:
        """Bring the tallies up to what running jobs have told."""
        heard = False
        while not self._news.empty():
            news = self._news.get()
            under_way = self._under_way.get(news["job"])
            if under_way is not None:
                self._tell(under_way, news["job"], news["name"], news["numbers"])
                heard = True
        if heard:
            self._watch(list(self._tallies.values()))


def _error_of(future: Future[Any]) -> BaseException:
    """Return the error of a job that was not finished."""
    if future.status != "error":
        return JobError(
            f"the scheduler dropped the task ({future.status})",
            expected="an answer",
            remedy="look at the scheduler's log",
        )
    error: BaseException = future.exception()
    if type(error) is not Exception or not error.args or not isinstance(error.args[0], bytes):
        return error
    # The pickle of a class that only the worker knows, of a library for its device for instance; what it
    # holds of the traceback comes last.
    words = [word for _, word, _ in pickletools.genops(error.args[0]) if isinstance(word, str)]
    said = [word for word in takewhile("unpickle_traceback".__ne__, words) if "pickl" not in word]
    return RuntimeError(f"an error that only the worker can load: {' '.join(said)}")


def _killed(error: KilledWorker) -> JobError:
    last, deaths = getattr(error.last_worker, "address", error.last_worker), error.allowed_failures + 1
    found = JobError(
        f"its worker died {f'{deaths} times' if deaths > 1 else 'once'}, the last at {last}",
        expected="a worker that lives until the task ends",
        remedy="look at that worker's log; where it went beyond its memory limit, raise the limit or lower "
        "the budget `memory`; then run again with the same store: what is done is kept",
    )
    found.__cause__ = error
    return found


def _on_worker(
    function: Callable[..., Any], address: Any, payload: Any, sender: tuple[str, str, int, bool]
) -> tuple[str, Any, dict[str, float]]:
    """Do one job and say who did it.

    `sender` is the topic, the run, the number of the job, and whether to say that it has begun.
    """
    worker = get_worker()
    name = str(worker.name if worker.name is not None else worker.address)
    topic, run, number, announced = sender
    task = worker.get_current_task()

    def tell(numbers: dict[str, float]) -> None:
        known = worker.state.tasks.get(task)
        if known is None or known.state == "cancelled":  # the client has gone, or ended its run
            raise JobError(
                "nobody waits for the task any more",
                expected="a client that stays until the end",
                remedy="run again with the same store: what is done is kept",
            )
        plain = {of: float(found) for of, found in numbers.items()}  # no numpy scalars in a message
        # Not "worker": under that the scheduler puts an address.
        worker.log_event(topic, {"run": run, "job": number, "name": name, "numbers": plain})

    if announced:
        tell({})
    answer, numbers = perform(function, address, payload, tell)
    return name, answer, numbers
