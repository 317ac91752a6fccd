"""What the commands show on a terminal: results on stdout, bars, warnings and failures on stderr."""

from __future__ import annotations

import sys
import time
import traceback
from contextlib import contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import click

from tomocpt_stream.errors import ActionableError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tomocpt_stream.blocks import BlockPlan
    from tomocpt_stream.frame import Grid
    from tomocpt_stream.progress import Progress
    from tomocpt_stream.tomogram import Tomogram


# Facts that are a box of voxels.
_BOXES = ("shape", "file_shape", "chunks")
# What the stages count that are not measured in voxels.
_UNITS = {"simulate": "tomograms", "train": "steps"}


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Yield what draws a bar for each stage on stderr, with rate and time left; silent without a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("  {task.description:<12}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    stages: dict[str, tuple[TaskID, float, int]] = {}
    with Bars(
        *columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as bars:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = (bars.add_task(stage, total=total, rate=""), time.perf_counter(), done)
            task, began, before = stages[stage]
            rate = pace(done - before, time.perf_counter() - began, _UNITS.get(stage, "voxels"))
            bars.update(task, completed=done, total=total, rate=rate)

        yield report


def pace(count: int, seconds: float, unit: str) -> str:
    """Return a rate with its unit, millions of them as such; nothing before there is one."""
    if count <= 0 or seconds <= 0:
        return ""
    rate = count / seconds
    return f"{rate / 1e6:.2f} M {unit}/s" if rate >= 1e5 else f"{rate:.3g} {unit}/s"


def facts_line(tomogram: Tomogram) -> str:
    """Return the name, shape and voxel size of a tomogram."""
    z, y, x = tomogram.shape
    return f"{tomogram.name}: {z} x {y} x {x} (zyx) = {z * y * x:,} voxels of {tomogram.voxel_size:g} Å"


def fact_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the facts of a header as lines, in columns, with units; a list of texts takes a line each."""
    wide = max(map(len, facts), default=0)
    for key, value in facts.items():
        texts = (
            value if isinstance(value, list) and value and isinstance(value[0], str) else [_fact(key, value)]
        )
        for name, text in zip_longest([key.replace("_", " ")], texts, fillvalue=""):
            yield f"{name:<{wide}}  {text}".rstrip()


def _fact(key: str, value: Any) -> str:
    if isinstance(value, list | tuple):
        number = all(isinstance(item, int) for item in value) and key != "axis_order"
        text = (" x " if number else ", ").join(f"{item:g}" for item in value)
    else:
        text = f"{value:g}" if isinstance(value, float) else str(value)
    unit = " Å" if "voxel_size" in key else " voxels (z, y, x)" if key in _BOXES else ""
    return f"{text}{unit}" if text else "none"


def plan_line(grid: Grid, plan: BlockPlan) -> str:
    """Return what a plan costs: windows, passes per voxel, bytes."""
    z, y, x = plan.window.shape
    return (
        f"  working voxel size {grid.voxel_size:g} Å; {plan.windows:,} windows of {z} x {y} x {x}, "
        f"{plan.passes_per_voxel:.2f} passes per voxel, at most {plan.projected_bytes / 1e9:.2f} GB"
    )


def rate(tomogram: Tomogram, seconds: float) -> str:
    """Return a tomogram's voxels per second."""
    z, y, x = tomogram.shape
    return f"{z * y * x / seconds:,.0f} voxels/s"


def count(number: int, noun: str) -> str:
    """Return "1 pick" or "2 picks"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def say_failure(source: str, error: Exception) -> None:
    """Say why a tomogram was not done; an error that nobody foresaw comes with its traceback."""
    if not isinstance(error, ActionableError | OSError):
        traceback.print_exception(error)
    click.echo(f"{source}: {type(error).__name__}: {error}", err=True)


def warn(message: object) -> None:
    """Print a warning on stderr."""
    click.echo(f"warning: {message}", err=True)


def show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning of Python as one of the command."""
    warn(message)
