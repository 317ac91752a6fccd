"""Progress on a terminal: a bar for each stage, and under it what each worker does."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from tomocpt_stream.rates import Courses, duration, figure, megabytes, together, unit, worker_rates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from rich.console import RenderableType
    from rich.progress import TaskID

    from tomocpt_stream.progress import Tally, WorkerProgress
    from tomocpt_stream.rates import Course, WorkerRate

# Workers that get a line of their own; the bar above them must stay on the screen.
LISTED = 16
# Seconds between two looks at the workers.
_EVERY = 0.25


@contextmanager
def show_bars(*, clock: Callable[[], float] = time.monotonic) -> Iterator[WorkerProgress]:
    """Yield what draws on stderr, which is a terminal, until the end of the `with` statement.

    Lines printed meanwhile stand above the bars. `clock` returns seconds.
    """
    columns = (
        TextColumn("  {task.description:<12}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[pace]}"),
        TextColumn("{task.fields[left]}"),
    )
    # What goes to a pipe or a file must not be printed on the terminal instead.
    bars = _Bars(*columns, console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty())
    with bars:
        yield _Display(bars, clock)


class _Bars(Progress):
    """Bars with a table under them."""

    table: Table | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the bars, then the table."""
        yield from super().get_renderables()
        if self.table is not None:
            yield Padding(self.table, (0, 0, 0, 4))


class _Display:
    """Brings the bars and the table up to what is reported."""

    def __init__(self, bars: _Bars, clock: Callable[[], float]) -> None:
        self._bars, self._clock = bars, clock
        self._courses = Courses(clock)
        self._tasks: dict[str, TaskID] = {}
        self._current: Course | None = None
        self._looked = -_EVERY

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Draw the bar of a stage."""
        course = self._courses.note(stage, done, total)
        if self._current is None or stage != self._current.stage:
            self._begin(stage)
        self._current = course
        if course.finished:
            left = f"in {duration(course.seconds)}"
        else:
            left = "" if course.left is None else f"{duration(course.left)} left"
        self._bars.update(self._tasks[stage], completed=done, total=total, pace=course.pace, left=left)

    def _begin(self, stage: str) -> None:
        """Go on to a stage; one that ended early, as a search without a find does, leaves no bar."""
        before = self._current
        if before is not None and before.done < before.total:
            self._bars.remove_task(self._tasks.pop(before.stage))
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, pace="", left="")
        self._bars.table = None

    def workers(self, stage: str, tallies: Sequence[Tally]) -> None:
        """Draw the table of the workers; each report of one of them is too often to look at them all."""
        course = self._courses.tell(stage, tallies)
        now = self._clock()
        soon = now < self._looked + _EVERY and self._bars.table is not None
        if course is None or course is not self._current or soon:
            return
        self._looked, self._bars.table = now, worker_table(course)


def worker_table(course: Course) -> Table | None:
    """Return a line for each worker, None for one worker that counts no windows.

    Of more than 16 workers the first 16 are listed, and the others summed. What no worker counts has
    no column.
    """
    rates = worker_rates(course)
    if not rates or (len(rates) == 1 and not rates[0].windows):
        return None
    listed = rates[:LISTED]
    if len(rates) > LISTED:
        listed.append(together(rates[LISTED:], f"and {len(rates) - LISTED} more"))
    columns: dict[str, Callable[[WorkerRate], str]] = {"tasks": lambda rate: str(rate.jobs)}
    if any(rate.windows for rate in rates):
        columns["windows/s"] = lambda rate: figure(rate.windows)
    columns[f"{unit(course.stage)}/s"] = lambda rate: figure(rate.units)
    if any(rate.bytes_read for rate in rates):
        columns["read"] = lambda rate: megabytes(rate.bytes_read)
    if any(rate.computing for rate in rates):
        columns["computing"] = lambda rate: f"{rate.computing:.0%}"
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("worker", no_wrap=True, max_width=28)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for rate in listed:
        table.add_row(rate.name, *(text(rate) for text in columns.values()))
    return table
