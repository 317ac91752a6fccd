"""What the commands show: lines of facts, bars where somebody looks, a log where nobody does."""

from __future__ import annotations

import io
import logging
import re
import warnings
from contextlib import redirect_stderr
from functools import partial

import numpy as np
import pytest

from tomocpt_stream.blocks import Window, plan_blocks
from tomocpt_stream.errors import SourceError
from tomocpt_stream.frame import working_grid
from tomocpt_stream.progress import Tally
from tomocpt_stream.progress_log import log_progress
from tomocpt_stream.terminal import (
    cluster_line,
    count,
    fact_lines,
    facts_line,
    log_to_stderr,
    on_terminal,
    plan_line,
    rate,
    say_failure,
    show_progress,
    show_warning,
    traffic_line,
)
from tomocpt_stream.tomogram import open_tomogram
from tomocpt_stream.traffic import Traffic


def test_lines_carry_their_units() -> None:
    tomogram = open_tomogram(np.zeros((10, 20, 30), np.float32), voxel_size=12.5, name="TS")
    assert facts_line(tomogram) == "TS: 10 x 20 x 30 (zyx) = 6,000 voxels of 12.5 Å"
    assert rate(tomogram, 2.0) == "3,000 voxels/s"
    grid = working_grid((100, 100, 100), 10.0, 14.5)
    plan = plan_blocks(grid.shape, Window())
    assert plan_line(grid, plan) == f"  working voxel size 14.5 Å; {plan}"
    assert plan_line(grid, plan, workers=3) == f"  working voxel size 14.5 Å; {plan} in each of 3 workers"
    assert str(plan).endswith("GB")


def test_what_was_fetched_stands_beside_what_is_stored() -> None:
    traffic = Traffic()
    for _ in range(2):
        traffic.add(123_456_789, "0/0/0")
    assert traffic_line(traffic) == "  fetched 247 MB in 2 requests, 2.00 times the 123 MB stored"
    assert traffic_line(Traffic()) == "  fetched 0 MB in 0 requests, 0.00 times the 0 MB stored"


def test_a_cluster_is_its_size_and_where_to_look_at_it() -> None:
    threads = {"tcp://10.0.0.2:3331": 2, "tcp://10.0.0.3:3332": 2}
    line = cluster_line(threads, "tcp://10.0.0.1:8786", "http://10.0.0.1:8787/status")
    assert line == ("2 workers, 4 threads at tcp://10.0.0.1:8786; dashboard http://10.0.0.1:8787/status")
    assert cluster_line({"a": 1}, "inproc://here", None) == "1 worker, 1 thread at inproc://here"


def test_facts_stand_in_columns_with_their_units() -> None:
    facts = {
        "name": "TS",
        "shape": [10, 20, 30],
        "voxel_size": 12.50,
        "stated_voxel_sizes": [12.5, 12.5, 12.25],
        "axis_order": [1, 2, 3],
        "extended_header_type": "",
        "labels": ["first", "second"],
    }
    assert list(fact_lines(facts)) == [
        "name                  TS",
        "shape                 10 x 20 x 30 voxels (z, y, x)",
        "voxel size            12.5 Å",
        "stated voxel sizes    12.5, 12.5, 12.25 Å",
        "axis order            1, 2, 3",
        "extended header type  none",
        "labels                first",
        "                      second",
    ]
    assert list(fact_lines({})) == []


def test_numbers_read_as_words() -> None:
    assert [count(number, "pick") for number in (0, 1, 2)] == ["0 picks", "1 pick", "2 picks"]


class Screen(io.StringIO):
    """A terminal that remembers."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """A terminal of 120 columns."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return Screen()


def test_bars_where_somebody_looks(screen: Screen) -> None:
    with redirect_stderr(screen), show_progress("TS_01") as progress:
        progress("predict", 1, 2)
        progress.workers("predict", [Tally("a"), Tally("b")])
        progress("predict", 2, 2)
    shown = screen.getvalue()
    assert "predict" in shown
    assert "100%" in shown


@pytest.mark.parametrize("kind", ["dumb", "unknown"])
def test_a_terminal_that_cannot_redraw_is_none(
    screen: Screen, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    with redirect_stderr(screen):
        assert on_terminal()
        monkeypatch.setenv("TERM", kind)
        assert not on_terminal()
        with show_progress() as progress:
            progress("predict", 1, 2)
            progress("predict", 2, 2)
    assert screen.getvalue() == ""


def test_short_work_is_silent_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with log_to_stderr(), show_progress() as progress:
        progress("predict", 1, 2)
        progress("predict", 2, 2)
    assert capsys.readouterr() == ("", "")


def test_long_work_is_logged_where_nobody_looks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter((0.0, 31.0))
    slow = partial(log_progress, clock=lambda: next(times))
    monkeypatch.setattr("tomocpt_stream.terminal.log_progress", slow)
    with log_to_stderr(), show_progress("TS_01") as progress:
        progress("predict", 0, 62)
        progress("predict", 31, 62)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d predict TS_01: 50.0 %, 1 voxels/s, 0:00:31 left\n", shown.err
    )


def test_the_log_on_a_terminal_needs_no_time_of_day(screen: Screen) -> None:
    logger = logging.getLogger("tomocpt_stream.request")
    with redirect_stderr(screen), log_to_stderr():
        logger.info("waiting for %s", "a worker")
        logger.debug("a detail")
    assert screen.getvalue() == "waiting for a worker\n"


def test_the_log_is_left_as_it_was(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("tomocpt_stream")
    caplog.set_level(logging.ERROR, logger=logger.name)
    before = logging.ERROR, list(logger.handlers)
    with log_to_stderr():
        assert logger.isEnabledFor(logging.INFO)
    with pytest.raises(KeyboardInterrupt), log_to_stderr():
        raise KeyboardInterrupt
    assert (logger.level, logger.handlers) == before
    logger.info("nobody listens")
    assert capsys.readouterr().err == ""


def test_a_foreseen_failure_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say_failure("a.mrc", SourceError("found", expected="wanted", remedy="do this"))
    assert capsys.readouterr().err == "a.mrc: SourceError: found; expected wanted; do this\n"


def test_an_unforeseen_failure_comes_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        _ = 1 // 0
    say_failure("a.mrc", caught.value)
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith("a.mrc: ZeroDivisionError: integer division or modulo by zero\n")


def test_a_warning_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", show_warning)
        warnings.warn("a voxel size of exactly 1 Å", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: a voxel size of exactly 1 Å\n"
