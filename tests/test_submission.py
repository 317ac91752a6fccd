"""Runs on dask workers: what is under way, what stays behind, who dies, who is gone."""

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
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
import pytest
from distributed import Client

from tests.clusters import (
    address_of,
    assert_idle,
    own_cluster,
    process_ids,
    scheduler,
    wait_for_workers,
)
from tests.jobs import Marks, answers, jobs, stage, until
from tomocpt_stream.cluster import worker_count
from tomocpt_stream.dispatch import run_jobs
from tomocpt_stream.errors import JobError
from tomocpt_stream.progress import Tally, total
from tomocpt_stream.stages import Here, Job, Report, Stage
from tomocpt_stream.submission import _line_of, _Run, _UnderWay

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


def test_the_last_jobs_go_to_idle_workers(pair: Client) -> None:
    with watching(pair) as most:
        jobs = (Job(f"task {number}", 60 + 10 * number) for number in range(4))
        assert len(list(run_jobs(replace(NOTHING, total=4), jobs, client=pair))) == 4
    assert sorted(most.values()) == [1, 1]


def test_a_worker_without_a_job_is_given_one(pair: Client, marks: Marks) -> None:
    # Two of the last jobs have gone to one worker.
    run = _Run(stage(marks.folder, 9), pair, lambda _: None)
    try:
        run._workers, run._begun = 2, 9
        future: Any = None
        run._under_way = {
            n: _UnderWay(Job(f"task {n}", n), future, alone=False, worker="a") for n in (101, 102)
        }
        assert run._idle() == 1
        run._under_way[103] = _UnderWay(Job("task 3", 3), future, alone=False)  # on its way to the other
        assert run._idle() == 0
        run._under_way[103].worker = "b"
        assert run._idle() == 0
        # However many are under way in all, the worker without one gets one, and then no more.
        del run._under_way[103]
        run._asked, run._limit = time.monotonic() + 60, 2
        run._fill(Job(f"task {n}", (n, "")) for n in range(4, 9))
        assert len(run._under_way) == 3
        until(lambda: run._under_way[run._submitted].future.status == "finished")
    finally:
        run._under_way = {}
        run.close()


def test_only_the_last_jobs_say_that_they_have_begun(pair: Client, marks: Marks) -> None:
    seen: set[str] = set()

    def watch(tallies: list[Tally]) -> None:
        seen.update(number for tally in tallies for number in tally.running)

    list(run_jobs(stage(marks.folder, 100), jobs(*[""] * 100), client=pair, watch=watch))
    assert {int(number) for number in seen} <= set(range(100 - 2 * 6, 101))


def test_where_a_job_runs_is_known_at_once(pair: Client, marks: Marks) -> None:
    run = _Run(stage(marks.folder, 2), pair, lambda _: None)
    answers_ = run.answers(jobs("await end", "await end"))
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(list, answers_)
        until(lambda: {one.worker for one in list(run._under_way.values())} - {None} and run._idle() == 0)
        until(lambda: len({one.worker for one in list(run._under_way.values())} - {None}) == 2)
        marks.leave("end")
        assert len(found.result(60)) == 2
    run.close()


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
    run = run_jobs(stage(marks.folder, 5), jobs("await end", "await end", ""), client=pair)
    next(run)
    until(lambda: len(scheduler(pair).tasks) == 2)
    tasks = list(scheduler(pair).tasks.values())
    assert {task.key.rpartition("-")[0] for task in tasks} == {
        "predict-1 of 5, TS_01, task 1 of 3 (z 1)",
        "predict-2 of 5, TS_01, task 2 of 3 (z 2)",
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
    words = [
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--dashboard-address",
        "127.0.0.1:0",
        "--scheduler-file",
        str(file),
    ]
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
    assert list(dict.fromkeys(seen)) == [(0, 1), (1, 1), (2, 1), (2, 0)]
