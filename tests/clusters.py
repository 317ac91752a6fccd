"""Clusters of worker processes for tests: started once, shared, and ended without a warning."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from distributed import Client, LocalCluster

from tests.jobs import until
from tomocpt_stream.cluster import local_cluster

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator


@contextmanager
def cluster(count: int) -> Iterator[Client]:
    """A client of `count` new worker processes of two threads each; one that dies is started again."""
    with local_cluster(count, memory_limit=0) as client:  # what other tests hold must not end a worker
        yield client


def process_ids(client: Client) -> dict[str, int]:
    """The process of each worker that answers, by the worker's address."""
    return dict(client.run(os.getpid, on_error="ignore"))


def kill(process: int) -> None:
    """End a worker at once, as the kernel does when memory runs out."""
    os.kill(process, signal.SIGKILL)


def wait_for_workers(client: Client, count: int, gone: Collection[int] = ()) -> None:
    """Return when `count` workers answer, none of them a process of `gone`."""
    while True:
        found = set(process_ids(client).values())
        if len(found) == count and found.isdisjoint(gone):
            return
        time.sleep(0.02)


@contextmanager
def own_cluster(count: int, *, processes: bool = True, **options: Any) -> Iterator[Client]:
    """A cluster as a user may have it; closed without a warning."""
    settings = {"threads_per_worker": 2, "dashboard_address": "127.0.0.1:0", "memory_limit": 0, **options}
    with LocalCluster(n_workers=count, processes=processes, **settings) as local, Client(local) as client:
        yield client


def scheduler(client: Client) -> Any:
    """The scheduler, which lives in this process."""
    local: Any = client.cluster
    return local.scheduler


def address_of(client: Client) -> str:
    return str(scheduler(client).address)


def assert_idle(client: Client) -> None:
    until(lambda: not scheduler(client).tasks)
    until(lambda: not client.futures)
