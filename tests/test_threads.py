"""Jobs on threads of the calling process: each is done once, and an error ends or names what failed."""

from __future__ import annotations

import itertools
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tomocpt_stream import threads
from tomocpt_stream.errors import BrokenSourceError, JobError, SourceError
from tomocpt_stream.progress import total
from tomocpt_stream.stages import Here, Job, Stage
from tomocpt_stream.threads import run_in_threads

if TYPE_CHECKING:
    from collections.abc import Callable

    from tomocpt_stream.progress import Tally


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause before another try."""
    monkeypatch.setattr(time, "sleep", lambda _: None)


def stage(function: Callable[..., Any], count: int) -> Stage[Any]:
    return Stage("fold", "TS_1", function, Here(None), count)


def jobs(count: int) -> list[Job]:
    return [Job(f"sheet {number}", number) for number in range(count)]


def square(number: int, _: None, report: Any) -> int:
    report({"done": 1, "voxels": number})
    report({"done": 2})
    return number * number


def test_every_job_is_answered_once_and_counted() -> None:
    seen: list[float] = []
    last: list[Tally] = []

    def watch(tallies: list[Tally]) -> None:
        last[:] = tallies
        assert threading.current_thread() is threading.main_thread()
        (tally,) = tallies
        assert tally.worker == "this process"
        seen.append(total(tallies))

    found = {job.label: answer for job, answer in run_in_threads(stage(square, 40), jobs(40), watch)}
    assert found == {f"sheet {number}": number * number for number in range(40)}
    assert seen == sorted(seen)
    assert seen[-1] == 80
    assert last[0].number("voxels") == sum(range(40))
    assert list(run_in_threads(stage(square, 0), [])) == []


def test_two_jobs_run_at_once_and_no_more() -> None:
    lock, running, most = threading.Lock(), 0, 0
    together = threading.Barrier(threads.THREADS)

    def work(number: int, _: None, report: Any) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        together.wait(10)
        with lock:
            running -= 1

    assert len(list(run_in_threads(stage(work, 10), jobs(10)))) == 10
    assert most == threads.THREADS


def test_jobs_are_taken_as_they_are_needed() -> None:
    taken = 0

    def ahead() -> Any:
        nonlocal taken
        for job in jobs(100):
            taken += 1
            yield job

    for done, _ in enumerate(run_in_threads(stage(square, 100), ahead()), start=1):
        assert taken <= done + threads.THREADS + 1


def test_a_job_that_fails_twice_is_done_at_the_third_try() -> None:
    tries = itertools.count()
    counted: list[float] = []
    last: list[Tally] = []

    def work(number: int, _: None, report: Any) -> int:
        report({"done": 1})
        if number == 3 and next(tries) < 2:
            report({"windows": 5})
            raise SourceError("a 503", expected="voxels", remedy="run again")
        return number

    def watch(tallies: list[Tally]) -> None:
        last[:] = tallies
        counted.append(total(tallies))

    assert sorted(answer for _, answer in run_in_threads(stage(work, 9), jobs(9), watch)) == list(range(9))
    assert counted[-1] == 9
    assert last[0].number("windows") == 0  # what a failed try reported does not count


HOLE = SourceError("a hole", expected="voxels", remedy="mend it")


@pytest.mark.parametrize("error", [HOLE, OSError("a hole")])
def test_what_always_fails_is_named_when_the_rest_is_done(error: Exception) -> None:
    tries = itertools.count(1)
    done: list[int] = []

    def work(number: int, _: None, report: Any) -> int:
        if number == 2:
            next(tries)
            raise error
        return number

    kind = SourceError if isinstance(error, SourceError) else JobError
    with pytest.raises(kind, match=r"fold of TS_1: sheet 2 failed 3 times: .*a hole") as caught:
        done.extend(answer for _, answer in run_in_threads(stage(work, 9), jobs(9)))
    assert caught.value.__cause__ is error
    assert sorted(done) == [0, 1, 3, 4, 5, 6, 7, 8]
    assert next(tries) == 4


class Interrupted(BaseException):
    """What is no failure of a job."""


@pytest.mark.parametrize(
    "error", [BrokenSourceError("no file", expected="one", remedy="copy it"), Interrupted()]
)
def test_an_error_that_ends_the_run_ends_the_other_jobs(error: BaseException) -> None:
    steps, failed = itertools.count(), threading.Event()

    def work(number: int, _: None, report: Any) -> None:
        if number == 1:
            failed.set()
            raise error
        failed.wait(10)
        for _step in range(1_000_000):
            next(steps)
            report({"done": 1})

    with pytest.raises(type(error)) as caught:
        list(run_in_threads(stage(work, 50), jobs(50)))
    assert caught.value is error
    assert next(steps) < 1_000_000


@pytest.mark.parametrize("how", ["leaves", "interrupts"])
def test_whoever_leaves_ends_all_jobs(how: str) -> None:
    steps = itertools.count()
    begun: list[int] = []

    def work(number: int, _: None, report: Any) -> None:
        begun.append(number)
        if number or how == "interrupts":
            for _step in range(1_000_000):
                next(steps)
                report({"done": 1})

    def interrupt(tallies: list[Tally]) -> None:
        raise Interrupted

    if how == "leaves":
        found = run_in_threads(stage(work, 9), jobs(9))
        next(found)
        found.close()
    else:
        with pytest.raises(Interrupted):
            list(run_in_threads(stage(work, 9), jobs(9), interrupt))
        assert set(begun) <= {0, 1}
    assert next(steps) < 2_000_000
    assert threading.active_count() == 1 or not any(
        thread.name.startswith("fold") for thread in threading.enumerate()
    )
