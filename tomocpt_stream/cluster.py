"""Clusters of dask workers: one for this machine, and the jobs of a stage on any of them.

Jobs are submitted a few at a time for each worker and forgotten when they are done, so that neither
scheduler nor client grows with their number. Voxels and weights never pass through the scheduler.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import shutil
import subprocess
import time
import uuid
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from distributed import (
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
_POLL = 0.25


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
        The number of workers is not positive, or a worker that is being started called this.
    """
    if multiprocessing.parent_process() is not None:
        raise PlanError(
            "local_cluster was called by a worker process that is being started",
            expected="one call, by the main program",
            remedy='put the lines that use the cluster below `if __name__ == "__main__":` in the script',
        )
    if n_workers is not None and n_workers < 1:
        raise PlanError(f"{n_workers} workers", expected="at least 1", remedy="leave n_workers out")
    gpus = visible_gpus()
    count = n_workers or len(gpus) or max(1, cores() // CPU_THREADS)
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
    cluster = SpecCluster(workers=workers, scheduler=scheduler, silence_logs="ERROR", name="tomocpt-stream")
    try:
        client = LocalClient(cluster)  # type: ignore[no-untyped-call]
        client.wait_for_workers(count)
    except BaseException:
        cluster.close()
        raise
    return client


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """Return the names by which CUDA_VISIBLE_DEVICES selects each GPU of this machine; nothing is loaded."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name.strip() not in ("", "-1")]
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    found = subprocess.run([program, "-L"], capture_output=True, text=True, check=False)
    return [str(index) for index, line in enumerate(found.stdout.splitlines()) if line.startswith("GPU ")]


def worker_count(client: Any) -> int:
    """Return the number of workers that a client has now, at least 1; None is the calling process."""
    return 1 if client is None else max(1, len(client.nthreads()))


def _environment(gpus: list[str], index: int) -> dict[str, str]:
    """Return the environment of a worker: its own GPU first, threads that do not fight, memory given back."""
    threads = str(CPU_THREADS)
    found = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    if gpus:
        first = index % len(gpus)
        found["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first:] + gpus[:first])
    return found


def _memory_limit(limit: str | int, count: int) -> int:
    """Return the bytes at which one worker of `count` is ended."""
    from distributed.worker_memory import parse_memory_limit

    found = parse_memory_limit(limit, THREADS, THREADS * count, logger=logging.getLogger(__name__))
    return int(found or 0)


class _Resident(WorkerPlugin):
    """Brings a thing to every worker, those that join later included; pickled to each of them once."""

    def __init__(self, name: str, thing: Any) -> None:
        self.name, self._label, self._thing = f"tomocpt-stream {name}", name, thing

    def setup(self, worker: Worker) -> None:  # noqa: ARG002  (the plugin's signature)
        residents.keep(self._label, self._thing)
        del self._thing

    def teardown(self, worker: Worker) -> None:  # noqa: ARG002
        residents.drop(self._label)


_HELD: WeakKeyDictionary[Client, set[str]] = WeakKeyDictionary()


@contextmanager
def hold_on_workers(client: Any, name: str, thing: Any, *, for_good: bool) -> Iterator[None]:
    """Have every worker of a client hold a thing under a name: for good, or within this context."""
    held = _HELD.setdefault(client, set())
    plugin = _Resident(name, thing)
    if name not in held:
        client.register_plugin(plugin)
        held.add(name)
    try:
        yield
    finally:
        if not for_good and client.status == "running":
            client.unregister_worker_plugin(plugin.name)
            held.discard(name)


def run_on_cluster(
    stage: Stage[T], jobs: Iterable[Job], client: Any, watch: Callable[[list[Tally]], None]
) -> Iterator[tuple[Job, Any]]:
    """Yield the answers of jobs that run on the workers of `client`, as they come; see `run_jobs`."""
    run = _Run(stage, client, watch)
    try:
        yield from run.answers(iter(jobs))
    finally:
        run.close()


class _Run:
    """The jobs of one stage on a cluster: which are under way, which wait for another try."""

    def __init__(self, stage: Stage[Any], client: Any, watch: Callable[[list[Tally]], None]) -> None:
        self._stage, self._client, self._watch = stage, client, watch
        self._name = uuid.uuid4().hex[:8]
        self._topic = f"tomocpt-stream-{self._name}"
        self._attempts = Attempts(stage)
        self._under_way: dict[str, tuple[Future[Any], Job]] = {}
        self._again: deque[Job] = deque()
        # Jobs whose worker died again and again: they may be innocent, so each gets a run of its own.
        self._suspects: deque[Job] = deque()
        self._finished: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._news: queue.SimpleQueue[tuple[str, str, dict[str, float]]] = queue.SimpleQueue()
        self._tallies: dict[str, Tally] = {}
        self._submitted = 0
        self._limit, self._asked = 1, -1e9
        client.subscribe_topic(self._topic, self._listen)

    def answers(self, ahead: Iterator[Job]) -> Iterator[tuple[Job, Any]]:
        """Yield each job with its answer."""
        while True:
            self._fill(ahead)
            if not self._under_way:
                break
            for key in self._wait():
                answer = self._settle(key)
                if answer is not None:
                    yield answer
        self._attempts.settle()

    def close(self) -> None:
        """Drop what is still under way, and stop listening."""
        futures = [future for future, _ in self._under_way.values()]
        self._under_way.clear()
        if self._client.status == "running":
            if futures:
                self._client.cancel(futures, reason="the run was ended")
            self._client.unsubscribe_topic(self._topic)

    def _fill(self, ahead: Iterator[Job]) -> None:
        """Submit jobs up to the limit: new ones, then those for another try, then suspects one by one."""
        while len(self._under_way) < self._room():
            job = next(ahead, None)
            if job is None and self._again:
                job = self._again.popleft()
                self._attempts.wait(job)
            if job is None and self._suspects and not self._under_way:
                self._submit(self._suspects.popleft())
                return
            if job is None:
                return
            self._submit(job)

    def _room(self) -> int:
        """Return how many jobs may be under way: a few for each worker, whose number may change."""
        if time.monotonic() - self._asked > 2:
            threads = self._client.nthreads()
            self._limit = max(1, sum(min(count, THREADS) + _WAITING for count in threads.values()))
            self._asked = time.monotonic()
        return self._limit

    def _submit(self, job: Job) -> None:
        self._submitted += 1
        stage = self._stage
        # What precedes the first dash is the group that the dashboard colours; the rest is for people.
        key = f"{stage.name}-{self._submitted} of {stage.total}, {stage.tomogram}, {job.label}-{self._name}"
        future = self._client.submit(
            _on_worker,
            stage.function,
            stage.address,
            job.payload,
            self._topic,
            key,
            key=key,
            pure=False,
            retries=0,
        )
        self._under_way[key] = (future, job)
        future.add_done_callback(lambda done: self._finished.put(done.key))

    def _wait(self) -> list[str]:
        """Return the keys of the jobs that have ended since the last call, at least one."""
        while True:
            keys = []
            try:
                keys.append(self._finished.get(timeout=_POLL))
                while True:
                    keys.append(self._finished.get_nowait())
            except queue.Empty:
                pass
            self._hear(set(keys))
            if keys:
                return keys
            self._check_alive()

    def _check_alive(self) -> None:
        """Raise where the scheduler is gone; workers may come back, so they are waited for."""
        if self._client.status not in ("running", "connecting"):
            raise JobError(
                f"{self._stage.name} of {self._stage.tomogram}: the scheduler is gone "
                f"(the client is {self._client.status})",
                expected="a scheduler that answers until the end",
                remedy="start the cluster again and run again with the same store: what is done is kept",
            )

    def _settle(self, key: str) -> tuple[Job, Any] | None:
        """Return a finished job with its answer; put one that failed where it belongs."""
        future, job = self._under_way.pop(key)
        for tally in self._tallies.values():  # a job that began on a worker that died ended on another
            tally.running.pop(key, None)
        error = self._error_of(future)
        if error is None:
            worker, answer, numbers = future.result()
            tally = self._tallies.setdefault(worker, Tally(worker))
            tally.running[key] = numbers
            tally.finish(key)
            self._attempts.succeeded(job)
            self._watch(list(self._tallies.values()))
            return job, answer
        if isinstance(error, KilledWorker):
            if self._attempts.failed(job, _killed(error), most=2):
                self._suspects.append(job)
        elif self._attempts.failed(job, error):
            self._again.append(job)
        return None

    def _error_of(self, future: Future[Any]) -> BaseException | None:
        if future.status == "finished":
            return None
        if future.status == "error":
            found: BaseException = future.exception()
            return found
        return JobError(
            f"the scheduler dropped the task ({future.status})",
            expected="an answer",
            remedy="look at the scheduler's log",
        )

    def _listen(self, event: tuple[float, dict[str, Any]]) -> None:
        _, news = event
        self._news.put((news["name"], news["key"], news["numbers"]))

    def _hear(self, ended: set[str]) -> None:
        """Bring the tallies up to what running jobs have told."""
        heard = False
        while not self._news.empty():
            worker, key, numbers = self._news.get()
            if key in self._under_way and key not in ended:
                for tally in self._tallies.values():
                    tally.running.pop(key, None)
                self._tallies.setdefault(worker, Tally(worker)).running[key] = numbers
                heard = True
        if heard:
            self._watch(list(self._tallies.values()))


def _killed(error: KilledWorker) -> JobError:
    last = getattr(error.last_worker, "address", error.last_worker)
    return JobError(
        f"its worker died {error.allowed_failures + 1} times, the last at {last}",
        expected="a worker that lives until the task ends",
        remedy="look at that worker's log; where it went beyond its memory limit, raise the limit or lower "
        "the budget `memory`; then run again with the same store: what is done is kept",
    )


def _on_worker(
    function: Callable[..., Any], address: Any, payload: Any, topic: str, key: str
) -> tuple[str, Any, dict[str, float]]:
    """Do one job and say who did it."""
    worker = get_worker()
    name = str(worker.name if worker.name is not None else worker.address)

    def tell(numbers: dict[str, float]) -> None:
        worker.log_event(topic, {"name": name, "key": key, "numbers": numbers})

    answer, numbers = perform(function, address, payload, tell)
    return name, answer, numbers


def dashboard(client: Any) -> str | None:
    """Return the address of the dask dashboard of a client, None where it has none."""
    return getattr(client, "dashboard_link", None) or None
