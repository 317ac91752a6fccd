"""Attempts at jobs, what a worker keeps, and one job on a worker."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.jobs import OwnError, StrangeError
from tomocpt_stream import stages
from tomocpt_stream.errors import (
    ActionableError,
    BrokenSourceError,
    DuplicateError,
    FloodError,
    JobError,
    PlanError,
    SourceError,
)
from tomocpt_stream.stages import HOPELESS, TRIES, Attempts, Here, Job, Residents, Stage, let_go, perform

if TYPE_CHECKING:
    from collections.abc import Callable


def _attempts(total: int = 9, **options: Any) -> Attempts:
    return Attempts(Stage("predict", "TS_01", lambda *_: None, Here(None), total, **options))


def _job(number: int) -> Job:
    return Job(f"task {number}", number)


def _give_up(attempts: Attempts, number: int, error: Exception) -> None:
    assert [attempts.failed(_job(number), error) for _ in range(TRIES)] == [True, True, False]


def test_a_job_has_three_tries() -> None:
    attempts = _attempts()
    attempts.settle()
    _give_up(attempts, 5, OSError("the disk is full"))
    with pytest.raises(JobError) as raised:
        attempts.settle()
    assert raised.value.found == "predict of TS_01: task 5 failed 3 times: OSError: the disk is full"
    assert "run again with the same store" in raised.value.remedy
    assert isinstance(raised.value.__cause__, OSError)


def test_a_success_forgets_what_went_before() -> None:
    attempts = _attempts()
    for _ in range(2 * TRIES):
        assert attempts.failed(_job(1), OSError())
        attempts.succeeded(_job(1))
    attempts.settle()


def test_tries_are_counted_for_each_job() -> None:
    attempts = _attempts()
    for number in (1, 2, 1, 2):
        assert attempts.failed(_job(number), OSError())
    assert not attempts.failed(_job(2), OSError())
    assert attempts.failed(_job(3), OSError(), most=2)
    assert not attempts.failed(_job(3), OSError(), most=2)
    attempts.succeeded(_job(1))
    with pytest.raises(JobError, match=r"task 2 failed 3 times, also task 3; 2 of 9 in all: "):
        attempts.settle()


def test_up_to_three_jobs_are_named_and_the_others_counted() -> None:
    attempts = _attempts(100)
    attempts.succeeded(_job(0))
    for number in range(1, 14):
        _give_up(attempts, number, ValueError(f"number {number}"))
    with pytest.raises(JobError) as raised:
        attempts.settle()
    assert raised.value.found == (
        "predict of TS_01: task 1 failed 3 times, also task 2, task 3, 10 more; 13 of 100 in all: "
        "ValueError: number 1"
    )


@pytest.mark.parametrize("kind", [SourceError, JobError])
def test_the_class_and_the_phrases_of_the_cause_are_kept(kind: type[ActionableError]) -> None:
    attempts, cause = _attempts(tries=1), kind("no voxels", expected="some", remedy="look for them")
    assert not attempts.failed(_job(2), cause)
    with pytest.raises(kind) as raised:
        attempts.settle()
    assert (raised.value.expected, raised.value.remedy) == ("some", "look for them")
    assert raised.value.found == "predict of TS_01: task 2 failed: no voxels"
    assert raised.value.__cause__ is cause


def test_a_class_with_arguments_of_its_own_becomes_a_job_error() -> None:
    attempts = _attempts()
    _give_up(attempts, 1, OwnError("cuda:3"))
    with pytest.raises(
        JobError, match=r"task 1 failed 3 times: cuda:3 is hot; expected a cool one; wait"
    ) as raised:
        attempts.settle()
    assert isinstance(raised.value.__cause__, OwnError)


@pytest.mark.parametrize("kind", [PlanError, FloodError, DuplicateError, BrokenSourceError])
def test_a_final_error_is_raised_at_once(kind: type[ActionableError]) -> None:
    error = kind("found", expected="expected", remedy="remedy")
    with pytest.raises(kind) as raised:
        _attempts().failed(_job(7), error)
    assert raised.value is error
    assert error.__notes__ == ["in predict of TS_01: task 7"]


def test_eight_failed_jobs_and_no_success_are_enough() -> None:
    attempts = _attempts(100)
    for number in range(HOPELESS - 1):
        assert attempts.failed(_job(number), OSError("down"))
        assert attempts.failed(_job(number), OSError("down"))
    with pytest.raises(JobError) as raised:
        attempts.failed(_job(8), OSError("all is down"))
    assert raised.value.found == (
        "predict of TS_01: task 8 failed, also task 0, task 1, 5 more; 8 of 100 in all "
        "and none has succeeded: OSError: all is down"
    )


def test_given_up_jobs_count_among_the_eight() -> None:
    attempts = _attempts(100)
    for number in range(HOPELESS - 1):
        _give_up(attempts, number, OSError("down"))
    with pytest.raises(JobError, match=r"task 0 failed 3 times, also task 1, task 2, 5 more; 8 of 100"):
        attempts.failed(_job(8), OSError("down"))


def test_one_success_among_them_is_hope() -> None:
    attempts = _attempts(100)
    attempts.succeeded(_job(0))
    for number in range(1, 50):
        assert attempts.failed(_job(number), OSError("down"))


def test_a_second_try_waits_longer_than_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = [100.0], list[float]()
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=slept.append)
    monkeypatch.setattr("tomocpt_stream.stages.time", clock)
    attempts, job = _attempts(), _job(1)
    delays = [attempts.delay(job)]
    for _ in range(2):
        attempts.failed(job, OSError())
        delays.append(attempts.delay(job))
    assert delays == pytest.approx([0, 0.2, 0.8])
    now[0] += 0.5
    attempts.wait(job)
    now[0] += 3600  # the other jobs of the stage took this long
    attempts.wait(job)
    assert slept == pytest.approx([0.3, 0])


class _Buffer:
    """Stands for many bytes."""


def _fail_with(buffer: _Buffer, *, chained: bool) -> None:
    kept = [buffer]
    if not chained:
        raise OSError(f"{len(kept)} disks")
    try:
        _fail_with(buffer, chained=False)
    except OSError as error:
        raise ValueError("not read") from error


def _error(buffer: _Buffer, *, chained: bool) -> Exception:
    try:
        _fail_with(buffer, chained=chained)
    except (OSError, ValueError) as error:
        return error
    raise AssertionError


@pytest.mark.parametrize("chained", [False, True])
def test_a_failure_lets_go_of_its_buffers(chained: bool) -> None:
    buffer = _Buffer()
    error, there = _error(buffer, chained=chained), weakref.ref(buffer)
    del buffer
    assert there() is not None
    _attempts().failed(_job(1), error)
    assert there() is None
    assert error.__traceback__ is not None  # where it happened can still be told


def test_causes_that_go_round_in_a_circle() -> None:
    first, second = ValueError(), OSError()
    first.__cause__, second.__cause__ = second, first
    let_go(first)


def test_of_many_failures_only_the_first_error_is_held() -> None:
    attempts = _attempts(10_000)
    attempts.succeeded(_job(0))
    alive = []
    for number in range(1, 2000):
        error = StrangeError(f"TS_{number}", "cuda:0")
        alive.append(weakref.ref(error))
        for _ in range(TRIES):
            attempts.failed(_job(number), error)
        del error
    gc.collect()
    assert [reference() is not None for reference in alive] == [True] + [False] * 1998
    assert not attempts._failing
    assert len(attempts._labels) == 3
    with pytest.raises(JobError, match="3, 1996 more; 1999 of 10000 in all: StrangeError: TS_1 does"):
        attempts.settle()


@dataclass(frozen=True)
class _Address:
    token: str
    action: Callable[[], Any]

    def open(self) -> Any:
        return self.action()


def test_an_address_is_opened_once() -> None:
    residents, made = Residents(), iter(range(10))
    assert [residents.opened(_Address("a", lambda: next(made))) for _ in range(3)] == [0, 0, 0]
    assert residents.opened(_Address("b", lambda: next(made))) == 1
    assert residents.opened(_Address("none", lambda: None)) is None
    assert residents.opened(_Address("none", lambda: next(made))) is None


def test_the_addresses_asked_for_lately_stay_open() -> None:
    residents, count = Residents(), stages._KEPT
    opened: list[str] = []

    def ask(token: str) -> None:
        residents.opened(_Address(token, lambda: opened.append(token)))

    for number in range(count):
        ask(f"{number}")
    ask("0")  # now the one asked for last
    ask("new")
    ask("0")
    assert opened == [*map(str, range(count)), "new"]
    ask("1")
    assert opened[-1] == "1"
    assert len(residents._opened) == count


def test_an_address_that_cannot_be_opened_is_tried_again() -> None:
    residents = Residents()
    with pytest.raises(ZeroDivisionError):
        residents.opened(_Address("a", lambda: 1 / 0))
    assert residents.opened(_Address("a", lambda: 7)) == 7


def test_threads_that_ask_at_once_open_an_address_once() -> None:
    residents, opened, together = Residents(), list[object](), threading.Barrier(4)

    def make() -> object:
        time.sleep(0.01)  # long enough for the others to come
        opened.append(object())
        return opened[-1]

    def ask(_: int) -> object:
        together.wait(30)
        return residents.opened(_Address("a", make))

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ask, range(4))) == set(opened)
    assert len(opened) == 1


def test_keeping_and_dropping_do_not_wait_for_a_slow_store() -> None:
    residents, begun, go_on = Residents(), threading.Event(), threading.Event()

    def slow() -> str:
        begun.set()
        assert go_on.wait(30)
        return str(residents.named("picker"))

    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(residents.opened, _Address("a", slow))
        assert begun.wait(30)
        residents.keep("other", lambda: "other picker")
        residents.drop("other")
        residents.keep("picker", lambda: "picker")
        go_on.set()
        assert opening.result(30) == "picker"


def test_a_thing_stays_under_its_name() -> None:
    residents = Residents()
    residents.keep("picker", lambda: "first")
    residents.keep("picker", lambda: pytest.fail("it is there already"))
    assert residents.named("picker") == "first"
    assert residents.named("turns", lambda: "made") == residents.named("turns", lambda: "again") == "made"


def test_dropping_a_thing_forgets_what_holds_it() -> None:
    residents = Residents()
    residents.keep("picker", lambda: "first")
    assert residents.opened(_Address("map", lambda: residents.named("picker"))) == "first"
    residents.drop("picker")
    residents.drop("picker")
    with pytest.raises(JobError, match="does not hold the picker"):
        residents.opened(_Address("map", lambda: residents.named("picker")))
    residents.keep("picker", lambda: "second")
    assert residents.opened(_Address("map", lambda: residents.named("picker"))) == "second"


def test_dropping_a_thing_forgets_what_belongs_to_it() -> None:
    residents = Residents()
    for name in ("turns of one", "turns of two", "turns of none"):
        residents.named(name, object)
    with pytest.raises(ZeroDivisionError):
        residents.keep("one", lambda: 1 / 0)
    residents.drop("one")
    assert set(residents._named) == {"turns of two", "turns of none"}
    with pytest.raises(JobError, match="does not hold the one"):
        residents.named("one")


def test_a_thing_that_cannot_be_made_says_why_to_each_who_asks() -> None:
    residents, steps = Residents(), iter([OSError("no file"), OSError("no file yet"), None])

    def make() -> str:
        error = next(steps)
        if error is not None:
            raise error
        return "picker"

    with pytest.raises(OSError, match=r"no file$"):
        residents.keep("picker", make)
    with pytest.raises(OSError, match="no file yet"):
        residents.named("picker")
    assert residents.named("picker") == "picker"


def test_what_a_thing_was_made_of_is_not_held() -> None:
    residents, weights = Residents(), _Buffer()
    there = weakref.ref(weights)
    residents.keep("picker", partial(id, weights))
    del weights
    assert there() is None


def test_a_job_tells_what_it_has_done_about_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = [0.0], list[dict[str, float]]()
    monkeypatch.setattr("tomocpt_stream.stages.time", SimpleNamespace(monotonic=lambda: now[0]))

    def function(payload: str, opened: str, report: stages.Report) -> str:
        for step in range(40):
            now[0] = step / 10
            report({"done": step})
            if step == 15:
                report({"bytes_read": 7})
        return payload + opened

    answer, numbers = perform(function, Here("b"), "a", told.append)
    stages.residents.drop("")
    assert answer == "ab"
    assert numbers == {"done": 39, "bytes_read": 7}
    assert told == [{"done": 10}, {"done": 20, "bytes_read": 7}, {"done": 30, "bytes_read": 7}]


def test_a_job_that_fails_on_a_worker_lets_go_of_its_buffers() -> None:
    buffer = _Buffer()
    there = weakref.ref(buffer)

    def function(payload: list[_Buffer], opened: None, report: stages.Report) -> None:
        _fail_with(payload.pop(), chained=True)

    payload, told = [buffer], list[dict[str, float]]()
    del buffer
    with pytest.raises(ValueError, match="not read"):
        perform(function, Here(None, token="nothing"), payload, told.append)
    assert there() is None
    stages.residents.drop("")
