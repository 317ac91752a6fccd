"""Clusters of dask workers: one for this machine, and the jobs of a stage on any of them.

Jobs are submitted a few at a time for each worker and forgotten when they are done, so that neither
scheduler nor client grows with their number. Voxels and weights never pass through the scheduler.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import pickletools
import queue
import re
import shutil
import subprocess
import threading
import time
import uuid
from collections import deque
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import dask
import numpy as np
from dask.system import cpu_count
from distributed import (
    CancelledError,
    Client,
    Future,
    KilledWorker,
    Nanny,
    Scheduler,
    SpecCluster,
    Worker,
    WorkerPlugin,
    get_worker,
)
from distributed.protocol.pickle import dumps, loads
from distributed.worker_memory import parse_memory_limit

from tomocpt_stream.errors import JobError, PlanError
from tomocpt_stream.progress import Tally
from tomocpt_stream.stages import Attempts, perform, residents

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tomocpt_stream.stages import Job, Stage

T = TypeVar("T")

# Threads of one worker that run jobs: while one computes, the other reads ahead.
THREADS = 2
# Threads that one batch is scored with on a CPU; part of the numerics, so the same on every machine.
CPU_THREADS = 2
# Jobs that wait on a worker beside those that its threads run.
_WAITING = 1
# An idle worker with torch loaded; one that may hold less is ended and started for ever.
_LEAST_MEMORY = 300_000_000
_METHOD = "distributed.worker.multiprocessing-method"
# Seconds to wait for the end of a job before looking around, and between two counts of the workers.
_POLL, _ASK = 0.25, 2.0


class LocalClient(Client):
    """A client that owns its cluster: closing the client ends the workers."""

    def close(self, *args: Any, **kwargs: Any) -> None:
        """Close the client, then its cluster."""
        owned = self.cluster
        super().close(*args, **kwargs)  # type: ignore[no-untyped-call]
        if owned is not None:
            owned.close()


def local_cluster(n_workers: int | None = None, *, memory_limit: str | int = "auto") -> Client:
    """Return a client of a new cluster on this machine: a process for each GPU, else for each two cores.

    Use it in a `with` statement, or close it. Each worker has two threads, so that one task's voxels
    are read while another one is computed; a batch is scored with the same number of threads
    whatever the number of workers. `memory_limit`, bytes or a string such as "4 GB", is where a
    worker is killed and started again; "auto" shares the machine's memory. Workers are spawned, never
    forked: a script must call this below `if __name__ == "__main__":`.

    Raises
    ------
    PlanError
        The number of workers or the limit makes no sense, or a worker called this.
    """
    process = multiprocessing.current_process()
    if process.daemon or getattr(process, "_inheriting", False):
        raise PlanError(
            "local_cluster was called by a worker process, or by one that is being started",
            expected="one call, by the main program",
            remedy='put the lines that use the cluster below `if __name__ == "__main__":` in the script',
        )
    if dask.config.get(_METHOD) == "fork":
        raise PlanError(
            f'the configuration of dask says {_METHOD} = "fork"',
            expected='"spawn": a copy of a process whose torch and zarr have threads hangs',
            remedy="take that out of the configuration",
        )
    gpus = visible_gpus()
    count = _checked(n_workers) or len(gpus) or max(1, cpu_count() // CPU_THREADS)
    limit = _memory_limit(memory_limit, count)
    workers = {
        index: {
            "cls": Nanny,
            "options": {
                "nthreads": THREADS,
                "memory_limit": limit,
                "host": "127.0.0.1",
                "silence_logs": "ERROR",
                "env": _environment(gpus, index),
                "dashboard_address": None,
                "dashboard": False,
            },
        }
        for index in range(count)
    }
    scheduler = {
        "cls": Scheduler,
        "options": {"host": "127.0.0.1", "port": 0, "dashboard": True, "dashboard_address": "127.0.0.1:0"},
    }
    with ExitStack() as undo, _own_environment():
        cluster = SpecCluster(
            workers=workers, scheduler=scheduler, silence_logs="ERROR", name="tomocpt-stream"
        )
        undo.callback(cluster.close)
        client = LocalClient(cluster)  # type: ignore[no-untyped-call]
        undo.callback(client.close)
        client.wait_for_workers(count)
        undo.pop_all()
    return client


def visible_gpus() -> list[str]:
    """Return the names by which CUDA_VISIBLE_DEVICES selects each GPU of this machine; nothing is loaded."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        # CUDA takes the devices before the first name that is none; "-1" and SLURM's "NoDevFiles" are none.
        return list(takewhile(re.compile(r"\d+$|GPU-|MIG-").match, map(str.strip, chosen.split(","))))
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        found = subprocess.run([program, "-L"], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):  # a driver that does not answer has no device to offer
        return []
    return [str(index) for index, line in enumerate(found.stdout.splitlines()) if line.startswith("GPU ")]


def worker_count(client: Any) -> int:
    """Return the number of workers that a client has now, at least 1; None is the calling process."""
    return 1 if client is None else max(1, len(client.nthreads()))


def _checked(n_workers: object) -> int | None:
    if n_workers is not None and (not isinstance(n_workers, int | np.integer) or n_workers < 1):
        raise PlanError(
            f"{n_workers!r} workers", expected="a whole number, at least 1", remedy="leave n_workers out"
        )
    return None if n_workers is None else int(n_workers)


def _environment(gpus: list[str], index: int) -> dict[str, str]:
    """Return the environment of a worker: its own GPU first, threads that do not fight."""
    threads = str(CPU_THREADS)
    found = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": "1"}
    if gpus:
        first = index % len(gpus)
        found["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first:] + gpus[:first])
    return found


@contextmanager
def _own_environment() -> Iterator[None]:
    """Take out of this process' environment what dask sets there for its workers to inherit."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]


def _memory_limit(limit: str | float, count: int) -> int:
    """Return the bytes at which one worker of `count` is ended, 0 for none."""
    found: int | None = -1
    with suppress(ValueError, TypeError, OverflowError):
        found = parse_memory_limit(limit, THREADS, THREADS * count, logger=logging.getLogger(__name__))
    if found and found < _LEAST_MEMORY:
        raise PlanError(
            f"a memory limit of {limit!r} for each worker",
            expected=f'"auto", 0 for none, or at least {_LEAST_MEMORY / 1e6:g} MB: an idle worker needs that',
            remedy='give bytes or a size with its unit, such as "4 GB"',
        )
    return found or 0


class _Resident(WorkerPlugin):
    """Brings a thing to every worker, those that join later included; pickled to each of them once."""

    def __init__(self, name: str, thing: Any, *, for_good: bool) -> None:
        self.name, self._label, self._for_good = _plugin_name(name), name, for_good
        # Unpickled in `setup`: a worker that cannot load it starts all the same, and its jobs say why.
        self._data = dumps(thing)

    def setup(self, worker: Worker) -> None:  # noqa: ARG002  (the plugin's signature)
        data, self._data = self._data, b""
        residents.keep(self._label, partial(loads, data))

    def teardown(self, worker: Worker) -> None:  # noqa: ARG002
        # What stays for good may be taken down only because another client brings it again.
        if not self._for_good:
            residents.drop(self._label)


def _plugin_name(name: str) -> str:
    return f"tomocpt-stream {name}"


class _Acquaintance:
    """What is known of a client: what its workers hold for good, and which runs hear of their jobs.

    There is one topic a client, however many runs: a scheduler never forgets a topic.
    """

    def __init__(self, client: Client) -> None:
        self.held: set[str] = set()
        self.runs: dict[str, queue.SimpleQueue[dict[str, Any]]] = {}
        self.topic = f"tomocpt-stream {client.id}"
        client.subscribe_topic(self.topic, self._hear)

    def _hear(self, event: tuple[float, dict[str, Any]]) -> None:
        _, news = event
        run = self.runs.get(news["run"])
        if run is not None:
            run.put(news)


_ACQUAINTANCES: WeakKeyDictionary[Client, _Acquaintance] = WeakKeyDictionary()
_ACQUAINTING = threading.Lock()


def _acquaintance(client: Client) -> _Acquaintance:
    with _ACQUAINTING:
        if client not in _ACQUAINTANCES:
            _ACQUAINTANCES[client] = _Acquaintance(client)
        return _ACQUAINTANCES[client]


@contextmanager
def hold_on_workers(client: Any, name: str, thing: Any, *, for_good: bool) -> Iterator[None]:
    """Have every worker of a client hold a thing under a name: for good, or within this context.

    Raises what a worker raises that cannot load it.
    """
    held = _acquaintance(client).held
    try:
        if name not in held:
            client.register_plugin(_Resident(name, thing, for_good=for_good))
        if for_good:
            held.add(name)
        yield
    finally:
        if not for_good and client.status == "running":
            client.unregister_worker_plugin(_plugin_name(name))


def run_on_cluster(
    stage: Stage[T], jobs: Iterable[Job], client: Any, watch: Callable[[list[Tally]], None]
) -> Iterator[tuple[Job, Any]]:
    """Yield the answers of jobs that run on the workers of `client`, as they come; see `run_jobs`."""
    run = _Run(stage, client, watch)
    try:
        yield from run.answers(iter(jobs))
    finally:
        run.close()


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
        self._limit, self._asked = 1, -math.inf
        self._news: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._acquaintance = _acquaintance(client)
        self._acquaintance.runs[self._name] = self._news

    def answers(self, ahead: Iterator[Job]) -> Iterator[tuple[Job, Any]]:
        """Yield each job with its answer."""
        while True:
            self._check_alive()
            self._fill(ahead)
            if not (self._under_way or self._again or self._suspects):
                break
            for number in self._wait():
                answer = self._settle(number)
                if answer is not None:
                    yield answer
        self._attempts.settle()

    def close(self) -> None:
        """Drop what is still under way, and stop listening."""
        del self._acquaintance.runs[self._name]
        futures = [under_way.future for under_way in self._under_way.values()]
        self._under_way.clear()
        if futures and self._client.status == "running":
            self._client.cancel(futures, reason="the run was ended")

    def _check_alive(self) -> None:
        """Raise where the scheduler is gone; workers may come back, so they are waited for."""
        if self._client.status not in ("running", "connecting"):
            raise JobError(
                f"{self._stage.name} of {self._stage.tomogram}: the scheduler is gone "
                f"(the client is {self._client.status})",
                expected="a scheduler that answers until the end",
                remedy="start the cluster again and run again with the same store: what is done is kept",
            )

    def _fill(self, ahead: Iterator[Job]) -> None:
        """Submit jobs up to the limit: new ones, then those for another try, then suspects one by one."""
        while self._client.status == "running" and len(self._under_way) < self._room():
            job = next(ahead, None)
            if job is None and self._again and not self._attempts.delay(self._again[0]):
                job = self._again.popleft()
            if job is None:
                if self._suspects and not (self._under_way or self._again):
                    self._submit(self._suspects.popleft(), alone=True)
                return
            self._submit(job)

    def _room(self) -> int:
        """Return how many jobs may be under way: a few for each worker, whose number may change."""
        if time.monotonic() - self._asked > _ASK:
            with suppress(OSError):  # the connection may be lost at any time
                threads = self._client.nthreads()
                self._limit = max(1, sum(min(count, THREADS) + _WAITING for count in threads.values()))
            self._asked = time.monotonic()
        return self._limit

    def _submit(self, job: Job, *, alone: bool = False) -> None:
        self._submitted += 1
        stage, number = self._stage, self._submitted
        # What precedes the first dash is the group that the dashboard colours; the rest is for people.
        key = f"{stage.name}-{number} of {stage.total}, {stage.tomogram}, {job.label}-{self._name}"
        sender = (self._acquaintance.topic, self._name, number)
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

    def _settle(self, number: int) -> tuple[Job, Any] | None:
        """Return a finished job with its answer; put one that failed where it belongs."""
        ended = self._under_way.pop(number)
        job, (name, answer, numbers), error = ended.job, *_outcome(ended.future)
        if error is None:
            self._tell(ended, number, name, numbers)
            self._tallies[name].finish(str(number))
            self._attempts.succeeded(job)
            self._watch(list(self._tallies.values()))
            return job, answer
        self._tell(ended, number, None, {})
        if self._client.status != "running":  # if the scheduler comes back, so does the job
            self._again.append(job)
        elif isinstance(error, KilledWorker):
            if self._attempts.failed(job, _killed(error), most=1 if ended.alone else math.inf):
                self._suspects.append(job)
        elif self._attempts.failed(job, error):
            self._again.append(job)
        return None

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


def _outcome(future: Future[Any]) -> tuple[tuple[str, Any, dict[str, float]], BaseException | None]:
    """Return what `_on_worker` returned of a job that has ended, and its error; release it."""
    nothing: tuple[str, Any, dict[str, float]] = ("", None, {})
    try:
        if future.status == "finished":
            return future.result(), None
        if future.status == "error":
            return nothing, _readable(future.exception()).with_traceback(future.traceback())
        lost = str(future.status)
    except (CancelledError, OSError) as error:  # its worker or the scheduler went just now
        lost = f"{type(error).__name__}: {error}"
    finally:
        # Not when the last reference goes: an error that is looked at holds the frames it came through.
        future.release()
    dropped = JobError(
        f"the scheduler dropped the task ({lost})",
        expected="an answer",
        remedy="look at the scheduler's log",
    )
    return nothing, dropped


def _readable(error: BaseException) -> BaseException:
    """Return an error, or what can be read of one whose class only the worker knows.

    Such are those of a library for the worker's device; what comes then is their pickle.
    """
    if type(error) is not Exception or not error.args or not isinstance(error.args[0], bytes):
        return error
    words = [word for _, word, _ in pickletools.genops(error.args[0]) if isinstance(word, str)]
    return RuntimeError(f"an error that only the worker can load: {' '.join(words)}")


def _killed(error: KilledWorker) -> JobError:
    last = getattr(error.last_worker, "address", error.last_worker)
    found = JobError(
        f"its worker died {error.allowed_failures + 1} times, the last at {last}",
        expected="a worker that lives until the task ends",
        remedy="look at that worker's log; where it went beyond its memory limit, raise the limit or lower "
        "the budget `memory`; then run again with the same store: what is done is kept",
    )
    found.__cause__ = error
    return found


def _on_worker(
    function: Callable[..., Any], address: Any, payload: Any, sender: tuple[str, str, int]
) -> tuple[str, Any, dict[str, float]]:
    """Do one job and say who did it; `sender` is the topic, the run and the number of the job."""
    worker = get_worker()
    name = str(worker.name if worker.name is not None else worker.address)
    topic, run, number = sender
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

    answer, numbers = perform(function, address, payload, tell)
    return name, answer, numbers


def dashboard(client: Any) -> str | None:
    """Return the address of the dask dashboard of a client, None where it has none."""
    return getattr(client, "dashboard_link", None) or None
