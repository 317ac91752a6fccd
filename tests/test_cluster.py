"""Runs on dask workers: what is under way, what stays behind, who dies, who joins, who else is there."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
import pytest
from distributed import Client, LocalCluster

from tests.clusters import kill, process_ids, wait_for_workers
from tests.jobs import Folder, Marks, jobs, stage, until
from tomocpt_stream import cluster
from tomocpt_stream.cluster import dashboard, hold_on_workers, local_cluster, visible_gpus, worker_count
from tomocpt_stream.dispatch import run_jobs
from tomocpt_stream.errors import CheckpointError, JobError, PlanError
from tomocpt_stream.progress import Tally, total
from tomocpt_stream.stages import Here, Job, Report, Stage, residents
from tomocpt_stream.submission import _line_of, _Run

if TYPE_CHECKING:
    from collections.abc import Iterator
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


@contextmanager
def own_cluster(count: int, *, processes: bool = True, **options: Any) -> Iterator[Client]:
    """A cluster as a user may have it; closed without a warning."""
    settings = {"threads_per_worker": 2, "dashboard_address": None, "memory_limit": 0, **options}
    with LocalCluster(n_workers=count, processes=processes, **settings) as local, Client(local) as client:
        yield client


def answers(marks: Marks, *deeds: str, client: Client, **options: Any) -> list[int]:
    run = run_jobs(stage(marks.folder, len(deeds)), jobs(*deeds), client=client, **options)
    return sorted(answer for _, answer in run)


def scheduler(client: Client) -> Any:
    """The scheduler, which lives in this process."""
    local: Any = client.cluster
    return local.scheduler


def address_of(client: Client) -> str:
    return str(scheduler(client).address)


def assert_idle(client: Client) -> None:
    until(lambda: not scheduler(client).tasks)
    until(lambda: not client.futures)


@contextmanager
def watching(client: Client) -> Iterator[dict[str, int]]:
    """The most jobs that the scheduler has given each worker at a time; looked at again and again."""
    most: dict[str, int] = {}
    end = threading.Event()

    def look() -> None:
        while not end.wait(0.001):
            for worker in list(scheduler(client).workers.values()):
                most[worker.address] = max(most.get(worker.address, 0), len(worker.processing))

    looker = threading.Thread(target=look)
    looker.start()
    try:
        yield most
    finally:
        end.set()
        looker.join()


def doze(payload: int, opened: None, report: Report) -> tuple[int, float, float]:
    """Return the process, and from when to when the job ran, by a clock that all processes share."""
    began = time.monotonic()
    time.sleep(payload / 1000)
    return os.getpid(), began, time.monotonic()


def doze_jobs(count: int) -> Iterator[Job]:
    """Jobs of unequal length, up to 20 ms."""
    for number in range(count):
        yield Job(f"task {number}", 1 + number * 7 % 20)


def overlap(spans: list[tuple[float, float]]) -> int:
    """Return how many spans of time overlap at most."""
    ends = sorted([(begin, 1) for begin, _ in spans] + [(end, -1) for _, end in spans])
    now = most = 0
    for _, step in ends:
        now += step
        most = max(most, now)
    return most


NOTHING: Stage[None] = Stage("predict", "TS_01", doze, Here(None, token="nothing"), 0)


def test_few_jobs_are_under_way_at_a_time(pair: Client) -> None:
    with watching(pair) as most:
        found = [answer for _, answer in run_jobs(replace(NOTHING, total=100), doze_jobs(100), client=pair)]
    assert len(found) == 100
    processes = {process for process, _, _ in found}
    assert processes == set(process_ids(pair).values())
    for process in processes:
        assert overlap([(begin, end) for by, begin, end in found if by == process]) == 2
    assert len(most) == 2
    assert max(most.values()) <= 3
    assert_idle(pair)


@pytest.mark.parametrize(
    ("count", "threads", "most_each", "settings"),
    [
        (2, 1, 2, {}),
        (1, 8, 3, {}),
        (2, 2, 3, {"distributed.scheduler.worker-saturation": "inf"}),
        (2, 2, 3, {"distributed.scheduler.worker-saturation": 1.0}),
        (2, 2, 3, {"distributed.scheduler.work-stealing": False}),
    ],
)
def test_clusters_as_users_have_them(
    count: int, threads: int, most_each: int, settings: dict[str, Any]
) -> None:
    with (
        dask.config.set(settings),
        own_cluster(count, processes=False, threads_per_worker=threads) as client,
        watching(client) as most,
    ):
        found = [answer for _, answer in run_jobs(NOTHING, doze_jobs(40), client=client)]
        assert len(found) == 40
        assert len(most) == count
        assert max(most.values()) <= most_each
        assert worker_count(client) == count
        assert_idle(client)


def objects() -> int:
    gc.collect()
    return len(gc.get_objects())


# The logs that dask keeps of its tasks are long; these are full after a few jobs.
SHORT_LOGS = {
    "distributed.admin.low-level-log-length": 20,
    "distributed.diagnostics.computations.max-history": 5,
}


def test_many_jobs_leave_nothing_behind() -> None:
    """Neither scheduler nor client, which both live in this process, grow with the number of jobs."""
    with dask.config.set(SHORT_LOGS), own_cluster(1, processes=False) as client:
        numbers: list[int] = []
        ahead = (Job(f"task {number}", 0) for number in range(700))
        for count, _ in enumerate(run_jobs(replace(NOTHING, total=700), ahead, client=client), start=1):
            if count in (200, 690):
                gc.collect()
                numbers.append(len(gc.get_objects()))
                assert len(scheduler(client).tasks) <= 2 * 3
                assert len(client.futures) <= 2 * 3
        assert numbers[1] - numbers[0] < 490  # less than one for each job
        assert_idle(client)


def test_many_runs_leave_nothing_behind() -> None:
    with dask.config.set(SHORT_LOGS), own_cluster(1, processes=False) as client:
        left: list[tuple[int, int, int]] = []
        for count in range(40):
            list(run_jobs(NOTHING, [Job("task", 0)], client=client))
            if count in (20, 39):
                topics = [name for name in scheduler(client)._broker._topics if name.startswith("tomocpt")]
                left.append((len(topics), len(client._event_handlers), ours()))
        assert left[0] == left[1]
        assert left[0][0] == 1
        assert not _line_of(client).runs


def ours() -> int:
    """Return how many objects of runs there are, of this test and of others."""
    gc.collect()
    modules = ("tomocpt_stream.submission", "tomocpt_stream.progress")
    return sum(type(thing).__module__ in modules for thing in gc.get_objects())


def test_keys_can_be_read_by_people(pair: Client, marks: Marks) -> None:
    assert_idle(pair)
    run = run_jobs(stage(marks.folder, 2), jobs("await end", "await end", ""), client=pair)
    next(run)
    until(lambda: len(scheduler(pair).tasks) == 2)
    tasks = list(scheduler(pair).tasks.values())
    assert {task.key.rpartition("-")[0] for task in tasks} == {
        "predict-1 of 2, TS_01, task 1 of 3 (z 1)",
        "predict-2 of 2, TS_01, task 2 of 3 (z 2)",
    }
    assert {task.prefix.name for task in tasks} == {"predict"}
    marks.leave("end")
    assert len(list(run)) == 2


def test_a_job_that_waits_for_its_next_try_keeps_nobody_waiting(
    pair: Client, marks: Marks, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, step = [0.0], [0.0]

    def monotonic() -> float:
        now[0] += step[0]
        return now[0]

    monkeypatch.setattr("tomocpt_stream.stages.time", types.SimpleNamespace(monotonic=monotonic))
    deeds = ["fail-once value", *[""] * 20]
    found = []
    for _, answer in run_jobs(stage(marks.folder, 21), jobs(*deeds), client=pair):
        found.append(answer)
        if len(found) == 20:
            assert len(marks.of("1-try")) == 1
            step[0] = 0.1  # from now on time passes; the failure itself may be heard of later
    assert found[-1] == 1
    assert len(marks.of("1-try")) == 2


def raise_unknown(payload: None, opened: None, report: Report) -> None:
    """Raise an error of a module that only this process has."""
    module = sys.modules["cuda_of_the_worker"] = types.ModuleType("cuda_of_the_worker")
    exec("class OutOfMemoryError(Exception): ...", module.__dict__)
    raise module.OutOfMemoryError("512 MB do not fit")


def test_an_error_that_only_the_worker_knows_is_told(pair: Client) -> None:
    failing = replace(NOTHING, function=raise_unknown, tries=1)
    with pytest.raises(JobError, match=r"it failed: .* load: cuda_of_the_worker OutOf.* 512 MB"):
        list(run_jobs(failing, [Job("it", None)], client=pair))


def test_a_job_that_cannot_be_sent_ends_the_run(pair: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is logged holds the frames that it comes from, and their futures.
    monkeypatch.setattr(logging.getLogger("distributed.protocol.pickle"), "disabled", True)
    with pytest.raises(TypeError, match="serialize"):
        list(run_jobs(NOTHING, [Job("fine", 1), Job("a lock", threading.Lock())], client=pair))
    gc.collect()  # dask's own frames hold one another
    assert_idle(pair)


def test_a_closed_client_is_an_error(pair: Client, marks: Marks) -> None:
    with Client(address_of(pair)) as client:
        run = run_jobs(stage(marks.folder, 2), jobs("", "await end"), client=client)
        next(run)
    with pytest.raises(JobError, match=r"the scheduler is gone \(the client is closed\)"):
        list(run)
    marks.leave("end")
    assert_idle(pair)


@pytest.fixture
def distant_scheduler(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A scheduler without workers in a process of its own."""
    file = tmp_path / "scheduler.json"
    words = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
    process = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_scheduler", *words], stderr=subprocess.DEVNULL
    )
    try:
        until(file.exists)
        yield str(file), process
    finally:
        process.kill()
        process.wait()


def test_a_scheduler_that_is_gone_is_an_error(
    marks: Marks,
    distant_scheduler: tuple[str, subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All jobs under way are lost at once, which is not a failure of each."""
    monkeypatch.setattr("tomocpt_stream.submission._Run._room", lambda _: 20)
    file, process = distant_scheduler
    with Client(scheduler_file=file, timeout=1) as client:
        killer = threading.Timer(0.5, process.kill)
        killer.start()
        with pytest.raises(JobError, match=r"predict of TS_01: the scheduler is gone"):
            answers(marks, *[""] * 20, client=client)
        killer.join()


def test_a_killed_worker_costs_a_try(pair: Client, marks: Marks) -> None:
    before = set(process_ids(pair).values())
    assert answers(marks, "", "die 1", *[""] * 6, client=pair) == [n * n for n in range(1, 9)]
    first, second = marks.of("2-try")
    assert first in before
    assert first != second
    assert_idle(pair)


def test_a_job_that_kills_its_workers_is_named(
    pair: Client, marks: Marks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler(pair), "allowed_failures", 1)
    with pytest.raises(
        JobError, match=r"TS_01: task 2 of 8 \(z 2\) failed 2 times: its worker died"
    ) as raised:
        answers(marks, "", "die", *[""] * 6, client=pair)
    assert "its worker died 2 times, the last at tcp://127.0.0.1:" in raised.value.found
    assert "memory limit" in raised.value.remedy
    # Twice among others, twice alone.
    assert len(marks.of("2-try")) == 4
    assert [bool(marks.of(f"{n}-end")) for n in range(1, 9)] == [True, False] + [True] * 6
    assert_idle(pair)


def stumble(payload: None, marks: Marks, report: Report) -> int:
    """Fail, die twice, and live."""
    tries = marks.leave("try") + 1
    if tries == 1:
        raise OSError("the disk is busy")
    if tries < 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return tries


def test_a_failure_before_is_not_counted_with_deaths(
    pair: Client, marks: Marks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever died among others gets a run of its own, whatever it met before."""
    monkeypatch.setattr(scheduler(pair), "allowed_failures", 1)
    run = run_jobs(stage(marks.folder, 1, stumble), [Job("task", None)], client=pair)
    assert [answer for _, answer in run] == [4]


def test_a_job_that_nobody_waits_for_ends_with_its_next_report(pair: Client, marks: Marks) -> None:
    run = run_jobs(stage(marks.folder, 2), jobs("", "tell never"), client=pair)
    next(run)
    marks.wait_for("2-try")
    run.close()  # type: ignore[attr-defined]
    until(lambda: not any(pair.run(_executing).values()))
    assert not marks.of("2-end")


def _executing(dask_worker: Any) -> int:
    return int(dask_worker.state.executing_count)


def test_a_suspect_runs_when_nothing_else_does(
    pair: Client, marks: Marks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It became one while the others were under way, one of them for a while after."""
    monkeypatch.setattr(scheduler(pair), "allowed_failures", 1)
    submitted: list[tuple[bool, int]] = []
    submit = _Run._submit

    def noted(self: _Run, job: Job, *, alone: bool = False) -> None:
        submitted.append((alone, len(self._under_way)))
        submit(self, job, alone=alone)

    def let_go() -> None:
        marks.wait_for("1-try", 2)
        time.sleep(0.6)  # in which the first job is found to have killed its second worker
        marks.leave("end")

    monkeypatch.setattr(_Run, "_submit", noted)
    helper = threading.Thread(target=let_go)
    helper.start()
    with pytest.raises(JobError, match="task 1 of 3"):
        answers(marks, "die", "await end", "await end", client=pair)
    helper.join()
    assert (True, 0) in submitted
    assert {under_way for alone, under_way in submitted if alone} == {0}


def fall(payload: None, marks: Marks, report: Report) -> None:
    """Die on the first worker, when the client has heard of the job; live on the second."""
    tries = marks.leave("try") + 1
    number: Any = np.int64(tries)  # as sums over arrays are
    while not marks.of(f"heard-{tries}"):
        report({"done": number})
        time.sleep(0.01)
    if tries == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_job_counts_for_one_worker_at_a_time(pair: Client, marks: Marks) -> None:
    seen: list[tuple[float, int]] = []

    def watch(tallies: list[Tally]) -> None:
        seen.append((total(tallies), sum(len(tally.running) for tally in tallies)))
        if total(tallies):
            marks.leave(f"heard-{total(tallies):g}")

    list(run_jobs(stage(marks.folder, 1, fall), [Job("task", None)], client=pair, watch=watch))
    assert len(set(marks.of("try"))) == 2
    # What the first one told goes when the second one tells, and is never added to it.
    assert list(dict.fromkeys(seen)) == [(1, 1), (2, 1), (2, 0)]


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
        run = pool.submit(answers, marks, *["await 4-end"] * 3, "", client=client)
        local.scale(1)
        # Three jobs wait on the first worker for the fourth, which only another worker can take.
        until(lambda: sum(len(marks.of(f"{number}-try")) for number in (1, 2, 3)) == 2)
        local.scale(2)
        assert run.result(60) == [1, 4, 9, 16]
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
        "allocator": "MALLOC_TRIM_THRESHOLD_" in open("/proc/self/environ").read(),  # noqa: PTH123
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
