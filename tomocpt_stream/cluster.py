"""Clusters of dask workers: one for this machine, and what the workers of any cluster hold.

Workers are processes that were spawned, with two threads each; one process for each GPU.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import shutil
import subprocess
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import dask
import numpy as np
from dask.system import cpu_count
from distributed import Client, Nanny, Scheduler, SpecCluster, Worker, WorkerPlugin
from distributed.core import Status
from distributed.deploy.cluster import Cluster
from distributed.protocol.pickle import dumps, loads
from distributed.worker_memory import parse_memory_limit

from tomocpt_stream.errors import JobError, PlanError
from tomocpt_stream.stages import residents

if TYPE_CHECKING:
    from collections.abc import Iterator

# Threads of one worker that run jobs: while one computes, the other reads ahead.
THREADS = 2
# Threads that one batch is scored with on a CPU; part of the numerics, so the same on every machine.
CPU_THREADS = 2
# A worker that has loaded the shipped picker, and little more; one that may hold less is ended and
# started for ever.
_LEAST_MEMORY = 700_000_000
# What such a worker holds when it has nothing to do, and the share of its limit at which dask ends it.
_IDLE_MEMORY, _ENDED_AT = 500_000_000, 0.95
_METHOD = "distributed.worker.multiprocessing-method"
_BEFORE_SPAWN = "distributed.nanny.pre-spawn-environ"
# Where glibc's own thresholds end up once a process has freed a large array. Dask's 64 kB of freed memory
# sends every array back to the system at once, and the next one is zeroed anew page by page.
_ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": 1 << 25, "MALLOC_MMAP_THRESHOLD_": 1 << 25}


class _StandingCluster(SpecCluster):
    """A cluster that gives up none of its workers, however often one dies.

    Dask's own looks 15 s after a death, and closes a worker for good that is just being started again.
    """

    def _update_worker_status(self, op: str, msg: Any) -> None:
        Cluster._update_worker_status(self, op, msg)


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
    before_spawn = {_BEFORE_SPAWN: {**dask.config.get(_BEFORE_SPAWN), **_ALLOCATOR}}
    with ExitStack() as undo, _own_environment(), dask.config.set(before_spawn):
        cluster = _StandingCluster(  # type: ignore[no-untyped-call]
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


def is_deserted(client: Any) -> bool:
    """Return whether all workers of a client's own cluster have died and could not be started again."""
    workers: dict[Any, Any] = getattr(client.cluster, "workers", None) or {}
    ended = (Status.closed, Status.failed)
    return bool(workers) and all(getattr(worker, "status", None) in ended for worker in workers.values())


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
            f"a memory limit of {found / 1e6:.0f} MB for each of {count} workers"
            if limit == "auto"
            else f"a memory limit of {limit!r} for each worker",
            expected=f"0 for none, or at least {_LEAST_MEMORY / 1e6:g} MB: a worker with its network",
            remedy='start fewer workers, or give bytes or a size with its unit, such as "4 GB"',
        )
    return found or 0


def room(client: Any) -> int | None:
    """Return the bytes that a task may take on every worker of a client; None where none has a limit."""
    limits = [worker["memory_limit"] for worker in client.scheduler_info()["workers"].values()]
    least = min((limit for limit in limits if limit), default=None)
    return None if least is None else max(0, int(_ENDED_AT * least) - _IDLE_MEMORY)


class _Resident(WorkerPlugin):
    """Brings a thing to every worker, those that join later included; pickled to each of them once."""

    def __init__(self, name: str, data: bytes, *, for_good: bool) -> None:
        self.name, self._label, self._for_good = _plugin_name(name), name, for_good
        # Unpickled in `setup`: a worker that cannot load it starts all the same, and its jobs say why.
        self._data = data

    def setup(self, worker: Worker) -> None:  # noqa: ARG002  (the plugin's signature)
        data, self._data = self._data, b""
        residents.keep(self._label, partial(loads, data))

    def teardown(self, worker: Worker) -> None:  # noqa: ARG002
        # What stays for good may be taken down only because another client brings it again.
        if not self._for_good:
            residents.drop(self._label)


def _plugin_name(name: str) -> str:
    return f"tomocpt-stream {name}"


def _pickled(name: str, thing: Any) -> bytes:
    try:
        data: bytes = dumps(thing)
    except Exception as error:
        raise PlanError(
            f"the {name} cannot be sent to workers ({type(error).__name__}: {error})",
            expected="something that can be pickled",
            remedy="give its class a __reduce__ that loads it again where it arrives",
        ) from error
    return data


_HELD: WeakKeyDictionary[Client, set[str]] = WeakKeyDictionary()


@contextmanager
def hold_on_workers(client: Any, name: str, thing: Any, *, for_good: bool) -> Iterator[None]:
    """Have every worker of a client hold a thing under a name: for good, or within this context.

    Raises PlanError where it cannot be pickled, JobError where a worker dies of it, and what a worker
    raises that cannot load it.
    """
    held = _HELD.setdefault(client, set())
    try:
        if name not in held:
            _bring(client, _Resident(name, _pickled(name, thing), for_good=for_good))
        if for_good:
            held.add(name)
        yield
    finally:
        if not for_good and client.status == "running":
            client.unregister_worker_plugin(_plugin_name(name))


def _bring(client: Any, plugin: _Resident) -> None:
    try:
        client.register_plugin(plugin)
    except OSError as error:  # the connection to a worker, or to the scheduler, was closed
        with suppress(Exception):  # else each worker that is started again would die of it again
            client.unregister_worker_plugin(plugin.name)
        raise JobError(
            f"a worker died, or was lost, while it was given the {plugin.name} ({error})",
            expected="workers that can load it",
            remedy="look at the worker's log; where it went beyond its memory limit, raise that",
        ) from error


def dashboard(client: Any) -> str | None:
    """Return the address of the dask dashboard of a client, None where it has none."""
    return getattr(client, "dashboard_link", None) or None
