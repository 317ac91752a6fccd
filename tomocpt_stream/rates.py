"""How fast a stage goes: rates over wall time, of the whole and of each worker, and how they read."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tomocpt_stream.progress import total

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tomocpt_stream.progress import Tally

# What the stages count that are not measured in voxels.
_UNITS = {
    "simulate": "tomograms",
    "calibrate": "tomograms",
    "train": "steps",
    "finetune": "steps",
    "contrast": "windows",
}


@dataclass
class Course:
    """How far a stage is: `done` of `total` units, `before` of them done when it was first heard of.

    `began` and `heard` are the times of its first and its last report, in seconds.
    """

    stage: str
    total: int
    before: int
    done: int
    began: float
    heard: float
    tallies: Sequence[Tally] = ()

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do, and no worker still has a task in hand."""
        return self.done >= self.total and not any(tally.running for tally in self.tallies)

    @property
    def seconds(self) -> float:
        """Wall time from the first to the last report."""
        return self.heard - self.began

    @property
    def gained(self) -> float:
        """What was done since the first report; not what workers found done by an earlier run."""
        voxels = total(self.tallies, "voxels")
        gained = self.done - self.before
        return min(voxels, gained) if voxels else gained

    @property
    def left(self) -> float | None:
        """Seconds that the rest takes at the rate so far, None before there is one."""
        if self.done >= self.total:
            return 0.0
        return self.seconds / self.gained * (self.total - self.done) if self.gained > 0 else None

    @property
    def pace(self) -> str:
        """The rate so far with its unit."""
        return pace(self.gained, self.seconds, unit(self.stage))


class Courses:
    """The stages that have reported, by name; a stage that begins again begins with a new course."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._known: dict[str, Course] = {}
        self._current = ""

    def note(self, stage: str, done: int, total: int) -> Course:
        """Take note of a report and return the course of its stage."""
        now = self._clock()
        course = self._known.get(stage)
        if course is None or self._again(course, done, total):
            course = self._known[stage] = Course(stage, total, done, done, now, now)
        course.done, course.heard = done, now
        self._current = stage
        return course

    def tell(self, stage: str, tallies: Sequence[Tally]) -> Course | None:
        """Take note of what the workers have done; None for a stage that has not reported itself yet."""
        course = self._known.get(stage)
        if course is not None:
            course.tallies, course.heard = tallies, self._clock()
        return course

    def _again(self, course: Course, done: int, total: int) -> bool:
        """Return whether a report is of the next tomogram; a worker that died may also lower `done`."""
        if total != course.total or (done < total <= course.done):
            return True
        return course.stage != self._current and done < course.done


@dataclass(frozen=True)
class WorkerRate:
    """What one worker does: windows and units per second, bytes read, share of the time it computed."""

    name: str
    jobs: int
    windows: float
    units: float
    bytes_read: float
    computing: float


def worker_rates(course: Course) -> list[WorkerRate]:
    """Return the rates of each worker over the wall time of the stage, by name, 2 before 10."""
    seconds = course.seconds or math.inf
    # Without a count of voxels a worker has the share of the stage's own that it has of what is done.
    name = "voxels" if total(course.tallies, "voxels") else "done"
    scale = 1.0 if name == "voxels" else course.gained / max(1e-9, total(course.tallies))
    rates = [
        WorkerRate(
            tally.worker,
            tally.jobs,
            tally.number("windows") / seconds,
            tally.number(name) * scale / seconds,
            tally.number("bytes_read"),
            tally.number("computing") / seconds,
        )
        for tally in course.tallies
    ]
    return sorted(rates, key=lambda rate: _natural(rate.name))


def together(rates: Sequence[WorkerRate], name: str) -> WorkerRate:
    """Return the sums of several workers, and the mean share of time that they computed."""
    return WorkerRate(
        name,
        sum(rate.jobs for rate in rates),
        sum(rate.windows for rate in rates),
        sum(rate.units for rate in rates),
        sum(rate.bytes_read for rate in rates),
        sum(rate.computing for rate in rates) / max(1, len(rates)),
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts the numbers in names as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def unit(stage: str) -> str:
    """Return what a stage counts."""
    return _UNITS.get(stage, "voxels")


def pace(count: float, seconds: float, unit: str) -> str:
    """Return a rate with its unit, millions of them as such; nothing before there is one."""
    if count <= 0 or seconds <= 0:
        return ""
    return f"{figure(count / seconds)} {unit}/s"


def figure(number: float) -> str:
    """Return a number in three digits or more, in millions with two decimals."""
    if number >= 1e5:
        return f"{number / 1e6:.2f} M"
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def megabytes(size: float) -> str:
    """Return a number of bytes in MB, three digits of the small ones."""
    return f"{size / 1e6:,.0f} MB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def duration(seconds: float) -> str:
    """Return a time as h:mm:ss, rounded up, with its days where there are any."""
    days, rest = divmod(math.ceil(round(seconds, 3)), 86_400)
    text = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days} d {text}" if days else text
