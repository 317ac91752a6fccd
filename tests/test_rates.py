"""Rates over the wall time of a stage: what counts, when it begins anew, how it reads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.clock import Clock
from tomocpt_stream.progress import Tally
from tomocpt_stream.rates import Course, Courses, duration, figure, megabytes, pace, together, worker_rates


def tally(worker: str, jobs: int = 0, **numbers: float) -> Tally:
    return Tally(worker, jobs, running={"job": numbers})


def test_rate_and_time_left_are_over_the_wall_time_since_the_first_report() -> None:
    clock = Clock()
    courses = Courses(clock)
    courses.note("predict", 1_000, 9_000)
    clock.now += 4
    course = courses.note("predict", 3_000, 9_000)
    assert (course.seconds, course.gained, course.pace) == (4, 2_000, "500 voxels/s")
    assert course.left == 12
    assert not course.finished
    clock.now += 1
    course = courses.note("predict", 9_000, 9_000)
    assert (course.finished, course.left, course.seconds) == (True, 0, 5)


def test_a_stage_ends_with_its_last_task() -> None:
    courses = Courses(Clock())
    courses.note("predict", 0, 100)
    last = tally("a", done=100)
    courses.tell("predict", [Tally("b"), last])
    course = courses.note("predict", 100, 100)
    assert (course.finished, course.left) == (False, 0)
    last.finish("job")
    assert course.finished
    assert courses.note("predict", 40, 100) is not course


def test_before_there_is_a_rate_there_is_no_time_left() -> None:
    clock = Clock()
    courses = Courses(clock)
    assert courses.note("train", 5, 10).left is None
    clock.now += 10
    course = courses.note("train", 5, 10)
    assert (course.left, course.pace) == (None, "")
    assert courses.note("train", 6, 10).pace == "0.1 steps/s"


def test_what_an_earlier_run_did_is_no_speed() -> None:
    clock = Clock()
    courses = Courses(clock)
    courses.note("predict", 0, 1_000)
    clock.now += 10
    courses.note("predict", 900, 1_000)
    course = courses.tell("predict", [tally("a", voxels=60), tally("b", voxels=40)])
    assert course is not None
    assert (course.gained, course.left) == (100, 10)
    assert course.pace == "10 voxels/s"


def test_workers_never_did_more_than_the_stage() -> None:
    course = Course("predict", 100, 0, 50, 0.0, 10.0, [tally("a", voxels=80)])
    assert course.gained == 50


@pytest.mark.parametrize(
    ("reports", "began"),
    [
        ([("predict", 50, 100), ("predict", 40, 100)], 0),  # a worker died, its task begins again
        ([("predict", 100, 100), ("predict", 100, 100)], 0),
        ([("predict", 100, 100), ("predict", 0, 100)], 1),  # the next tomogram of the same size
        ([("predict", 50, 100), ("predict", 50, 200)], 1),  # one of another size
        ([("predict", 50, 100), ("ingest", 0, 9), ("predict", 0, 100)], 2),  # one after a failure
        ([("project", 50, 100), ("tilt", 0, 9), ("project", 60, 100)], 0),  # stages that take turns
    ],
)
def test_a_stage_begins_anew_with_the_next_tomogram(reports: list[tuple[str, int, int]], began: int) -> None:
    clock = Clock()
    courses = Courses(clock)
    heard = []
    for report in reports:
        heard.append(courses.note(*report))
        clock.now += 1
    course = heard[-1]
    assert course.began == began
    assert course.before == (reports[0][1] if began == 0 else reports[-1][1])


def test_a_new_course_forgets_the_workers_of_the_last() -> None:
    courses = Courses(Clock())
    courses.note("predict", 0, 10)
    courses.tell("predict", [tally("a", done=4)])
    assert courses.note("predict", 5, 10).tallies
    assert courses.note("predict", 0, 20).tallies == ()


def test_workers_of_an_unknown_stage_are_not_heard() -> None:
    assert Courses(Clock()).tell("predict", [tally("a", done=4)]) is None


def test_rates_of_each_worker_by_name() -> None:
    tallies = [
        tally("w10", 1, windows=20, voxels=4e6, bytes_read=3e6, computing=9),
        tally("w2", 3, windows=40, voxels=8e6, bytes_read=5e6, computing=5),
    ]
    course = Course("predict", 100_000_000, 0, 12_000_000, 100.0, 110.0, tallies)
    second, tenth = worker_rates(course)
    assert (second.name, tenth.name) == ("w2", "w10")
    assert (second.jobs, second.windows, second.units) == (3, 4.0, 8e5)
    assert (second.bytes_read, second.computing) == (5e6, 0.5)
    both = together([second, tenth], "both")
    assert (both.name, both.jobs, both.windows, both.units) == ("both", 4, 6.0, 1.2e6)
    assert both.bytes_read == 8e6
    assert both.computing == pytest.approx(0.7)
    assert together([], "none").computing == 0


def test_without_a_count_of_voxels_the_stage_is_shared_out() -> None:
    tallies = [tally("a", done=1), tally("b", done=3)]
    rates = worker_rates(Course("ingest", 1_000, 100, 500, 0.0, 10.0, tallies))
    assert [rate.units for rate in rates] == [10, 30]
    assert [rate.units for rate in worker_rates(Course("ingest", 9, 0, 0, 0.0, 1.0, [tally("a")]))] == [0]


def test_no_time_is_no_speed() -> None:
    (rate,) = worker_rates(
        Course("predict", 9, 0, 3, 5.0, 5.0, [tally("a", windows=3, voxels=3, computing=1)])
    )
    assert (rate.windows, rate.units, rate.computing) == (0, 0, 0)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.floats(0.5, 1e4))
def test_the_workers_make_up_the_whole(done: list[int], seconds: float) -> None:
    tallies = [tally(str(index), done=count) for index, count in enumerate(done)]
    course = Course("ingest", 10_000, 0, sum(done) * 7, 0.0, seconds, tallies)
    whole = together(worker_rates(course), "all")
    assert whole.units == pytest.approx(course.gained / seconds)


def test_numbers_read_as_words() -> None:
    assert pace(0, 1.0, "steps") == pace(5, 0.0, "steps") == ""
    assert pace(3, 2.0, "steps") == "1.5 steps/s"
    assert pace(5_000_000, 2.0, "voxels") == "2.50 M voxels/s"
    assert [figure(number) for number in (0.0, 0.1234, 31.44, 1_234.5, 99_999.0, 100_000.0)] == [
        *("0", "0.123", "31.4", "1,234", "99,999", "0.10 M"),
    ]
    assert [megabytes(size) for size in (0, 1_234_000, 123_400_000, 1.5e12)] == [
        *("0 MB", "1.23 MB", "123 MB", "1,500,000 MB"),
    ]
    assert [duration(seconds) for seconds in (0, 0.2, 59, 61, 3_600, 86_400, 200_000)] == [
        *("0:00:00", "0:00:01", "0:00:59", "0:01:01", "1:00:00", "1 d 0:00:00", "2 d 7:33:20"),
    ]
