"""What the commands show: results on stdout; progress, warnings and failures on stderr."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from contextlib import contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import click

from tomocpt_stream.errors import ActionableError
from tomocpt_stream.progress_log import log_progress
from tomocpt_stream.rates import megabytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from tomocpt_stream.blocks import BlockPlan
    from tomocpt_stream.frame import Grid
    from tomocpt_stream.heatmap import PickOptions
    from tomocpt_stream.progress import WorkerProgress
    from tomocpt_stream.tomogram import Tomogram
    from tomocpt_stream.traffic import Traffic


# Facts that are a box of voxels.
_BOXES = ("shape", "file_shape", "chunks")


def on_terminal() -> bool:
    """Return whether somebody watches stderr on a terminal that can redraw its lines."""
    return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


@contextmanager
def show_progress(tomogram: str = "") -> Iterator[WorkerProgress]:
    """Yield what draws bars on a terminal, and elsewhere logs a line for `tomogram` every 30 s."""
    if not on_terminal():
        yield log_progress(tomogram)
        return
    from tomocpt_stream.bars import show_bars

    with show_bars() as progress:
        yield progress


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """Show the log of the package on stderr, with the time of day unless it is a terminal."""
    logger, handler = logging.getLogger("tomocpt_stream"), _Echo()
    text = "%(message)s" if on_terminal() else "%(asctime)s %(message)s"
    handler.setFormatter(logging.Formatter(text, datefmt="%Y-%m-%d %H:%M:%S"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class _Echo(logging.Handler):
    """Writes where stderr goes at that moment: above the bars while there are some."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        click.echo(self.format(record), err=True)


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


def plan_line(grid: Grid, plan: BlockPlan, *, workers: int = 1) -> str:
    """Return what a plan costs: tasks, windows, passes per voxel, bytes of each worker."""
    each = f" in each of {workers} workers" if workers > 1 else ""
    return f"  working voxel size {grid.voxel_size:g} Å; {plan}{each}"


def contrast_line(options: PickOptions, plan: BlockPlan) -> str:
    """Return how protein looks, or what finding it out adds to a plan."""
    if options.contrast != "auto":
        return f"  protein looks {options.contrast}"
    from tomocpt_stream.contrast import windows_sampled

    return (
        f"  protein looks dark or bright: {count(windows_sampled(plan), 'window')} more, at both signs, tell"
    )


def cluster_line(threads: Mapping[str, int], address: str, dashboard: str | None) -> str:
    """Return the size of a cluster, its scheduler and where its dashboard is."""
    seen = f"; dashboard {dashboard}" if dashboard else ""
    return f"{count(len(threads), 'worker')}, {count(sum(threads.values()), 'thread')} at {address}{seen}"


def rate(tomogram: Tomogram, seconds: float) -> str:
    """Return a tomogram's voxels per second."""
    z, y, x = tomogram.shape
    return f"{z * y * x / seconds:,.0f} voxels/s"


def traffic_line(traffic: Traffic) -> str:
    """Return what was asked of a remote store, in one line; more than 1.00 times is what came twice."""
    stored = traffic.stored
    return (
        f"  fetched {megabytes(traffic.bytes)} in {count(traffic.requests, 'request')}, "
        f"{traffic.bytes / max(1, stored):.2f} times the {megabytes(stored)} stored"
    )


def count(number: int, noun: str) -> str:
    """Return "1 pick" or "2 picks"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on stdout; one that goes to a file is not cut."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console = Console(file=sys.stdout, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 10_000  # a file is not cut at the width of a terminal that is not there
    console.print(table, highlight=False, crop=False)


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
