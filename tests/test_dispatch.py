"""Jobs in the calling process and on the workers of a cluster: the same answers, the same errors."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.jobs import Marks, jobs, stage, until
from tomocpt_stream.dispatch import run_jobs
from tomocpt_stream.errors import DuplicateError, FloodError, JobError, PlanError, SourceError
from tomocpt_stream.progress import Tally, total
from tomocpt_stream.stages import HOPELESS, TRIES, Job, Report

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Jobs under way at most: three for each of the two workers.
MOST = 6


@pytest.fixture(params=["here", "cluster"])
def client(request: pytest.FixtureRequest) -> Any:
    return None if request.param == "here" else request.getfixturevalue("workers")


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two tries of a job a hundredth of the time passes."""
    clock = SimpleNamespace(
        monotonic=lambda: 100 * time.monotonic(), sleep=lambda seconds: time.sleep(seconds / 100)
    )
    monkeypatch.setattr("tomocpt_stream.stages.time", clock)


@pytest.fixture
def marks(tmp_path: Path) -> Marks:
    return Marks(tmp_path)


def run(marks: Marks, *deeds: str, client: Any, **options: Any) -> dict[str, Any]:
    """Run one job for each deed; return the answers by the jobs' labels."""
    found: dict[str, Any] = {}
    for job, answer in run_jobs(stage(marks.folder, len(deeds)), jobs(*deeds), client=client, **options):
        assert job.label not in found
        found[job.label] = answer
    return found


def started(marks: Marks, count: int) -> list[int]:
    """How often each of so many jobs was begun."""
    return [len(marks.of(f"{number}-try")) for number in range(1, count + 1)]


def test_every_job_is_answered_once(client: Any, marks: Marks) -> None:
    found = run(marks, *[""] * 20, client=client)
    assert found == {f"task {n} of 20 (z {n})": n * n for n in range(1, 21)}
    assert started(marks, 20) == [1] * 20


def test_no_job_is_no_work(client: Any, marks: Marks) -> None:
    assert run(marks, client=client, watch=pytest.fail) == {}


def test_a_job_that_fails_is_tried_again_after_the_others(client: Any, marks: Marks) -> None:
    found = run(marks, "fail-once value", *[""] * 8, client=client)
    assert sorted(found.values()) == [n * n for n in range(1, 10)]
    assert started(marks, 9) == [2] + [1] * 8
    assert client is not None or list(found)[-1].startswith("task 1 ")


def test_a_failing_store_is_given_a_moment(marks: Marks, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: 0.0, sleep=slept.append)
    monkeypatch.setattr("tomocpt_stream.stages.time", clock)
    with pytest.raises(JobError):
        run(marks, "", "fail value", client=None)
    assert [seconds for seconds in slept if seconds] == pytest.approx([0.2, 0.8])


def test_a_job_that_always_fails_is_named_when_the_others_are_done(client: Any, marks: Marks) -> None:
    with pytest.raises(JobError) as raised:
        run(marks, "fail value", *[""] * 8, client=client)
    assert [len(marks.of(f"{number}-end")) for number in range(1, 10)] == [0] + [1] * 8
    assert started(marks, 9) == [TRIES] + [1] * 8
    assert raised.value.found == (
        "predict of TS_01: task 1 of 9 (z 1) failed 3 times: ValueError: the device has stumbled"
    )
    cause = raised.value.__cause__
    assert type(cause) is ValueError
    assert traceback.extract_tb(cause.__traceback__)[-1].name == "act"  # where it happened, wherever that was


def test_of_many_that_fail_three_are_named(client: Any, marks: Marks) -> None:
    deeds = ["", "fail value", "fail value", "", "fail value", "fail value", "fail value", ""]
    with pytest.raises(
        JobError, match=r"task \d of 8 .* failed 3 times, also .*, 2 more; 5 of 8 in all: "
    ) as raised:
        run(marks, *deeds, client=client)
    named = {n for n in range(1, 9) if f"task {n} of 8 (z {n})" in raised.value.found}
    assert len(named) == 3
    assert named <= {2, 3, 5, 6, 7}
    assert [len(marks.of(f"{n}-end")) for n in (1, 4, 8)] == [1, 1, 1]


def test_an_error_keeps_its_class_and_its_remedy(client: Any, marks: Marks) -> None:
    with pytest.raises(SourceError) as raised:
        run(marks, "", "fail source", client=client)
    assert raised.value.found == "predict of TS_01: task 2 of 2 (z 2) failed 3 times: no voxels"
    assert (raised.value.expected, raised.value.remedy) == ("what is right", "do better")
    assert isinstance(raised.value.__cause__, SourceError)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("strange", "TS_01 does not fit cuda:3"),
        ("locked", "the device is locked"),
        ("own", "cuda:3 is hot"),
    ],
)
def test_errors_that_do_not_travel_are_told_all_the_same(
    client: Any, marks: Marks, what: str, said: str
) -> None:
    with pytest.raises(JobError) as raised:
        run(marks, "", f"fail {what}", client=client)
    assert raised.value.found.startswith("predict of TS_01: task 2 of 2 (z 2) failed 3 times: ")
    assert said in raised.value.found
    assert started(marks, 2) == [1, TRIES]


@pytest.mark.parametrize(
    ("what", "kind"), [("plan", PlanError), ("flood", FloodError), ("duplicate", DuplicateError)]
)
def test_a_final_error_ends_the_run(client: Any, marks: Marks, what: str, kind: type[Exception]) -> None:
    deeds = [f"fail {what}", *["await end"] * 30]
    with pytest.raises(kind) as raised:
        run(marks, *deeds, client=client)
    assert raised.value.__notes__ == ["in predict of TS_01: task 1 of 31 (z 1)"]
    marks.leave("end")
    assert_idle(client)
    assert started(marks, 1) == [1]
    assert sum(started(marks, 31)) <= (1 if client is None else MOST)


def test_a_run_in_which_all_fails_ends_early(client: Any, marks: Marks) -> None:
    with pytest.raises(JobError, match=r"\d of 40 in all and none has succeeded: ValueError"):
        run(marks, *["fail value"] * 40, client=client)
    assert_idle(client)
    tries = started(marks, 40)
    if client is None:
        assert tries == [1] * HOPELESS + [0] * (40 - HOPELESS)
    else:
        assert HOPELESS <= sum(tries) <= HOPELESS + MOST


def assert_idle(client: Any) -> None:
    """Nothing is left on the scheduler or in the client."""
    if client is not None:
        until(lambda: not client.cluster.scheduler.tasks)
        until(lambda: not client.futures)


def _boom(when: str) -> Any:
    """A watcher that raises an error of its own when a job reports, or when it is finished."""

    def watch(tallies: list[Tally]) -> None:
        if any(tally.running if when == "running" else tally.jobs for tally in tallies):
            raise LookupError("nobody looks") from KeyError("the terminal is gone")

    return watch


@pytest.mark.parametrize("when", ["running", "finished"])
def test_a_watcher_that_raises_ends_the_run(client: Any, marks: Marks, when: str) -> None:
    deeds = ["tell end" if when == "running" else "", *["await end"] * 30]
    with pytest.raises(LookupError, match="nobody looks") as raised:
        run(marks, *deeds, client=client, watch=_boom(when))
    assert isinstance(raised.value.__cause__, KeyError)
    marks.leave("end")
    assert_idle(client)
    assert started(marks, 1) == [1]  # which is no failure of the job
    assert sum(started(marks, 31)) <= (1 if client is None else MOST + 1)


def test_the_numbers_of_jobs_add_up(client: Any, marks: Marks) -> None:
    seen: list[list[Tally]] = []
    run(marks, "fail-once value", *[""] * 9, client=client, watch=seen.append)
    tallies = seen[-1]
    assert client is not None or [tally.worker for tally in tallies] == ["this process"]
    assert len({tally.worker for tally in tallies}) == len(tallies) <= 2
    assert sum(tally.jobs for tally in tallies) == 10
    # "done" ends at 2 and "voxels" is the job's number; a try that failed counts for nothing.
    assert total(tallies) == 2 * 10
    assert total(tallies, "voxels") == sum(range(1, 11))
    assert total(tallies, "seconds") == 0
    assert not any(tally.running for tally in tallies)


def test_a_running_job_counts_and_keeps_what_it_told_before(client: Any, marks: Marks) -> None:
    seen: list[dict[str, float]] = []

    def watch(tallies: list[Tally]) -> None:
        numbers = {name: total(tallies, name) for name in ("done", "voxels", "seconds")}
        seen.append(numbers)
        if numbers["seconds"]:
            marks.leave("enough")

    run(marks, "tell enough", client=client, watch=watch)
    assert {"done": 1, "voxels": 1, "seconds": 1} in seen
    assert seen[-1] == {"done": 2, "voxels": 1, "seconds": 1}
    assert [numbers["done"] for numbers in seen] == sorted(numbers["done"] for numbers in seen)


def test_jobs_are_asked_for_as_they_are_needed(client: Any, marks: Marks) -> None:
    asked = answered = 0
    ahead: list[int] = []

    def more() -> Iterator[Job]:
        nonlocal asked
        for job in jobs(*[""] * 40):
            asked += 1
            ahead.append(asked - answered)
            yield job

    for _ in run_jobs(stage(marks.folder, 40), more(), client=client):
        answered += 1
    assert answered == 40
    # An answer that has come, and waits to be taken, is no longer under way.
    assert max(ahead) <= (1 if client is None else 2 * MOST)


def test_jobs_that_cannot_be_made_end_the_run(client: Any, marks: Marks) -> None:
    def more() -> Iterator[Job]:
        yield from jobs("", "")
        raise OSError("the receipts cannot be read")

    with pytest.raises(OSError, match="the receipts cannot be read"):
        list(run_jobs(stage(marks.folder, 9), more(), client=client))
    assert_idle(client)


def test_who_stops_asking_ends_the_run(client: Any, marks: Marks) -> None:
    deeds = ["", *["await end"] * 30]
    for _, answer in run_jobs(stage(marks.folder, 31), jobs(*deeds), client=client):
        assert answer == 1
        break
    marks.leave("end")
    assert_idle(client)
    assert sum(started(marks, 31)) <= (1 if client is None else MOST + 1)


def test_ctrl_c_ends_the_run(client: Any, marks: Marks) -> None:
    def press() -> None:
        marks.wait_for("1-try")
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        run(marks, *["await end"] * 30, client=client)
    presser.join()
    marks.leave("end")
    assert_idle(client)
    assert started(marks, 1) == [1]
    assert sum(started(marks, 30)) <= (1 if client is None else MOST)


def interrupt(payload: Any, marks: Marks, report: Report) -> None:
    marks.leave("try")
    raise KeyboardInterrupt


def test_an_interrupt_is_no_failure(marks: Marks) -> None:
    with pytest.raises(KeyboardInterrupt):
        list(run_jobs(stage(marks.folder, 9, interrupt), jobs("", "", "")))
    assert len(marks.of("try")) == 1


def test_the_address_is_opened_once_for_a_run_here(marks: Marks) -> None:
    opened = 0

    class Counted:
        token = "counted"

        def open(self) -> Marks:
            nonlocal opened
            opened += 1
            return marks

    list(run_jobs(replace(stage(marks.folder, 5), address=Counted()), jobs(*[""] * 5)))
    assert opened == 1
