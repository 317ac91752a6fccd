"""Bars on a terminal, which is played by a string."""

from __future__ import annotations

import io
import re
import sys
from contextlib import redirect_stderr
from typing import TYPE_CHECKING, Any

import click
import pytest
from rich.console import Console

from tests.clock import Clock
from tomocpt_stream.bars import LISTED, show_bars, worker_table
from tomocpt_stream.progress import Tally, WorkerProgress
from tomocpt_stream.rates import Course

if TYPE_CHECKING:
    from rich.table import Table


class Screen(io.StringIO):
    """A terminal that remembers."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """A terminal, 120 columns by 40 lines."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "40")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Screen()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def frames(screen: Screen) -> list[list[str]]:
    """Return what stood on the screen, redrawing by redrawing."""
    parts = re.split(r"(?:\x1b\[2K|\x1b\[1A)+", screen.getvalue().replace("\r", ""))
    return [[line.rstrip() for line in plain(part).splitlines() if line.strip()] for part in parts if part]


def redraw(progress: Any) -> None:
    """Draw now, not at the next tenth of a second."""
    progress._bars.refresh()


def lines(table: Table | None) -> list[list[str]]:
    """Return a table as it is drawn, cell by cell."""
    assert table is not None
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return [re.split(r"  +", line.strip()) for line in console.file.getvalue().splitlines()]


def busy(worker: str, jobs: int = 1, **numbers: float) -> Tally:
    return Tally(worker, jobs, running={"job": numbers})


def test_a_bar_for_each_stage_with_rate_and_time_left(screen: Screen) -> None:
    clock = Clock()
    with redirect_stderr(screen), show_bars(clock=clock) as progress:
        assert isinstance(progress, WorkerProgress)
        progress("ingest", 0, 5_000_000)
        clock.now += 5
        progress("ingest", 5_000_000, 5_000_000)
        progress("predict", 0, 8_000_000)
        clock.now += 2
        progress("predict", 2_000_000, 8_000_000)
        redraw(progress)
    first, second = next(frame for frame in frames(screen) if any("25%" in line for line in frame))
    assert re.search(r"ingest .* 100% 1\.00 M voxels/s in 0:00:05$", first)
    assert re.search(r"predict .* 25% 1\.00 M voxels/s 0:00:06 left$", second)


def test_a_stage_that_ends_early_leaves_no_bar(screen: Screen) -> None:
    with redirect_stderr(screen), show_bars() as progress:
        for stage, done in (("fill", 0), ("ingest", 4), ("statistics", 3), ("ingest", 4), ("predict", 2)):
            progress(stage, done, 4)
        redraw(progress)
    last = frames(screen)[-2]
    assert [line.split()[0] for line in last] == ["ingest", "predict"]


def test_nothing_is_left_when_it_is_over(screen: Screen) -> None:
    with redirect_stderr(screen), show_bars() as progress:
        progress("predict", 1, 2)
        progress.workers("predict", [busy("a"), busy("b")])
        redraw(progress)
    # After the last drawing every one of its lines is erased.
    last = screen.getvalue().rsplit("\n", 1)[1]
    assert plain(last).strip() == ""
    assert last.count("\x1b[2K") >= 4


def test_a_line_for_each_worker_below_the_bar(screen: Screen) -> None:
    clock = Clock()
    with redirect_stderr(screen), show_bars(clock=clock) as progress:
        progress("predict", 0, 100_000_000)
        clock.now += 10
        progress("predict", 10_000_000, 100_000_000)
        tallies = [
            busy("1", 3, windows=20, voxels=6e6, bytes_read=30e6, computing=9),
            busy("0", 2, windows=15, voxels=4e6, bytes_read=20e6, computing=5),
        ]
        progress.workers("predict", tallies)
        redraw(progress)
        progress("seams", 0, 4)
        redraw(progress)
    shown = frames(screen)
    bar, head, *workers = next(frame for frame in shown if any("computing" in line for line in frame))
    assert "predict" in bar
    assert head.split() == ["worker", "tasks", "windows/s", "voxels/s", "read", "computing"]
    assert [re.split(r"  +", line.strip()) for line in workers] == [
        ["0", "2", "1.5", "0.40 M", "20 MB", "50%"],
        ["1", "3", "2", "0.60 M", "30 MB", "90%"],
    ]
    assert not any("computing" in line for line in shown[-2])  # the next stage is not theirs


def test_workers_are_looked_at_four_times_a_second(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, looks = Clock(), []

    def look(course: Course) -> Table | None:
        looks.append(clock.now)
        return worker_table(course)

    monkeypatch.setattr("tomocpt_stream.bars.worker_table", look)
    with redirect_stderr(screen), show_bars(clock=clock) as progress:
        progress.workers("predict", [busy("a"), busy("b")])
        assert looks == []  # of a stage that did not begin
        for _ in range(17):
            progress("predict", 1, 100)
            progress.workers("predict", [busy("a"), busy("b")])
            clock.now += 0.0625
        progress.workers("ingest", [busy("a"), busy("b")])
        progress("seams", 0, 2)
        clock.now += 1
        progress.workers("predict", [busy("a"), busy("b")])  # late news
    assert looks == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_one_worker_that_counts_no_windows_is_the_bar() -> None:
    def table(*tallies: Tally) -> Table | None:
        return worker_table(Course("ingest", 100, 0, 40, 0.0, 10.0, tallies))

    assert table() is None
    assert table(busy("a", done=9)) is None
    assert lines(table(busy("a", windows=9)))[1][0] == "a"
    head, *rows = lines(table(busy("a", done=10), busy("b", done=30)))
    assert head == ["worker", "tasks", "voxels/s"]
    assert rows == [["a", "1", "1"], ["b", "1", "3"]]


def test_of_many_workers_the_rest_is_summed() -> None:
    def rows(count: int) -> list[list[str]]:
        tallies = [busy(f"w{index}", 2, windows=10 * index, voxels=20, computing=5) for index in range(count)]
        return lines(worker_table(Course("predict", 1_000, 0, 400, 0.0, 10.0, tallies)))[1:]

    assert [row[0] for row in rows(LISTED)] == [f"w{index}" for index in range(16)]
    listed = rows(20)
    assert len(listed) == 17
    assert listed[-1] == ["and 4 more", "8", "70", "8", "50%"]


def test_a_long_name_is_cut(screen: Screen) -> None:
    name = "tcp://a-host-with-a-long-name.cluster.example:41234"
    shown = lines(worker_table(Course("predict", 9, 0, 1, 0.0, 1.0, [busy(name, windows=1)])))
    assert shown[1][0] == name[:27] + "…"


def test_what_is_printed_meanwhile_stands_above_the_bars(screen: Screen) -> None:
    with redirect_stderr(screen), show_bars() as progress:
        progress("predict", 1, 2)
        redraw(progress)
        click.echo("warning: something", err=True)
        redraw(progress)
    shown = screen.getvalue()
    line = next(line for line in shown.splitlines() if "warning" in line)
    assert plain(line).strip() == "warning: something"  # the bar that stood there was erased first
    assert "predict" in plain(shown.split("warning: something")[1])


def test_what_is_piped_is_not_drawn(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    with redirect_stderr(screen), show_bars() as progress:
        progress("train", 1, 2)
        click.echo("step 1")
        redraw(progress)
    assert pipe.getvalue() == "step 1\n"
    assert "step 1" not in screen.getvalue()
