"""Progress in a log: nothing of a short run, a line now and then of a long one."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from tests.clock import Clock
from tomocpt_stream.progress import Tally, WorkerProgress
from tomocpt_stream.progress_log import log_line, log_progress
from tomocpt_stream.rates import Course


@pytest.fixture
def clock() -> Clock:
    return Clock(1_000.0)


@pytest.fixture(autouse=True)
def _level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="tomocpt_stream")


def busy(worker: str, jobs: int, **numbers: float) -> Tally:
    return Tally(worker, jobs, running={"job": numbers})


def test_a_short_run_is_silent(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    progress = log_progress(clock=clock)
    for stage in ("ingest", "predict"):
        for done in range(0, 101, 10):
            progress(stage, done, 100)
            progress.workers(stage, [busy("a", 1, windows=done)])
            clock.now += 2.9
    assert not caplog.records


def test_a_line_every_so_often_and_one_at_the_end(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    progress = log_progress("TS_01", every=10, clock=clock)
    for done in range(25):
        progress("predict", done * 100_000, 2_500_000)
        clock.now += 1
    progress("predict", 2_500_000, 2_500_000)
    progress("predict", 2_500_000, 2_500_000)
    assert caplog.messages == [
        "predict TS_01: 40.0 %, 0.10 M voxels/s, 0:00:15 left",
        "predict TS_01: 80.0 %, 0.10 M voxels/s, 0:00:05 left",
        "predict TS_01: done in 0:00:25, 0.10 M voxels/s",
    ]
    assert {(record.name, record.levelname) for record in caplog.records} == {("tomocpt_stream", "INFO")}


def test_the_default_is_half_a_minute(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    progress = log_progress(clock=clock)
    progress("predict", 0, 100)
    clock.now += 29.9
    progress("predict", 1, 100)
    assert not caplog.records
    clock.now += 0.1
    progress("predict", 1, 100)
    assert len(caplog.records) == 1


def test_lines_keep_their_distance_after_a_long_task(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    progress = log_progress(every=10, clock=clock)
    for moment in (0, 27, 30, 36.9, 37, 38):
        clock.now = 1_000 + moment
        progress("predict", int(moment), 100)
    assert [message.split()[1] for message in caplog.messages] == ["27.0", "37.0"]


def test_news_of_workers_is_enough_for_a_line(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    progress = log_progress("TS_01", every=10, clock=clock)
    progress.workers("predict", [busy("a", 0, windows=1)])  # of a stage that did not begin
    progress("predict", 0, 1_000)
    tallies = [
        busy("a", 3, windows=300, voxels=300, bytes_read=4e6, computing=9),
        busy("b", 1, windows=60, voxels=100, bytes_read=2e6, computing=3),
    ]
    clock.now += 5
    progress("predict", 400, 1_000)
    progress.workers("predict", tallies)
    assert not caplog.records
    clock.now += 7
    progress.workers("predict", tallies)
    assert caplog.messages == [
        "predict TS_01: 40.0 %, 33.3 voxels/s, 0:00:18 left; 4 tasks done by 2 workers, "
        "30 windows/s, 6 MB read, computing 50% of the time"
    ]


def test_the_last_line_counts_the_last_task(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    progress = log_progress(every=10, clock=clock)
    tally = busy("this process", 0, done=100)
    progress("predict", 0, 100)
    progress.workers("predict", [tally])
    clock.now += 15
    progress("predict", 99, 100)
    progress("predict", 100, 100)
    tally.finish("job")
    progress("predict", 100, 100)
    progress.workers("predict", [tally])
    assert caplog.messages[1:] == ["predict: done in 0:00:15, 6.67 voxels/s; 1 task done by 1 worker"]


def test_each_tomogram_of_one_progress_has_its_own_time(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    progress = log_progress(every=10, clock=clock)
    for _ in range(2):
        progress("predict", 0, 100)
        clock.now += 9
        progress("predict", 100, 100)
    assert not caplog.records
    progress("predict", 0, 100)
    clock.now += 11
    progress("predict", 100, 100)
    assert caplog.messages == ["predict: done in 0:00:11, 9.09 voxels/s"]


def test_a_line_leaves_out_what_is_not_known() -> None:
    assert log_line(Course("train", 10, 2, 2, 0.0, 40.0)) == "train: 20.0 %"
    one = Course("ingest", 100, 0, 50, 0.0, 10.0, [busy("a", 1, done=50)])
    assert log_line(one, "b") == "ingest b: 50.0 %, 5 voxels/s, 0:00:10 left; 1 task done by 1 worker"
    done = Course("predict", 100, 100, 100, 0.0, 40.0, [Tally("a", 2)])
    assert log_line(done) == "predict: done in 0:00:40; 2 tasks done by 1 worker"
    assert log_line(Course("predict", 0, 0, 0, 0.0, 1.0)) == "predict: done in 0:00:01"


def test_it_listens_to_workers_too() -> None:
    assert isinstance(log_progress(), WorkerProgress)


def test_the_library_says_nothing_unless_asked_and_loads_no_terminal() -> None:
    code = """
import logging, sys
from tomocpt_stream.progress_log import log_progress
assert not {"rich", "click", "numpy", "dask", "distributed"} & set(sys.modules)
assert not logging.getLogger("tomocpt_stream").handlers
if sys.argv[1:]:
    logging.basicConfig(level="INFO", format="%(name)s %(message)s")
times = iter((0.0, 60.0))
progress = log_progress("TS", clock=lambda: next(times))
progress("predict", 0, 10)
progress("predict", 10, 10)
"""
    for words, said in (([], ""), (["loud"], "tomocpt_stream predict TS: done in 0:01:00, 0.167 voxels/s\n")):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
        )
        assert (done.stdout, done.stderr) == ("", said)
