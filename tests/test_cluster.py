"""Clusters of this machine, what the workers of any hold, and who else is there."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dask
import pytest
from distributed import Client

from tests.clusters import (
    address_of,
    assert_idle,
    kill,
    own_cluster,
    process_ids,
    scheduler,
    wait_for_workers,
)
from tests.jobs import Folder, Marks, answers, stage, until
from tomocpt_stream import cluster
from tomocpt_stream.cluster import dashboard, hold_on_workers, local_cluster, visible_gpus, worker_count
from tomocpt_stream.dispatch import run_jobs
from tomocpt_stream.errors import CheckpointError, JobError, PlanError
from tomocpt_stream.progress import Tally, total
from tomocpt_stream.stages import Job, Report, residents

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def marks(tmp_path: Path) -> Marks:
    return Marks(tmp_path)


@pytest.fixture
def pair(workers: Client) -> Client:
    """Two workers that are there and have nothing to do, whatever the test before did to them."""
    wait_for_workers(workers, 2)
    assert_idle(workers)
    return workers


@dataclass
class Brought:
    """Something that leaves a mark where it is loaded, and breaks there as long as there is a mark for it."""

    folder: str

    def __reduce__(self) -> tuple[Any, ...]:
        Folder(self.folder).open().leave("sent")
        return (bring, (self.folder,))


def bring(folder: str) -> Brought:
    marks = Folder(folder).open()
    marks.leave("brought")
    if marks.of("broken"):
        raise CheckpointError("the weights differ", expected="equal ones", remedy="copy them")
    return Brought(folder)


def use(payload: str, marks: Marks, report: Report) -> int:
    assert isinstance(residents.named(payload), Brought)
    return os.getpid()


def use_all(client: Client, folder: Path, name: str, count: int = 8) -> set[int]:
    """Have jobs use what is held; return the processes that did."""
    run = run_jobs(stage(folder, count, use), [Job(f"task {n}", name) for n in range(count)], client=client)
    return {process for _, process in run}


def holders(client: Client, name: str) -> int:
    """Return how many workers hold a thing."""
    return sum(client.run(_holds, name).values())


def _pickles(name: str, dask_worker: Any) -> bytes:
    data: bytes = dask_worker.plugins[f"tomocpt-stream {name}"]._data
    return data


def _holds(name: str) -> bool:
    return name in residents._named


def test_what_is_held_for_good_is_brought_once(pair: Client, tmp_path: Path) -> None:
    marks, name, thing = Marks(tmp_path), f"a {tmp_path}", Brought(str(tmp_path))
    for _ in range(3):
        with hold_on_workers(pair, name, thing, for_good=True):
            assert use_all(pair, tmp_path, name)
    assert len(marks.of("sent")) == 1
    assert sorted(marks.of("brought")) == sorted(process_ids(pair).values())
    with Client(address_of(pair)) as other:
        with hold_on_workers(other, name, thing, for_good=True):
            assert use_all(other, tmp_path, name)
        assert len(marks.of("brought")) == 2  # the workers have it already, and keep it
        assert holders(other, name) == 2


def test_what_is_held_for_a_while_is_dropped(pair: Client, tmp_path: Path) -> None:
    name = f"b {tmp_path}"
    with hold_on_workers(pair, name, Brought(str(tmp_path)), for_good=False):
        assert use_all(pair, tmp_path, name)
        assert holders(pair, name) == 2
        assert set(pair.run(_pickles, name).values()) == {b""}  # the thing itself is enough
    assert holders(pair, name) == 0
    assert not any(name in plugin for plugin in scheduler(pair).worker_plugins)
    with pytest.raises(JobError, match="does not hold the b "):
        use_all(pair, tmp_path, name, 1)


@pytest.mark.parametrize("for_good", [True, False])
def test_what_a_worker_cannot_load_is_an_error(pair: Client, tmp_path: Path, for_good: bool) -> None:
    marks, name = Marks(tmp_path), f"c {tmp_path}"
    marks.leave("broken")
    holding = hold_on_workers(pair, name, Brought(str(tmp_path)), for_good=for_good)
    with pytest.raises(CheckpointError, match="the weights differ"), holding:
        pytest.fail("held")
    (tmp_path / "broken.0").unlink()
    with hold_on_workers(pair, name, Brought(str(tmp_path)), for_good=for_good):
        assert use_all(pair, tmp_path, name)


def test_two_clients_do_not_get_mixed_up(pair: Client, tmp_path: Path) -> None:
    """Each with keys of the same names, a thing of its own, and reports of running jobs."""

    def work(number: int) -> tuple[list[int], list[float]]:
        folder = tmp_path / str(number)
        folder.mkdir()
        marks, name, seen = Marks(folder), f"d {folder}", list[float]()

        def watch(tallies: list[Tally]) -> None:
            seen.append(total(tallies, "voxels"))
            if any(tally.running for tally in tallies):
                marks.leave("heard")

        with (
            Client(address_of(pair)) as client,
            hold_on_workers(client, name, Brought(str(folder)), for_good=False),
        ):
            found = answers(marks, "tell heard", *[""] * number, client=client, watch=watch)
            assert use_all(client, folder, name)
        return found, seen

    with ThreadPoolExecutor(2) as pool:
        (few, seen_few), (many, seen_many) = pool.map(work, (5, 11))
    assert few == [n * n for n in range(1, 7)]
    assert many == [n * n for n in range(1, 13)]
    assert (seen_few[-1], seen_many[-1]) == (sum(range(1, 7)), sum(range(1, 13)))
    assert_idle(pair)


def test_one_client_in_two_threads(pair: Client, tmp_path: Path) -> None:
    def work(number: int) -> tuple[list[int], float]:
        folder = tmp_path / str(number)
        folder.mkdir()
        marks, seen = Marks(folder), list[float]()

        def watch(tallies: list[Tally]) -> None:
            seen.append(total(tallies, "voxels"))
            if any(tally.running for tally in tallies):
                marks.leave("heard")

        return answers(marks, "tell heard", *[""] * number, client=pair, watch=watch), seen[-1]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, (3, 4)))
    assert found == [([n * n for n in range(1, m + 1)], sum(range(1, m + 1))) for m in (4, 5)]


def test_workers_that_join_later_are_waited_for_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tomocpt_stream.submission._ASK", 0.1)
    marks, name = Marks(tmp_path), f"e {tmp_path}"
    with (
        own_cluster(0) as client,
        hold_on_workers(client, name, Brought(str(tmp_path)), for_good=True),
        ThreadPoolExecutor(1) as pool,
    ):
        assert worker_count(client) == 1  # a plan for the first worker that comes
        local: Any = client.cluster
        run = pool.submit(answers, marks, *["await 4-end"] * 3, *[""] * 5, client=client)
        local.scale(1)
        # Three jobs wait on the first worker for the fourth, which only another worker can take.
        until(lambda: sum(len(marks.of(f"{number}-try")) for number in (1, 2, 3)) == 2)
        local.scale(2)
        assert run.result(60) == [number**2 for number in range(1, 9)]
        assert holders(client, name) == 2
        assert use_all(client, tmp_path, name)
        # One that is killed is started again, and holds it again.
        gone = next(iter(process_ids(client).values()))
        kill(gone)
        wait_for_workers(client, 2, gone=[gone])
        assert holders(client, name) == 2
        # One that cannot load it joins all the same, and its jobs say why.
        marks.leave("broken")
        local.scale(0)
        until(lambda: not client.nthreads())
        local.scale(1)
        with pytest.raises(
            CheckpointError, match=r"predict of TS_01: task \d failed 3 times.*the weights differ"
        ):
            use_all(client, tmp_path, name, 2)


class _Stop(Exception):
    """Ends `local_cluster` where it would start workers."""


def planned(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **options: Any) -> list[dict[str, Any]]:
    """Return the options of the workers that `local_cluster` would start."""
    found: list[dict[str, Any]] = []

    def start(workers: dict[int, dict[str, Any]], **_: Any) -> None:
        found.extend(workers[index]["options"] for index in range(len(workers)))
        raise _Stop

    with monkeypatch.context() as patch:
        patch.setattr(cluster, "_StandingCluster", start)
        with pytest.raises(_Stop):
            local_cluster(*arguments, **options)
    return found


@pytest.mark.parametrize(
    ("chosen", "found"),
    [
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0", ["0"]),
        ("3, 1", ["3", "1"]),
        ("GPU-8a,MIG-8b/1", ["GPU-8a", "MIG-8b/1"]),
        ("0,-1,1", ["0"]),
        ("1,none,2", ["1"]),
    ],
)
def test_the_gpus_that_are_chosen(monkeypatch: pytest.MonkeyPatch, chosen: str, found: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert visible_gpus() == found


@pytest.mark.parametrize(
    ("script", "found"),
    [
        (None, []),
        ("echo 'GPU 0: NVIDIA H200 (UUID: GPU-a)'; echo 'GPU 1: NVIDIA H200 (UUID: GPU-b)'", ["0", "1"]),
        ("echo 'GPU 0: H200'; echo '  MIG 1g.18gb Device 0: (UUID: MIG-c)'", ["0"]),
        ("echo 'NVIDIA-SMI has failed because it could not communicate with the driver'; exit 9", []),
    ],
)
def test_the_gpus_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str | None, found: list[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f'#!/bin/sh\n[ "$1" = -L ] || exit 1\n{script}\n')
        program.chmod(0o755)
    assert visible_gpus() == found


def test_a_program_that_cannot_be_run_finds_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "nvidia-smi").write_text("#!/nowhere/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert visible_gpus() == []


def test_a_worker_for_each_gpu_with_its_own_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5")
    devices = [worker["env"]["CUDA_VISIBLE_DEVICES"] for worker in planned(monkeypatch)]
    assert devices == ["2,3,5", "3,5,2", "5,2,3"]
    devices = [worker["env"]["CUDA_VISIBLE_DEVICES"] for worker in planned(monkeypatch, 5)]
    assert devices == ["2,3,5", "3,5,2", "5,2,3", "2,3,5", "3,5,2"]


@pytest.mark.parametrize(("cores", "count"), [(1, 1), (2, 1), (3, 1), (8, 4)])
def test_a_worker_for_each_two_cores(monkeypatch: pytest.MonkeyPatch, cores: int, count: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(cluster, "cpu_count", lambda: cores)
    found = planned(monkeypatch)
    assert len(found) == count
    assert all("CUDA_VISIBLE_DEVICES" not in worker["env"] for worker in found)
    assert {worker["env"]["OMP_NUM_THREADS"] for worker in found} == {"2"}
    assert {worker["nthreads"] for worker in found} == {2}


def test_memory_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = 16_000_000_000
    monkeypatch.setattr("distributed.system.MEMORY_LIMIT", memory)
    limits = {
        limit: {worker["memory_limit"] for worker in planned(monkeypatch, 4, memory_limit=limit)}
        for limit in ("auto", 0, "4 GB", 3_000_000_000, 0.5)
    }
    assert limits == {
        "auto": {memory // 4},
        0: {0},
        "4 GB": {4_000_000_000},
        3_000_000_000: {3_000_000_000},
        0.5: {memory // 2},
    }


@pytest.mark.parametrize("count", [0, -1, 1.5, "2"])
def test_a_number_of_workers_that_makes_no_sense(count: Any) -> None:
    with pytest.raises(PlanError, match=f"{count!r} workers; expected a whole number, at least 1"):
        local_cluster(count)


@pytest.mark.parametrize(
    "limit", ["much", "4 GP", "", -1, "-4 GB", 1000, "100 MB", float("nan"), float("-inf")]
)
def test_a_memory_limit_that_makes_no_sense(limit: Any) -> None:
    with pytest.raises(PlanError, match=r"a memory limit of .* for each worker") as raised:
        local_cluster(1, memory_limit=limit)
    assert repr(limit) in raised.value.found


def test_workers_are_never_forked() -> None:
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "fork"}),
        pytest.raises(PlanError, match='"fork"; expected "spawn"'),
    ):
        local_cluster(1)


def test_a_worker_may_not_start_a_cluster(pair: Client) -> None:
    found = pair.submit(_try_to_start, pure=False).result()
    assert found.startswith("local_cluster was called by a worker process")


def _try_to_start() -> str:
    try:
        local_cluster(1)
    except PlanError as error:
        return error.found
    return "started"


UNGUARDED = """
from tomocpt_stream.cluster import local_cluster
with local_cluster(1) as client:
    print("started")
"""


def test_a_script_without_a_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert "started" not in done.stdout.splitlines()
    assert 'below `if __name__ == "__main__":`' in done.stderr


def _about_this_process(dask_worker: Any) -> dict[str, Any]:
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    with open("/proc/self/cmdline") as file:  # noqa: PTH123  (a function for a worker)
        command = file.read()
    return {
        "process": os.getpid(),
        "threads": dask_worker.state.nthreads,
        "spawned": "spawn_main" in command,
        "allocator": "MALLOC_MMAP_THRESHOLD_=33554432" in open("/proc/self/environ").read(),  # noqa: PTH123
        "memory": dask_worker.memory_manager.memory_limit,
        "environment": {name: os.environ.get(name) for name in names},
    }


def test_a_local_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(os.environ)
    with local_cluster(memory_limit="1 GB") as client:
        assert dict(os.environ) == before
        about = sorted(client.run(_about_this_process).values(), key=lambda found: str(found["environment"]))
        assert [found["environment"]["CUDA_VISIBLE_DEVICES"] for found in about] == [
            "GPU-a,GPU-b",
            "GPU-b,GPU-a",
        ]
        for found in about:
            assert found["environment"]["OMP_NUM_THREADS"] == found["environment"]["MKL_NUM_THREADS"] == "2"
            assert found["environment"]["OPENBLAS_NUM_THREADS"] == "1"
            assert (found["threads"], found["memory"]) == (2, 1_000_000_000)
            assert found["spawned"]
            assert found["allocator"]  # read by glibc before anything else runs
        assert worker_count(client) == 2
        link = dashboard(client)
        assert link is not None
        assert link.startswith("http://127.0.0.1:")
    client.close()  # once more changes nothing
    assert client.status == "closed"
    until(lambda: not any(_lives(found["process"]) for found in about))


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_no_client_is_one_worker() -> None:
    assert worker_count(None) == 1
