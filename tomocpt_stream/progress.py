"""What long work reports while it runs; a terminal, a log or a test may listen."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Progress(Protocol):
    """Called with the stage's name and the voxels done and in all; never asked for an answer."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take note that `done` of `total` voxels of `stage` are finished."""


@runtime_checkable
class WorkerProgress(Progress, Protocol):
    """A Progress that also wants to know what each worker does."""

    def workers(self, stage: str, tallies: Sequence[Tally]) -> None:
        """Take note of what the workers have done in `stage` so far."""


def silent(stage: str, done: int, total: int) -> None:
    """Ignore every report."""


@dataclass
class Tally:
    """What one worker has done in a stage.

    `jobs` are finished; `finished` sums their numbers, `running` holds those of the jobs under way, by
    job. Numbers are "done" (in units of the stage), "windows", "voxels", "bytes_read", "seconds" and
    "computing" (seconds in which the network ran), as far as the stage has them.
    """

    worker: str
    jobs: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    running: dict[str, Mapping[str, float]] = field(default_factory=dict)

    def finish(self, job: str) -> None:
        """Count a running job as finished."""
        self.jobs += 1
        self.finished.update(self.running.pop(job, {}))

    def number(self, name: str) -> float:
        """Return a number over the finished and the running jobs."""
        return self.finished[name] + sum(numbers.get(name, 0.0) for numbers in self.running.values())


def total(tallies: Sequence[Tally], name: str = "done") -> float:
    """Return a number over all workers."""
    return sum(tally.number(name) for tally in tallies)
