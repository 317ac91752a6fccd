"""Faults of workers, clients and clusters: the same bytes each time, or an error that says what failed.

Every map is compared with that of a run in the calling process that nothing disturbed; the windows
that were scored more than once are those of the tasks that were under way when something was killed.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
import pytest
from distributed import Client, Status
from zarr.storage import LocalStore

from tests.clusters import cluster, kill, process_ids, wait_for_workers
from tests.elsewhere import CLIENTS, address_of, client_elsewhere, cluster_elsewhere, running
from tests.races import race
from tests.stores import Fault, Faulty, Kind, Method, wait_until
from tests.watched import DARK, Undisturbed, Watched, contents, done, run, undisturbed_run
from tomocpt_stream import submission
from tomocpt_stream.cluster import local_cluster
from tomocpt_stream.duplicates import sha256
from tomocpt_stream.errors import DuplicateError, JobError
from tomocpt_stream.heatmap import open_heatmap
from tomocpt_stream.receipts import Receipts
from tomocpt_stream.scoring import RECEIPTS
from tomocpt_stream.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tomocpt_stream.heatmap import Heatmap


@pytest.fixture(scope="module")
def blended(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Sixteen tasks of three chunks, which share the windows at their borders."""
    return undisturbed_run(tmp_path_factory.mktemp("blended"), "hann", 24)


@pytest.fixture(scope="module")
def small_worker() -> Iterator[Client]:
    """A cluster of one worker with little memory; a task that has ended it once is under suspicion."""
    with dask.config.set({"distributed.scheduler.allowed-failures": 0}):
        client = local_cluster(1, memory_limit="900 MB")
    with client:
        yield client


@pytest.mark.parametrize(
    ("what", "method", "keys", "kind"),
    [
        ("volume", "get", "^0/c/", "killed"),
        ("map", "set", "^0/c/", "killed"),
        ("map", "set", "^0/c/", "killed after"),
        ("map", "put", "^receipts/heatmap/1.1.1", "killed"),
        ("map", "put", "^receipts/heatmap/0.1.1", "killed after"),
        ("map", "get", "^0/c/", "killed"),
    ],
    ids=["reading", "before a chunk", "after a chunk", "before a receipt", "after a receipt", "seams"],
)
def test_a_worker_killed_at_its_store(
    undisturbed: Undisturbed,
    workers: Client,
    tmp_path: Path,
    what: str,
    method: Method,
    keys: str,
    kind: Kind,
) -> None:
    fault = Fault(tmp_path / "faults", method, keys, kind, times=1)
    volume, store = undisturbed.volume, LocalStore(tmp_path / "map.zarr")
    picker = Watched(tmp_path)
    if what == "volume":
        volume = open_volume(Faulty(LocalStore(undisturbed.folder), fault))
        heatmap = run(undisturbed, picker, store, workers, volume=volume)
    else:
        heatmap = run(undisturbed, picker, Faulty(store, fault), workers)
    assert fault.count() == 1
    assert contents(heatmap) == undisturbed.contents
    assert undisturbed.rescored(picker) <= undisturbed.windows(2)  # one was computed, one stored


def test_a_worker_killed_while_it_scores(undisturbed: Undisturbed, workers: Client, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "map.zarr")
    picker = Watched(tmp_path, "die once", after=store.root / "receipts" / "heatmap" / "0.1.1.json")
    heatmap = run(undisturbed, picker, store, workers)
    assert len(picker.seen.read_text().split()) == 1
    assert contents(heatmap) == undisturbed.contents
    # The first of the task's two layers was done.
    assert 0 < undisturbed.rescored(picker) <= undisturbed.windows(1) // 2


def test_a_worker_killed_while_it_blends(blended: Undisturbed, workers: Client, tmp_path: Path) -> None:
    picker = Watched(tmp_path, "die once")
    heatmap = run(blended, picker, LocalStore(tmp_path / "map.zarr"), workers)
    assert len(picker.seen.read_text().split()) == 1
    assert contents(heatmap) == blended.contents
    assert 0 < blended.rescored(picker) <= blended.windows(2)


def test_a_task_that_always_fails(undisturbed: Undisturbed, workers: Client, tmp_path: Path) -> None:
    picker, store = Watched(tmp_path, "fail"), LocalStore(tmp_path / "map.zarr")
    named = r"predict of tomogram: task 5 of 9 \(z 0:60 y 30:60 x 30:60\) failed 3 times: .*has stumbled"
    with pytest.raises(JobError, match=named):
        run(undisturbed, picker, store, workers)
    assert len(picker.seen.read_text().split()) == 3
    assert done(store) == undisturbed.chunks - {"1.1.1"}
    before = picker.scored()
    picker.mend()
    heatmap = run(undisturbed, picker, store, workers)
    assert contents(heatmap) == undisturbed.contents
    assert 0 < (picker.scored() - before).total() <= undisturbed.windows(1) // 2


def test_a_worker_that_runs_out_of_memory(
    undisturbed: Undisturbed, small_worker: Client, tmp_path: Path
) -> None:
    picker, store = Watched(tmp_path, "eat"), LocalStore(tmp_path / "map.zarr")
    named = r"task 5 of 9 \(z 0:60 y 30:60 x 30:60\) failed .*its worker died .*memory"
    with pytest.raises(JobError, match=named):
        run(undisturbed, picker, store, small_worker)
    deaths = picker.seen.read_text().split()
    assert 2 <= len(set(deaths)) == len(deaths) <= 4
    assert undisturbed.chunks - {"0.1.1", "1.1.1"} <= done(store) < undisturbed.chunks
    before = picker.scored()
    picker.mend()
    heatmap = run(undisturbed, picker, store, small_worker)
    assert contents(heatmap) == undisturbed.contents
    assert 0 < (picker.scored() - before).total() <= undisturbed.windows(1)


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "ctrl-c"])
def test_the_client_is_ended_and_run_again(
    undisturbed: Undisturbed, workers: Client, tmp_path: Path, signal_number: signal.Signals
) -> None:
    picker, store = Watched(tmp_path, "dawdle", mark=DARK), LocalStore(tmp_path / "map.zarr")
    request = {"picker": picker, "store": store, **undisturbed.request()}
    with client_elsewhere(workers, tmp_path, request) as process:
        wait_until(picker.seen.exists)
        process.send_signal(signal_number)
        _, printed = process.communicate(timeout=30)
    assert ("KeyboardInterrupt" in printed) == (signal_number == signal.SIGINT)
    wait_until(lambda: not running(workers))
    assert {"0.1.2", "1.1.2"}.isdisjoint(done(store))  # what was under way was not brought to its end
    before, left = picker.scored(), undisturbed.chunks - done(store)
    picker.mend()
    heatmap = run(undisturbed, picker, store, workers)
    assert contents(heatmap) == undisturbed.contents
    assert (picker.scored() - before).total() <= undisturbed.windows(len(left))
    assert undisturbed.rescored(picker) <= undisturbed.windows(4)  # two on each worker


@pytest.mark.parametrize(
    ("method", "keys", "kind"),
    [
        ("put", "^zarr.json", "killed after"),
        ("set", "^0/zarr.json", "killed"),
        ("set", "^candidates/seams", "killed after"),
        ("set", "^zarr.json", "killed"),
    ],
    ids=["claimed", "half claimed", "before the end", "at the end"],
)
def test_the_client_is_killed_at_its_store(
    undisturbed: Undisturbed, workers: Client, tmp_path: Path, method: Method, keys: str, kind: Kind
) -> None:
    fault = Fault(tmp_path / "faults", method, keys, kind, times=1)
    picker, store = Watched(tmp_path), LocalStore(tmp_path / "map.zarr")
    request = {"picker": picker, "store": Faulty(store, fault), **undisturbed.request()}
    with client_elsewhere(workers, tmp_path, request) as process:
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert fault.count() == 1
    heatmap = run(undisturbed, picker, store, workers)
    assert contents(heatmap) == undisturbed.contents
    assert undisturbed.rescored(picker) == 0


def test_the_scheduler_dies(undisturbed: Undisturbed, workers: Client, tmp_path: Path) -> None:
    picker, store = Watched(tmp_path, "wait"), LocalStore(tmp_path / "map.zarr")
    with (
        cluster_elsewhere(tmp_path) as (process, address),
        Client(address, timeout=2) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        failing = pool.submit(run, undisturbed, picker, store, client)
        wait_until(picker.seen.exists)
        process.kill()
        with pytest.raises(JobError, match="predict of tomogram: the scheduler is gone"):
            failing.result(timeout=60)
    assert set() < done(store) < undisturbed.chunks
    picker.mend()
    heatmap = run(undisturbed, picker, store, workers)
    assert contents(heatmap) == undisturbed.contents
    assert undisturbed.rescored(picker) <= undisturbed.windows(2)


def tables(store: LocalStore) -> set[str]:
    return {path.name for path in (store.root / "candidates").iterdir()}


def tables_of_receipts(store: LocalStore) -> set[str]:
    receipts = Receipts(store, RECEIPTS).all().values()
    return {"seams", *(receipt["table"].removeprefix("candidates/") for receipt in receipts)}


@pytest.mark.parametrize("case", ["other tasks", "another cluster"])
def test_two_clients_on_one_output(
    blended: Undisturbed, workers: Client, small_worker: Client, tmp_path: Path, case: str
) -> None:
    picker, store = Watched(tmp_path, "go slowly"), LocalStore(tmp_path / "map.zarr")
    other = replace(blended.plan, group=(1, 2, 3)) if case == "other tasks" else blended.plan
    cluster = small_worker if case == "another cluster" else workers
    arguments = []
    for number, (client, plan) in enumerate(((workers, blended.plan), (cluster, other))):
        path = tmp_path / f"request {number}"
        path.write_bytes(pickle.dumps({**blended.request(), "plan": plan, "picker": picker, "store": store}))
        arguments += [address_of(client), str(path)]
    summaries = race(CLIENTS, tmp_path / "gate", *arguments)
    assert summaries[0] == summaries[1]
    heatmap = open_heatmap(store)
    assert contents(heatmap) == blended.contents
    assert 0 < blended.rescored(picker) <= other.windows
    assert done(store) == blended.chunks
    assert tables(store) == tables_of_receipts(store)


@contextmanager
def one_chunk_held(
    case: Undisturbed, workers: Client, folder: Path, method: Method, keys: str
) -> Iterator[tuple[LocalStore, Callable[[], Heatmap]]]:
    """A map that lacks one chunk, which workers are at; where its last request is held they wait.

    Gives the map's store, and a function that lets them go on and returns their map.
    """
    picker, store = Watched(folder, "fail"), LocalStore(folder / "map.zarr")
    with pytest.raises(JobError, match="stumbled"):
        run(case, picker, store, None)
    assert done(store) == case.chunks - {"1.1.1"}
    picker.mend()
    held = Fault(folder / "faults", method, keys, "held", times=1)
    with ThreadPoolExecutor(1) as pool, ExitStack() as end:
        end.callback(held.mend)
        theirs = pool.submit(run, case, picker, Faulty(store, held), workers)
        wait_until(lambda: held.count() == 1)

        def go_on() -> Heatmap:
            held.mend()
            return theirs.result(timeout=60)

        yield store, go_on


def test_a_duplicate_that_differs(undisturbed: Undisturbed, workers: Client, tmp_path: Path) -> None:
    with one_chunk_held(undisturbed, workers, tmp_path, "put", "heatmap/1.1.1") as (store, go_on):
        heatmap = run(undisturbed, Watched(tmp_path, shift=1e-4), store, None)
        first = Receipts(store, RECEIPTS).get("1.1.1")
        with pytest.raises(
            DuplicateError, match=r"chunk 1\.1\.1 of .* was scored twice with different results"
        ):
            go_on()
    assert first is not None
    assert Receipts(store, RECEIPTS).get("1.1.1") == first
    assert sha256(np.asarray(heatmap.array[30:60, 30:60, 30:60])) == first["sha256"]


@pytest.mark.parametrize("keys", ["^0/c/1/1/1", "^candidates/1.1.1"])
def test_a_duplicate_that_agrees(
    undisturbed: Undisturbed, workers: Client, tmp_path: Path, keys: str
) -> None:
    other = replace(undisturbed.plan, group=(1, 3, 3))  # with other candidates to settle in each task
    with one_chunk_held(undisturbed, workers, tmp_path, "set", keys) as (store, go_on):
        ours = run(undisturbed, Watched(tmp_path), store, None, plan=other)
        assert contents(ours) == undisturbed.contents
        assert contents(go_on()) == undisturbed.contents
    assert contents(ours) == undisturbed.contents
    assert tables(store) == tables_of_receipts(store)


def test_a_worker_that_takes_its_time_to_start_again(small_worker: Client) -> None:
    (process,) = process_ids(small_worker).values()
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "50ms"}):  # dask's 15 s, shortened
        kill(process)
        wait_for_workers(small_worker, 1, gone=[process])
    owned: Any = small_worker.cluster
    assert [nanny.status for nanny in owned.workers.values()] == [Status.running]


def test_the_last_worker_dies_with_a_result(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cluster(1) as client:
        owned: Any = client.cluster
        for nanny in owned.workers.values():
            nanny.process.worker_kwargs["unheard_of"] = True  # it cannot be started again
        gather: Any = client.gather
        processes = process_ids(client).values()

        def kill_first(futures: Any, **options: Any) -> Any:
            if futures:
                for process in processes:
                    with suppress(ProcessLookupError):
                        kill(process)
            return gather(futures, **options)

        monkeypatch.setattr(client, "gather", kill_first)
        monkeypatch.setattr(submission, "_GATHER", 1.0)
        with pytest.raises(JobError, match="every worker has died, and none could be started again"):
            run(undisturbed, Watched(tmp_path), tmp_path / "map.zarr", client)


class Indigestible(Watched):
    """Loading it ends a worker."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if multiprocessing.parent_process() is not None:
            with self.seen.open("a") as file:
                file.write(f"{os.getpid()}\n")
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_picker_that_ends_the_workers(undisturbed: Undisturbed, workers: Client, tmp_path: Path) -> None:
    picker, store = Indigestible(tmp_path), LocalStore(tmp_path / "map.zarr")
    with pytest.raises(
        JobError, match=r"a worker died, or was lost, while it was given the .* picker watched"
    ):
        run(undisturbed, picker, store, workers)
    deaths = picker.seen.read_text().split()
    heatmap = run(undisturbed, Watched(tmp_path), store, workers)
    assert contents(heatmap) == undisturbed.contents
    assert picker.seen.read_text().split() == deaths  # no worker that was started again was given it
